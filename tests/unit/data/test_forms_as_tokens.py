"""What the forms that people bring become, token by token: shared/data/forms (its README's numbers), and more of each.

Each row is written here as a Comparison, as data/rows/forms.py makes it. Its expected texts are tokenised whole, and
the tokens must be the same.
"""

import json
import re
from dataclasses import replace

import pytest
import templates

from dpo_ds.data.chat import DROPPED, FOLDED, REWRITTEN, SHORTENED
from dpo_ds.data.comparison import Answer, Comparison, Preference
from dpo_ds.data.encoded import EQUAL_TOKENS, Encoded
from dpo_ds.data.encoder import MOVED, Encoder, Tokenizing
from dpo_ds.data.template import REFUSED, RESERVED, prints_date
from dpo_ds.data.transcript import NO_ASSISTANT
from dpo_ds.errors import UserError

R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
QWEN_2, QWEN_3 = "Qwen/Qwen2-7B-Instruct", "Qwen/Qwen3-8B"
CHATML = "stabilityai/stablelm-2-1_6b-chat"
MISTRAL, ZEPHYR, GEMMA = "mistralai/Mistral-7B-Instruct-v0.3", "HuggingFaceH4/zephyr-7b-beta", "google/gemma-7b-it"
LLAMA_3, LLAMA_3_1 = "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
PHI_3, MARKED, PLAIN = "microsoft/Phi-3-mini-4k-instruct", "marked", "gpt2"
LONG = 10**6


