"""Which tokens of an answer are learned when the dialogue goes on in it: the assistant's, with their ends of turn."""

import re
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import templates

from dpo_ds.data.chat import DROPPED, FOLDED, REWRITTEN, UNSTABLE
from dpo_ds.data.comparison import Answer, Comparison, Preference
from dpo_ds.data.encoded import Encoded
from dpo_ds.data.encoder import Encoder, Tokenizing
from dpo_ds.data.transcript import TRAILING

R1, QWEN_3, MARKED = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "Qwen/Qwen3-8B", "marked"
CHATML, MISTRAL = "stabilityai/stablelm-2-1_6b-chat", "mistralai/Mistral-7B-Instruct-v0.3"
PHI_3, PLAIN, GEMMA = "microsoft/Phi-3-mini-4k-instruct", "gpt2", "google/gemma-7b-it"
ALL = [*templates.SHAPES, *templates.OTHERS]
SHORT = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


def chat(*turns: str) -> list[dict]:
    """ "a: Hi" is the assistant's message Hi."""
    return [{"role": SHORT[turn[0]], "content": turn[3:]} for turn in turns]


def row(prompt: list[dict], *answers: list[dict], **more) -> Comparison:
    return Comparison(prompt, [Answer(answer) for answer in answers], [Preference(0, 1)], **more)


def encode(model: str, comparison: Comparison, max_length: int = 10**6, **options) -> Encoded:
    options = Tokenizing(max_length, date="2026-11-26", **options)
    (encoded,) = Encoder(templates.tokenizer(model), options).encode([comparison])
    return encoded


def runs(model: str, encoded: Encoded, n: int = 0) -> list[str]:
    """The texts of an answer's unbroken runs of scored tokens."""
    tok, tokens, mask = templates.tokenizer(model), encoded.answers[n], encoded.scored[n]
    mask = [True] * len(tokens) if mask is None else mask
    assert len(mask) == len(tokens)
    places = [list(places) for scored, places in groupby(range(len(tokens)), lambda at: mask[at]) if scored]
    return [tok.decode([tokens[at] for at in run]) for run in places]


# ------------------------------------------------------------------------------------------------------------- by hand

CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
CALLED = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
FORKED = chat("a: Hello.", "u: And?", "a: Bye.")
ANOTHER = chat("a: Go.")

# case: model, comparison, the prompt, the scored texts of the first answer and of the second, changed
CASES = {
    "ChatML": (
        CHATML, row(chat("u: Hi"), FORKED, ANOTHER), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ["Hello.<|im_end|>", "Bye.<|im_end|>"], ["Go.<|im_end|>"], []),
    "by the template's marks": (
        MARKED, row(chat("u: Hi"), FORKED, ANOTHER), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ["Hello.<|im_end|>", "Bye.<|im_end|>"], ["Go.<|im_end|>"], []),
    "a blank before each answer": (
        MISTRAL, row(chat("u: Hi"), FORKED, ANOTHER), "<s>[INST] Hi[/INST]",
        ["Hello.</s>", "Bye.</s>"], ["Go.</s>"], []),
    "a system message that moves with the last user's": (
        MISTRAL, row(chat("s: Be kind.", "u: Hi"), FORKED, ANOTHER), "<s>[INST] Be kind.\n\nHi[/INST]",
        ["Hello.</s>", "Bye.</s>"], ["Go.</s>"], [FOLDED]),
    "an end of turn that swallows the newline": (
        PHI_3, row(chat("u: Hi"), FORKED, ANOTHER), "<|user|> Hi<|end|><|assistant|>",
        ["Hello.<|end|>", "Bye.<|end|>"], ["Go.<|end|>"], []),
    "plain text": (
        PLAIN, row(chat("u: Hi"), FORKED, ANOTHER), "\n\nHuman: Hi\n\nAssistant:",
        [" Hello.", " Bye.<|endoftext|>"], [" Go.<|endoftext|>"], []),
    "plain text of the data's own": (
        PLAIN,
        Comparison(chat("u: Hi"), [Answer(FORKED, " Hello!\n\nHuman: And?\n\nAssistant: Bye!"),
                   Answer(ANOTHER, " Go!")], [Preference(0, 1)], "\n\nHuman: Hi\n\nAssistant:"),
        "\n\nHuman: Hi\n\nAssistant:",
        [" Hello!", " Bye!<|endoftext|>"], [" Go!<|endoftext|>"], []),
    "tool calls and their results": (
        QWEN_3,
        row(chat("u: Hi"), [*chat("a: Wait."), *chat("t: blue", "a: Blue.")], [{**chat("a: ")[0], "tool_calls": CALL},
            *chat("t: red", "a: Red.")]), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ["Wait.<|im_end|>", "<think>\n\n</think>\n\nBlue.<|im_end|>"],
        [f"{CALLED}<|im_end|>", "<think>\n\n</think>\n\nRed.<|im_end|>"], []),
    "an answer that the template writes otherwise when the dialogue goes on": (
        QWEN_3, row(chat("u: Hi"), FORKED, ANOTHER), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ["Hello.<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"], ["<think>\n\n</think>\n\nGo.<|im_end|>"], []),
    "reasoning before a tool call": (
        QWEN_3,
        row(chat("u: Hi"), [{**chat("a: ")[0], "tool_calls": CALL, "reasoning_content": "Hm."},
            *chat("t: red", "a: Red.")], ANOTHER), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        [f"<think>\nHm.\n</think>\n\n{CALLED}<|im_end|>", "<think>\n\n</think>\n\nRed.<|im_end|>"],
        ["<think>\n\n</think>\n\nGo.<|im_end|>"], []),
    "R1, whose generation prompt is not what it renders": (
        R1, row(chat("u: Hi"), FORKED, ANOTHER), "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>",
        ["Hello.<｜end▁of▁sentence｜>", "Bye.<｜end▁of▁sentence｜>"], ["Go.<｜end▁of▁sentence｜>"], [REWRITTEN]),
    "what follows the assistant's last message": (
        CHATML, row(chat("u: Hi"), [*FORKED, *chat("u: Well")], ANOTHER),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ["Hello.<|im_end|>", "Bye.<|im_end|>"], ["Go.<|im_end|>"], [TRAILING]),
    "a begun answer": (
        CHATML, row(chat("u: Hi", "a: Good"), chat("a:  day.", "u: And?", "a: Bye."), chat("a:  grief.")),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGood",
        [" day.<|im_end|>", "Bye.<|im_end|>"], [" grief.<|im_end|>"], []),
    "answers that begin with the user's turn": (
        CHATML, row(chat("u: Hi", "a: Hello."), chat("u: Sing", "a: La."), chat("u: Go", "a: No.")),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n",
        ["La.<|im_end|>"], ["No.<|im_end|>"], []),
    "plain text: what follows the assistant's last part": (
        PLAIN,
        Comparison(chat("u: Hi"),
                   [Answer([*FORKED, *chat("u: Well")], " A.\n\nHuman: And?\n\nAssistant: B.\n\nHuman: C"),
                    Answer(ANOTHER, " Go!")], [Preference(0, 1)], "\n\nHuman: Hi\n\nAssistant:"),
        "\n\nHuman: Hi\n\nAssistant:", [" A.", " B.<|endoftext|>"], [" Go!<|endoftext|>"], [TRAILING]),
    "plain text: answers that begin with the user's turn": (
        PLAIN, row(chat("u: Hi", "a: Hello."), chat("u: Sing", "a: La."), chat("u: Go", "a: No.")),
        "\n\nHuman: Hi\n\nAssistant: Hello.", [" La.<|endoftext|>"], [" No.<|endoftext|>"], []),
    "already rendered": (
        CHATML,
        Comparison([],
            [Answer(FORKED, "Hello.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBye."),
             Answer(ANOTHER, "Go.<|im_end|>\n")], [Preference(0, 1)],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", rendered=True),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ["Hello.<|im_end|>", "Bye.<|im_end|>"], ["Go.<|im_end|>"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_assistants_tokens_are_scored(case):
    model, comparison, prompt, first, second, changed = CASES[case]
    encoded = encode(model, comparison)
    assert (encoded.left_out, encoded.changed) == ("", changed)
    assert templates.tokenizer(model).decode(encoded.prompt) == prompt
    assert [runs(model, encoded, n) for n in (0, 1)] == [first, second]


MARKS = {
    "the text alone": "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n",
    "as far as the end of turn": "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}",
    "and the newline": "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}",
}


@pytest.mark.parametrize("marks", MARKS)
def test_the_end_of_turn_is_scored_and_nothing_after_it_whatever_the_template_marks(marks):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + MARKS[marks] + "{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Encoder(templates.make(replace(templates.OTHERS[MARKED], template=template)), Tokenizing(10**6))
    assert encoder.encode([row(chat("u: Hi"), FORKED, ANOTHER)]) == [
        encode(MARKED, row(chat("u: Hi"), FORKED, ANOTHER))
    ]


def test_the_templates_marks_decide():
    """This one marks the user's turns too."""
    template = templates.MARKED.replace("{% else %}", "{% else %}{% generation %}").replace(
        "{% endif %}{% endfor", "{% endgeneration %}{% endif %}{% endfor"
    )
    encoder = Encoder(templates.make(replace(templates.OTHERS[MARKED], template=template)), Tokenizing(10**6))
    (encoded,) = encoder.encode([row(chat("u: Hi"), FORKED, ANOTHER)])
    assert runs(MARKED, encoded) == ["Hello.<|im_end|>", "And?<|im_end|>", "Bye.<|im_end|>"]


def test_a_tool_call_may_end_with_another_token_than_text():
    template = (
        templates.chatml()
        .replace("<|im_end|>", "{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}")
        .replace(
            "{{ m.content }}", "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
        )
    )
    shape = replace(templates.STABLELM_2, template=template, more=(*templates.CHATML, "<|eom|>"))
    tok = templates.make(shape)
    calls = [{**chat("a: ")[0], "tool_calls": CALL}, *chat("t: red", "a: Red.")]
    (encoded,) = Encoder(tok, Tokenizing(10**6)).encode([row(chat("u: Hi"), calls, ANOTHER)])
    scored = [token for token, learned in zip(encoded.answers[0], encoded.scored[0], strict=True) if learned]
    assert tok.decode(scored).endswith("}<|eom|>Red.<|im_end|>") and "red" not in tok.decode(scored)


def test_where_the_end_of_a_turn_cannot_be_told_the_row_is_left_out():
    """As above, and the last answer has a beginning that the others have not, so that no shorter dialogue shows it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>' if m.role == 'assistant' and loop.last }}"
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
        "{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    shape = replace(templates.STABLELM_2, template=template, more=(*templates.CHATML, "<|eom|>"))
    calls = [{**chat("a: ")[0], "tool_calls": CALL}, *chat("t: red", "a: Red.")]
    (encoded,) = Encoder(templates.make(shape), Tokenizing(10**6)).encode([row(chat("u: Hi"), calls, ANOTHER)])
    assert encoded.left_out == UNSTABLE


@pytest.mark.parametrize("model", [QWEN_3, MISTRAL, "google/gemma-7b-it", PLAIN])
def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_gives_the_same(model, monkeypatch):
    generator = np.random.default_rng(1)
    rows = [random_row(generator) for _ in range(10)]
    fast = [encode(model, comparison) for comparison in rows]
    monkeypatch.setattr(type(templates.tokenizer(model)), "is_fast", property(lambda _: False))
    assert not templates.tokenizer(model).is_fast
    assert [encode(model, comparison) for comparison in rows] == fast


# case: model, comparison, the kind
LEFT_OUT = {
    "reasoning that is dropped where the dialogue goes on": (
        R1, row(chat("u: Hi"), chat("a: <think>\nHm.\n</think>\n\nHello.", "u: And?", "a: Bye."), ANOTHER), DROPPED),
    "the same as a key": (
        QWEN_3, row(chat("u: Hi"), [{**chat("a: Hello.")[0], "reasoning_content": "Hm."}, *FORKED[1:]], ANOTHER),
        "the chat template ignores reasoning_content of an answer"),
    "a tool's result that is dropped": (
        "HuggingFaceH4/zephyr-7b-beta", row(chat("u: Hi"), chat("a: Wait.", "t: blue", "a: Blue."), ANOTHER),
        "the chat template drops a message of an answer (role tool)"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_cannot_be_found_in_the_dialogue_leaves_the_row_out(case):
    model, comparison, kind = LEFT_OUT[case]
    assert encode(model, comparison).left_out == kind


def test_a_template_that_counts_the_turns_is_refused():
    """No part of its text is the text of a shorter dialogue."""
    shape = replace(templates.STABLELM_2, template="{{ messages | length }}" + templates.chatml())
    encoder = Encoder(templates.make(shape), Tokenizing(10**6))
    (encoded,) = encoder.encode([row(chat("u: Hi"), FORKED, ANOTHER)])
    assert encoded.left_out == UNSTABLE


# --------------------------------------------------------------------------------------- against an obvious slow oracle

IM, EOT = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", r"assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"
INST = r"\[/INST\](.*?</s>)"
SPOKEN = {  # model: its assistant's parts, as a pattern
    "gpt2": r"\n\nAssistant:(.*?)(?=\n\nHuman:|\Z)",
    "microsoft/Phi-3-mini-4k-instruct": r"<\|assistant\|>(.*?<\|end\|>)",
    "meta-llama/Meta-Llama-3-8B-Instruct": EOT,
    "meta-llama/Meta-Llama-3-70B-Instruct": EOT,
    "meta-llama/Llama-3.1-8B-Instruct": EOT,
    "mistralai/Mistral-7B-Instruct-v0.3": INST,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": INST,
    "google/gemma-7b-it": r"<start_of_turn>model\n(.*?<end_of_turn>)",
    "CohereForAI/c4ai-command-r-v01": r"<\|CHATBOT_TOKEN\|>(.*?<\|END_OF_TURN_TOKEN\|>)",
    "HuggingFaceH4/zephyr-7b-beta": r"<\|assistant\|>\n(.*?</s>)",
    R1: r"<｜Assistant｜>(.*?<｜end▁of▁sentence｜>)",
}
WORDS = ["the", "answer", "is", "here", "no", "question", "Max", "went home.", "\n", "1 + 1", "né", "(really)"]


def slow_mask(model: str, encoded: Encoded, n: int) -> list[bool]:
    """Every token whose characters lie in a part that the pattern finds in the whole text."""
    tok, ids = templates.tokenizer(model), encoded.prompt + encoded.answers[n]
    spoken = [match.span(1) for match in re.finditer(SPOKEN.get(model, IM), tok.decode(ids), re.DOTALL)]
    mask = []
    for at in range(len(encoded.prompt), len(ids)):
        # A character may be of two tokens; until the second it is decoded as \ufffd.
        start, stop = (len(tok.decode(ids[:end]).rstrip("\ufffd")) for end in (at, at + 1))
        mask.append(any(start < b and max(stop, start + 1) > a for a, b in spoken))
    return mask


def random_row(generator: np.random.Generator) -> Comparison:
    def text() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(1, 9))).strip() or "yes"

    def turns(first: str, count: int) -> list[dict]:
        roles = ["user", "assistant"] * count
        return [{"role": role, "content": text()} for role in roles[roles.index(first) :][:count]]

    prompt = turns("user", 2 * generator.integers(0, 3) + 1)
    return row(prompt, *(turns("assistant", 2 * generator.integers(0, 3) + 1) for _ in range(2)))


@pytest.mark.parametrize("model", ALL)
def test_scored_tokens_are_those_of_the_oracle(model):
    generator, several = np.random.default_rng(0), 0
    for _ in range(25):
        encoded = encode(model, comparison := random_row(generator))
        assert encoded.left_out == ""
        for n, answer in enumerate(comparison.answers):
            mask = encoded.scored[n] or [True] * len(encoded.answers[n])
            assert mask == slow_mask(model, encoded, n)
            assert (encoded.scored[n] is None) == (len(answer.messages) == 1)
            several += encoded.scored[n] is not None
    assert several > 10


def test_the_oracle_knows_a_wrong_mask():
    encoded = encode(CHATML, row(chat("u: Hi"), FORKED, ANOTHER))
    right = slow_mask(CHATML, encoded, 0)
    assert right == encoded.scored[0] and True in right and False in right
    for at in range(len(right)):
        wrong = [scored ^ (n == at) for n, scored in enumerate(right)]
        assert wrong != right and len({*wrong}) == 2


def test_an_answer_is_cut_with_its_mask():
    whole = encode(CHATML, row(chat("u: Hi"), FORKED, ANOTHER))
    room = len(whole.prompt) + len(whole.answers[0]) - 3
    cut = encode(CHATML, row(chat("u: Hi"), FORKED, ANOTHER), max_length=room)
    assert cut.prompt == whole.prompt and cut.cut_answers == [3, 0]
    assert cut.answers[0] == whole.answers[0][:-3] and cut.scored[0] == whole.scored[0][:-3]