def user(text: str, **more) -> dict:
    return {"role": "user", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def says(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def tool(text: str, **more) -> dict:
    return {"role": "tool", "content": text, **more}


def row(prompt: list[dict], *answers: dict | list[dict], **more) -> Comparison:
    """A comparison whose first answer is better than each other."""
    messages = [answer if isinstance(answer, list) else [answer] for answer in answers]
    pairs = [Preference(0, n) for n in range(1, len(answers))]
    return Comparison(prompt, [Answer(answer) for answer in messages], pairs, **more)


def rendered(prompt: str, *answers: str) -> Comparison:
    pairs = [Preference(0, n) for n in range(1, len(answers))]
    return Comparison([], [Answer([says(text)], text) for text in answers], pairs, text=prompt, rendered=True)


def encode(model: str, comparison: Comparison, **options) -> Encoded:
    tokenizing = Tokenizing(**{"max_length": LONG, "date": "2026-11-26", **options})
    (encoded,) = Encoder(templates.tokenizer(model), tokenizing).encode([comparison])
    return encoded


def check(model: str, encoded: Encoded, prompt: str, *answers: str) -> None:
    """The prompt's tokens and each answer's are those of the expected text, with nothing before, between or after."""
    tok = templates.tokenizer(model)
    assert encoded.left_out == "" and len(encoded.answers) == len(answers)
    for tokens, text in zip(encoded.answers, answers, strict=True):
        assert encoded.prompt + tokens == tok(prompt + text, add_special_tokens=False)["input_ids"]
        assert tok.decode(encoded.prompt) == prompt  # so that the boundary is where it is expected


# ------------------------------------------------------------------------------------------------------ each form, used

TWO = "<think>\nTwo and two make four.\n</think>\n\n4"
FIVE = "<think>\nLet me guess five.\n</think>\n\n5"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
CALL_AS_TEXT = [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS = f"# Tools\n<tools>\n{json.dumps(WEATHER)}\n</tools><|im_end|>\n"
R1_ASKED = "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>"
R1_END = "<｜end▁of▁sentence｜>"
HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
SUMS = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
CODE = "<|im_start|>user\nWrite code<|im_end|>\n<|im_start|>assistant\n"
HEAD = "<|begin_of_text|><|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
HI_3 = HEAD.format("user", "Hi") + "<|start_header_id|>assistant<|end_header_id|>\n\n"
TODAY = HEAD.format("system", "Today Date: 26 Nov 2026\n\n{}")
HI_31 = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
UNTHOUGHT = "<think>\n\n</think>\n\n"

# case: model, comparison, the prompt, the answers, changed
USED = {
    "01 reasoning in the text, R1": (
        R1, row([user("2+2?")], says(TWO), says(FIVE)), f"{R1_ASKED}<think>\n",
        ["Two and two make four.\n</think>\n\n4" + R1_END, "Let me guess five.\n</think>\n\n5" + R1_END], []),
    "01 reasoning whose <think> is left to the prompt, R1": (
        R1, row([user("2+2?")], says("Easy.\n</think>\n\n4"), says("Hm.</think>5")), f"{R1_ASKED}<think>\n",
        ["Easy.\n</think>\n\n4" + R1_END, "Hm.</think>5" + R1_END], []),
    "01 no newline behind <think>, R1": (
        R1, row([user("2+2?")], says("<think>Easy.</think>4"), says("<think>\n\nHm.</think>5")), f"{R1_ASKED}<think>\n",
        ["Easy.</think>4" + R1_END, "\nHm.</think>5" + R1_END], []),
    "01 one answer without reasoning, R1": (
        R1, row([user("2+2?")], says(TWO), says("5")), R1_ASKED, [TWO + R1_END, "5" + R1_END], [REWRITTEN]),
    "01 reasoning in an earlier turn, R1": (
        R1, row([user("1+1?"), says("<think>\none\n</think>\n\n2"), user("2+2?")], says(TWO), says(FIVE)),
        f"<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>\n\n2{R1_END}<｜User｜>2+2?<｜Assistant｜><think>\n",
        [TWO.removeprefix("<think>\n") + R1_END, FIVE.removeprefix("<think>\n") + R1_END], [SHORTENED]),
    "01b the same answer after other reasoning, R1": (
        R1, row([user("2+2?")], says("<think>\nshort\n</think>\n\n4"), says("<think>\nwinding\n</think>\n\n4")),
        f"{R1_ASKED}<think>\n", [f"short\n</think>\n\n4{R1_END}", f"winding\n</think>\n\n4{R1_END}"], []),
    "01 reasoning in the text, Qwen3": (
        QWEN_3, row([user("2+2?")], says(TWO), says("<think>guess</think>5")), SUMS,
        [f"{TWO}<|im_end|>", "<think>\nguess\n</think>\n\n5<|im_end|>"], []),
    "02 reasoning_content": (
        QWEN_3, row([user("2+2?")], says("4", reasoning_content="Two and two make four."),
                    says("5", reasoning_content="guess")), SUMS,
        [f"{TWO}<|im_end|>", "<think>\nguess\n</think>\n\n5<|im_end|>"], []),
    "02 reasoning_content of one answer only": (
        QWEN_3, row([user("2+2?")], says("4", reasoning_content="Two and two make four."),
                    says("5", reasoning_content=None)), SUMS, [f"{TWO}<|im_end|>", f"{UNTHOUGHT}5<|im_end|>"], []),
    "02 reasoning_content of an earlier turn": (
        QWEN_3, row([user("1+1?"), says("2", reasoning_content="one"), user("2+2?")], says("4"), says("5")),
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n" + SUMS,
        [f"{UNTHOUGHT}4<|im_end|>", f"{UNTHOUGHT}5<|im_end|>"],
        ["the chat template drops reasoning_content of an earlier answer"]),
    "02 a variable of the row's": (
        QWEN_3, row([user("2+2?")], says("4"), says("5"), template_kwargs={"enable_thinking": False}),
        SUMS + UNTHOUGHT, ["4<|im_end|>", "5<|im_end|>"], []),
    "02 a variable that is not read": (
        QWEN_3, row([user("2+2?")], says("4"), says("5"), template_kwargs={"thinking_budget": 5}), SUMS,
        [f"{UNTHOUGHT}4<|im_end|>", f"{UNTHOUGHT}5<|im_end|>"],
        ["the chat template does not read thinking_budget of chat_template_kwargs"]),
    "03 already rendered, ChatML": (
        CHATML, rendered(HI, "Hello.<|im_end|>", "Go.<|im_end|>"), HI, ["Hello.<|im_end|>", "Go.<|im_end|>"], []),
    "03 rendered with a newline at the end, without an end": (
        CHATML, rendered(HI, "Hello.<|im_end|>\n", "Go."), HI, ["Hello.<|im_end|>", "Go.<|im_end|>"], []),
    "03b already rendered, Mistral": (
        MISTRAL, rendered("<s>[INST] hello [/INST]", " hi nice to meet you</s>", " leave me alone</s>"),
        "<s>[INST] hello [/INST]", [" hi nice to meet you</s>", " leave me alone</s>"], []),
    "03b without BOS and EOS": (
        MISTRAL, rendered("[INST] hello [/INST]", " hi nice to meet you", " leave me alone"),
        "<s>[INST] hello [/INST]", [" hi nice to meet you</s>", " leave me alone</s>"], []),
    "03d already rendered whole, Llama-3": (
        LLAMA_3, rendered(HI_3, "Hello.<|eot_id|>", "Go away.<|eot_id|>"), HI_3,
        ["Hello.<|eot_id|>", "Go away.<|eot_id|>"], []),
    "03d with BOS twice": (
        LLAMA_3, rendered("<|begin_of_text|>" + HI_3, "Hello.<|eot_id|>", "Go away.<|eot_id|>"), HI_3,
        ["Hello.<|eot_id|>", "Go away.<|eot_id|>"], []),
    "05 a system message": (
        QWEN_2, row([system("Answer in French."), user("Hi")], says("Bonjour"), says("Hello")),
        f"<|im_start|>system\nAnswer in French.<|im_end|>\n{HI}", ["Bonjour<|im_end|>", "Hello<|im_end|>"], []),
    "05 a system message that is refused": (
        GEMMA, row([system("Answer in French."), user("Hi")], says("Bonjour"), says("Hello")),
        "<bos><start_of_turn>user\nAnswer in French.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        ["Bonjour<end_of_turn>", "Hello<end_of_turn>"], [FOLDED]),
    "05 a system message beside the template's own text": (
        LLAMA_3_1, row([system("Answer in French."), user("Hi")], says("Bonjour"), says("Hello")),
        TODAY.format("Answer in French.") + HI_31, ["Bonjour<|eot_id|>", "Hello<|eot_id|>"], []),
    "06 tools and a call beside text": (
        QWEN_3, row([system("You are helpful."), user("Hi")], says("Let me look.", tool_calls=CALL), says("I cannot."),
                    tools=[WEATHER]),
        f"<|im_start|>system\nYou are helpful.\n\n{TOOLS}{HI}",
        [f"{UNTHOUGHT}Let me look.\n{CALLED}<|im_end|>", f"{UNTHOUGHT}I cannot.<|im_end|>"], []),
    "06 arguments as JSON text": (
        QWEN_3, row([user("Hi")], says(None, tool_calls=CALL_AS_TEXT), says("I cannot."), tools=[WEATHER]),
        f"<|im_start|>system\n{TOOLS}{HI}", [f"{UNTHOUGHT}{CALLED}<|im_end|>", f"{UNTHOUGHT}I cannot.<|im_end|>"], []),
    "06 arguments as JSON text, Llama-3.1": (
        LLAMA_3_1, row([user("Hi")], says(None, tool_calls=CALL_AS_TEXT), says("I cannot.")), TODAY.format("") + HI_31,
        ['{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>', "I cannot.<|eot_id|>"], []),
    "06b a call in the prompt, without a tool's answer": (
        QWEN_3, row([user("Weather?"), says("", tool_calls=CALL), user("Hi")], says("Sunny."), says("I cannot.")),
        f"<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n{CALLED}<|im_end|>\n{HI}",
        [f"{UNTHOUGHT}Sunny.<|im_end|>", f"{UNTHOUGHT}I cannot.<|im_end|>"], []),
    "06c role tool, content null": (
        QWEN_3, row([user("Hi"), says(None, tool_calls=CALL), tool("sunny", name="get_weather")], says("Sunny."),
                    says("I cannot."), tools=[WEATHER]),
        f"<|im_start|>system\n{TOOLS}{HI}{CALLED}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        [f"{UNTHOUGHT}Sunny.<|im_end|>", f"{UNTHOUGHT}I cannot.<|im_end|>"], []),
    "06c a key that the template does not read": (
        QWEN_3, row([user("Hi"), says(None, tool_calls=CALL), tool("sunny", tool_call_id="7")], says("Sunny."),
                    says("I cannot.")),
        f"{HI}{CALLED}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        [f"{UNTHOUGHT}Sunny.<|im_end|>", f"{UNTHOUGHT}I cannot.<|im_end|>"],
        []),
    "06d an answer that is a call": (
        QWEN_3, row([user("Hi")], says("", tool_calls=CALL), says("I cannot."), tools=[WEATHER]),
        f"<|im_start|>system\n{TOOLS}{HI}", [f"{UNTHOUGHT}{CALLED}<|im_end|>", f"{UNTHOUGHT}I cannot.<|im_end|>"], []),
    "06 tools that the template ignores": (
        CHATML, row([user("Hi")], says("Yes."), says("No."), tools=[WEATHER]), HI, ["Yes.<|im_end|>", "No.<|im_end|>"],
        ["the chat template ignores tools"]),
    "content null beside nothing else": (
        CHATML, row([{"role": "system", "content": None}, user("Hi")], says("Yes."), says("No.")),
        f"<|im_start|>system\n<|im_end|>\n{HI}", ["Yes.<|im_end|>", "No.<|im_end|>"], []),
    "10 a begun answer": (
        CHATML, row([user("Write code"), says("Sure, here is")], says(" the code: x=1"), says(" nothing")),
        f"{CODE}Sure, here is", [" the code: x=1<|im_end|>", " nothing<|im_end|>"], []),
    "10 a begun answer of three": (
        LLAMA_3, row([user("Hi"), says("Good ")], says("day"), says("night"), says("grief")), HI_3 + "Good",
        [" day<|eot_id|>", " night<|eot_id|>", " grief<|eot_id|>"], [MOVED]),
    "10 a begun answer, with a system message": (
        MISTRAL, row([system("Be kind."), user("Hi"), says("Sure,")], says(" yes"), says(" no")),
        "<s>[INST] Be kind.\n\nHi[/INST] Sure,", [" yes</s>", " no</s>"], []),
    "10 begun reasoning, R1": (
        R1, row([user("2+2?"), says("<think>\nLet me see:")], says(" two.\n</think>\n\n4"),
                says(" one.\n</think>\n\n5")),
        f"{R1_ASKED}<think>\nLet me see:", [f" two.\n</think>\n\n4{R1_END}", f" one.\n</think>\n\n5{R1_END}"], []),
    "10 a begun answer, Qwen3": (
        QWEN_3, row([user("Hi"), says("Sure")], says(", yes"), says(", i")), f"{HI}{UNTHOUGHT}Sure",
        [", yes<|im_end|>", ", i<|im_end|>"], []),
    "10 a call at the prompt's end is no begun answer": (
        QWEN_3, row([user("Hi"), says(None, tool_calls=CALL)], says("Sunny."), says("No.")),
        f"{HI}{UNTHOUGHT}{CALLED}<|im_end|>\n<|im_start|>assistant\n", ["Sunny.<|im_end|>", "No.<|im_end|>"], []),
    "four answers": (
        CHATML, row([user("Hi")], says("Yes."), says("No."), says("Go."), says("Yes, do.")), HI,
        ["Yes.<|im_end|>", "No.<|im_end|>", "Go.<|im_end|>", "Yes, do.<|im_end|>"], []),
    "one answer, no pair": (CHATML, row([user("Hi")], says("Yes.")), HI, ["Yes.<|im_end|>"], []),
    "Zephyr": (
        ZEPHYR, row([system("Be kind."), user("Hi")], says("Yes."), says("No.")),
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n", ["Yes.</s>", "No.</s>"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", USED)
def test_a_form_becomes_the_expected_tokens(case):
    model, comparison, prompt, answers, changed = USED[case]
    encoded = encode(model, comparison)
    check(model, encoded, prompt, *answers)
    assert encoded.changed == changed and encoded.pairs == comparison.pairs
    assert encoded.scored == [None] * len(answers) and encoded.cut_answers == [0] * len(answers)


def test_a_wrong_expectation_does_not_pass():
    model, comparison, prompt, answers, _ = USED["10 a begun answer"]
    encoded = encode(model, comparison)
    for wrong in ([CODE, *("Sure, here is" + text for text in answers)], [prompt, *reversed(answers)]):
        with pytest.raises(AssertionError):
            check(model, encoded, *wrong)


# ------------------------------------------------------------------------------------------------------------- left out

# case: model, comparison, the kind
LEFT_OUT = {
    "02 reasoning_content that the template does not read": (
        R1, row([user("2+2?")], says("4", reasoning_content="Two."), says("5")),
        "the chat template ignores reasoning_content of an answer"),
    "02 the same, ChatML": (
        CHATML, row([user("2+2?")], says("4", reasoning_content="Two."), says("5")),
        "the chat template ignores reasoning_content of an answer"),
    "06 a call that the template does not read": (
        CHATML, row([user("Hi")], says("Let me look.", tool_calls=CALL), says("I cannot.")),
        "the chat template ignores tool_calls of an answer"),
    "06d the same, without text": (
        ZEPHYR, row([user("Hi")], says(None, tool_calls=CALL), says("I cannot.")),
        "the chat template ignores tool_calls of an answer"),
    "06 text beside a call, which the template drops": (
        LLAMA_3_1, row([user("Hi")], says("Let me look.", tool_calls=CALL), says("I cannot.")), DROPPED),
    "06b a call in the prompt that the template does not read": (
        CHATML, row([user("Hi"), says("", tool_calls=CALL), user("So?")], says("Sunny."), says("I cannot.")),
        "the chat template ignores tool_calls of the prompt"),
    "06b the same, though its words stand elsewhere": (
        CHATML, row([user("get_weather Paris"), says("", tool_calls=CALL), user("So?")], says("Sunny."), says("No.")),
        "the chat template ignores tool_calls of the prompt"),
    "06c role tool, which the template leaves out": (
        ZEPHYR, row([user("Hi"), says("Let me look."), tool("sunny")], says("Sunny."), says("I cannot.")),
        "the chat template drops a message of the prompt (role tool)"),
    "06c role tool, which the template refuses": (
        GEMMA, row([user("Hi"), says("Let me look."), tool("sunny")], says("Sunny."), says("I cannot.")),
        f"{REFUSED}: roles must alternate"),
    "06 two calls, which the template refuses": (
        LLAMA_3_1, row([user("Hi")], says(None, tool_calls=CALL * 2), says("I cannot.")),
        f"{REFUSED}: only one tool call at once"),
    "a variable with a name of transformers'": (
        QWEN_3, row([user("Hi")], says("Yes."), says("No."), template_kwargs={"tokenize": True}), RESERVED),
    "answers that the template makes equal": (
        LLAMA_3, row([user("Hi")], says("Yes."), says("Yes. \n")), EQUAL_TOKENS),
    "plain text: a call": (
        PLAIN, row([user("Hi")], says("", tool_calls=CALL), says("No.")),
        "plain text has no place for tool_calls of an answer"),
    "plain text: reasoning_content": (
        PLAIN, row([user("Hi")], says("4", reasoning_content="Two."), says("No.")),
        "plain text has no place for reasoning_content of an answer"),
    "plain text: role tool": (
        PLAIN, row([user("Hi"), tool("sunny")], says("Yes."), says("No.")), "plain text has no role tool"),
    "a system message that is refused, and no user's to take it": (
        GEMMA, row([system("Be kind."), says("Hello."), user("Hi")], says("Yes."), says("No.")),
        f"{REFUSED}: no system role"),
    "an answer of the user's": (CHATML, row([user("Hi")], [user("Yes.")], says("No.")), NO_ASSISTANT),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_would_be_lost_leaves_the_row_out(case):
    model, comparison, kind = LEFT_OUT[case]
    encoded = encode(model, comparison)
    assert encoded.left_out == kind and not encoded.prompt and not encoded.answers


def test_a_refusal_quotes_the_first_hundred_characters_of_the_templates_message():
    shape = replace(
        templates.OTHERS[QWEN_3], template="{{ raise_exception('x' * 300) if messages | length > 2 }}{{ messages }}"
    )
    encoder = Encoder(templates.make(shape), Tokenizing(LONG))
    (encoded,) = encoder.encode([row([user("a"), user("b")], says("c"), says("d"))])
    assert encoded.left_out == f"{REFUSED}: {'x' * 100}"


def test_a_row_that_is_left_out_leaves_its_neighbours_alone():
    cases = [USED["03 already rendered, ChatML"][1], LEFT_OUT["06 a call that the template does not read"][1]]
    encoder = Encoder(templates.tokenizer(CHATML), Tokenizing(LONG))
    one, two, three = encoder.encode([cases[0], cases[1], cases[0]])
    assert one == three == encode(CHATML, cases[0]) and two.left_out


# ------------------------------------------------------------------------------------- variables, dates, special tokens


def test_the_runs_variables_reach_the_template_and_the_rows_go_before_them():
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    comparison = row([user("2+2?")], says("4"), says("5"))
    check(QWEN_3, encode(QWEN_3, comparison, template_kwargs=off), SUMS + UNTHOUGHT, "4<|im_end|>", "5<|im_end|>")
    encoded = encode(QWEN_3, replace(comparison, template_kwargs=on), template_kwargs=off)
    check(QWEN_3, encoded, SUMS, f"{UNTHOUGHT}4<|im_end|>", f"{UNTHOUGHT}5<|im_end|>")


@pytest.mark.parametrize(
    ("model", "variables", "message"),
    [
        (QWEN_3, {"enable_thinkin": False}, "--chat_template_kwargs sets enable_thinkin, but .* does not read it"),
        (QWEN_3, {"tokenize": True}, "--chat_template_kwargs sets tokenize, which is not a variable of the template"),
        (PLAIN, {"enable_thinking": False}, "--chat_template_kwargs are for a chat template, and gpt2 uses none"),
    ],
)
def test_variables_that_would_do_nothing_are_refused(model, variables, message):
    with pytest.raises(UserError, match=message):
        Encoder(templates.tokenizer(model), Tokenizing(LONG, template_kwargs=variables))


def test_a_model_with_a_template_for_tools_uses_it_where_a_row_has_some():
    shape = templates.OTHERS[QWEN_3]
    tok = templates.make(shape)
    tok.chat_template = {"default": templates.chatml(), "tool_use": shape.template}
    plain, calling = row([user("Hi")], says("Yes."), says("No.")), USED["06d an answer that is a call"]
    for date in (None, "2026-11-26"):
        one, two = Encoder(tok, Tokenizing(LONG, date=date)).encode([plain, calling[1]])
        check(QWEN_3, one, HI, "Yes.<|im_end|>", "No.<|im_end|>")
        check(QWEN_3, two, calling[2], *calling[3])


@pytest.mark.parametrize(("day", "printed"), [("2026-11-26", "26 Nov 2026"), ("1999-01-02T03:04:05", "02 Jan 1999")])
def test_a_template_prints_the_runs_date(day, printed):
    encoded = encode(LLAMA_3_1, row([user("Hi")], says("Yes."), says("No.")), date=day)
    assert f"Today Date: {printed}\n\n" in templates.tokenizer(LLAMA_3_1).decode(encoded.prompt)
    assert prints_date(templates.tokenizer(LLAMA_3_1)) and not prints_date(templates.tokenizer(QWEN_3))


def test_without_a_date_it_is_the_clocks():
    """The negative control: it is not the date above."""
    encoded = encode(LLAMA_3_1, row([user("Hi")], says("Yes."), says("No.")), date=None)
    text = templates.tokenizer(LLAMA_3_1).decode(encoded.prompt)
    assert re.search(r"Today Date: \d\d \w+ \d{4}\n", text) and "1999" not in text


# model: what opens an answer, some of the special tokens that the template writes, one that it does not
MARKERS = {
    CHATML: ("<|im_start|>assistant\n", {"<|im_start|>", "<|im_end|>"}, "<|endoftext|>"),
    QWEN_3: ("<|im_start|>assistant\n", {"<|im_start|>", "<|im_end|>"}, "<tool_call>"),
    MISTRAL: ("[/INST]", {"<s>", "[INST]", "[/INST]", "</s>"}, "[TOOL_CALLS]"),
    LLAMA_3: ("<|start_header_id|>assistant<|end_header_id|>\n\n", {"<|eot_id|>"}, "<|end_of_text|>"),
    R1: ("<｜Assistant｜>", {"<｜User｜>", "<｜Assistant｜>"}, "<s>"),
    ZEPHYR: ("<|assistant|>\n", {"</s>"}, "<s>"),
    PHI_3: ("<|assistant|>\n", {"<|user|>", "<|assistant|>", "<|end|>"}, "<s>"),
    GEMMA: ("<start_of_turn>model\n", {"<start_of_turn>", "<end_of_turn>"}, "\n"),
    PLAIN: ("", set(), "<|endoftext|>"),
}


@pytest.mark.parametrize("model", MARKERS)
def test_markers_are_what_the_template_writes(model):
    opening, written, other = MARKERS[model]
    markers = Encoder(templates.tokenizer(model), Tokenizing(LONG)).markers
    assert markers.opening == opening and written <= markers.specials and other not in markers.specials


def test_what_opens_an_answer_is_without_the_reasoning_that_only_a_variable_opens():
    """So that a dialogue that was rendered whole is split where its answer begins."""
    options = Tokenizing(LONG, template_kwargs={"enable_thinking": False})
    assert Encoder(templates.tokenizer(QWEN_3), options).markers.opening == "<|im_start|>assistant\n"
