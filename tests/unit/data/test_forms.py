"""Rows in every form that people bring: what each is read as, and by which kind a row is left out."""

import gzip
import json
from dataclasses import replace

import launching
import layouts
import pytest
from layouts import answer, system, user

from dpo_ds import config
from dpo_ds.data.comparison import Answer, Comparison, LeftOut, Markers, Preference
from dpo_ds.data.dialogue import as_text
from dpo_ds.data.rows import assemble, parts, preferences, ranking
from dpo_ds.data.rows.answers import (
    BEST_FIRST,
    DISAGREE,
    FROM_ZERO,
    LIST_AS_TEXT,
    ONE_ANSWER,
    OTHER_QUESTION,
    RANKS_OR_ORDER,
)
from dpo_ds.data.rows.assemble import NOT_UNICODE
from dpo_ds.data.rows.chats import BEGINNING, DIFFER, NO_PROMPT, OTHER_PROMPT
from dpo_ds.data.rows.dialogues import OTHER_NAMES
from dpo_ds.data.rows.forms import BESIDE, FORMS, WITHOUT_PROMPT, Reading, read_row, require_form
from dpo_ds.data.rows.parts import ANSWERED, BEGUN, REPEATED
from dpo_ds.data.rows.preferences import EMPTY, EQUAL
from dpo_ds.data.rows.rendered import NOT_OPEN
from dpo_ds.data.rows.texts import OPENED_FOR, RENDERED
from dpo_ds.errors import UserError

DATA = launching.ROOT.parent / "shared" / "data"
HH = DATA / "hh-harmless" / "test.jsonl.gz"
FILES = DATA / "forms"
CHATML = Markers(
    frozenset({"<|im_start|>", "<|im_end|>"}), "<|im_start|>assistant\n", closing="<|im_end|>\n", end="<|im_end|>"
)
MISTRAL = Markers(frozenset({"<s>", "</s>"}), " [/INST]", end="</s>")
LLAMA_3 = Markers(
    frozenset({"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}),
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    closing="<|eot_id|>",
    end="<|eot_id|>",
)
UNKNOWN_OPENING = replace(LLAMA_3, opening="")


def read(row, markers=CHATML, **reading) -> Comparison:
    return read_row(row, Reading(markers=markers, **reading))


def left_out(row, **reading) -> str:
    with pytest.raises(LeftOut) as reason:
        read(row, **reading)
    return str(reason.value)


def pair(comparison: Comparison, n: int = 0) -> tuple[list[dict], str, str]:
    """The prompt's messages and one pair's answers, of which each is one message of text."""
    said = []
    for place in (comparison.pairs[n].chosen, comparison.pairs[n].rejected):
        (message,) = comparison.answers[place].messages
        assert message.keys() == {"role", "content"} and message["role"] == "assistant"
        said.append(message["content"])
    return comparison.messages, *said


def plain(comparison: Comparison, n: int = 0) -> tuple[str | None, str | None, str | None]:
    """The same as plain text."""
    preference = comparison.pairs[n]
    return comparison.text, *(comparison.answers[at].text for at in (preference.chosen, preference.rejected))


# ------------------------------------------------------------------------------------------ texts, as they always were

GOOD = {"prompt": "Once", "chosen": " upon a time.", "rejected": " there was."}
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello. \n\nHuman: Sing\n\nAssistant:"
TURNS = [user("Hi"), answer("Hello."), user("Sing")]
CHAT = [system("Be brief."), user("Hi")]
AS_TEXT = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"

TEXTS = {
    "a prompt as text": (GOOD, ("Once", " upon a time.", " there was."), [user("Once")]),
    "a prompt that is a dialogue": (
        {"prompt": DIALOGUE, "chosen": " La.", "rejected": " No."},
        (DIALOGUE, " La.", " No."),
        TURNS,
    ),
    "a dialogue, and answers as messages": (
        {"prompt": DIALOGUE, "chosen": [answer("La.")], "rejected": [answer("No.")]},
        (as_text(TURNS), " La.", " No."),
        TURNS,
    ),
    "whole dialogues: the prompt is not all that they share": (
        {"chosen": DIALOGUE + " La, la.", "rejected": DIALOGUE + " La."},
        (DIALOGUE, " La, la.", " La."),
        TURNS,
    ),
    "what both share, in whole words": (
        {"chosen": "The cat sat on\na warm mat.", "rejected": "The cat sat on\na wall."},
        ("The cat sat on\na", " warm mat.", " wall."),
        [user("The cat sat on\na")],
    ),
    "what both share ends in a line break": (
        {"chosen": "Say it\ntwice\nYes", "rejected": "Say it\ntwice\nNo"},
        ("Say it\ntwice", "\nYes", "\nNo"),
        [user("Say it\ntwice")],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("markers", [None, CHATML])
def test_texts(case, markers):
    row, text, messages = TEXTS[case]
    found = read(row, markers)
    assert plain(found) == text and found.messages == messages
    assert found.implicit == ("what both share" in case) and not found.rendered
    assert pair(found)[1:] == tuple(said.strip() for said in text[1:])


CHATS = {
    "prompt as messages, answers as texts": {"prompt": CHAT, "chosen": "Hello.", "rejected": " Go away."},
    "prompt and answers as messages": {"prompt": CHAT, "chosen": [answer("Hello.")], "rejected": [answer("Go away.")]},
    "answers as single messages": {"prompt": CHAT, "chosen": answer("Hello."), "rejected": answer("Go away.")},
    "one answer as text, one as a message": {"prompt": CHAT, "chosen": "Hello.", "rejected": [answer("Go away.")]},
    "whole chats": {"chosen": [*CHAT, answer("Hello.")], "rejected": [*CHAT, answer("Go away.")]},
    "whole chats that repeat a prompt given as messages": {
        "prompt": CHAT,
        "chosen": [*CHAT, answer("Hello.")],
        "rejected": [*CHAT, answer("Go away.")],
    },
    "whole chats that repeat the end of the prompt": {
        "prompt": CHAT,
        "chosen": [CHAT[1], answer("Hello.")],
        "rejected": [CHAT[1], answer("Go away.")],
    },
    "whole chats that say more than the prompt": {
        "prompt": CHAT[1:],
        "chosen": [*CHAT, answer("Hello.")],
        "rejected": [*CHAT, answer("Go away.")],
    },
    "whole chats that go on from a prompt given as messages": {
        "prompt": CHAT[:1],
        "chosen": [CHAT[1], answer("Hello.")],
        "rejected": [CHAT[1], answer("Go away.")],
    },
    "whole chats beside a prompt as text, as UltraFeedback's": {
        "prompt": "Hi",
        "chosen": [*CHAT, answer("Hello.")],
        "rejected": [*CHAT, answer("Go away.")],
    },
    "whole chats whose copies of the prompt differ in blanks": {
        "chosen": [*CHAT, answer("Hello.")],
        "rejected": [CHAT[0], user("Hi\n"), answer("Go away.")],
    },
    "whole chats beside one of them": {
        "messages": [*CHAT, answer("Hello.")],
        "chosen": [*CHAT, answer("Hello.")],
        "rejected": [*CHAT, answer("Go away.")],
    },
    "whole chats beside null": {
        "prompt": None,
        "chosen": [*CHAT, answer("Hello.")],
        "rejected": [*CHAT, answer("Go away.")],
    },
    "answers beside the whole chosen chat": {
        "messages": [*CHAT, answer("Hello.")],
        "chosen": "Hello.",
        "rejected": "Go away.",
    },
    "a system column": {"system": "Be brief.", "question": "Hi", "chosen": "Hello.", "rejected": "Go away."},
    "a system column beside whole chats": {
        "system_prompt": "Be brief.",
        "chosen": [CHAT[1], answer("Hello.")],
        "rejected": [CHAT[1], answer("Go away.")],
    },
    "a system column that says the same": {
        "system": "Be brief. ",
        "prompt": CHAT,
        "chosen": "Hello.",
        "rejected": "Go away.",
    },
    "JSON text": {
        "prompt": json.dumps(CHAT),
        "chosen": json.dumps([answer("Hello.")]),
        "rejected": json.dumps([answer("Go away.")]),
    },
    "whole chats as JSON text": {
        "chosen": json.dumps([*CHAT, answer("Hello.")]),
        "rejected": json.dumps([*CHAT, answer("Go away.")]),
    },
    "whole chats as Python writes them, as a CSV has": {
        "chosen": str([*CHAT, answer("Hello.")]),
        "rejected": str([*CHAT, answer("Go away.")]),
    },
    "columns in other cases": {
        "System-Prompt": "Be brief.",
        "Question": "Hi",
        "Chosen": "Hello.",
        "Rejected": "Go away.",
    },
}


@pytest.mark.parametrize("form", CHATS)
def test_chats(form):
    found = read(CHATS[form])
    assert found.messages == CHAT and pair(found)[1:] == ("Hello.", "Go away.")
    assert plain(found) == (AS_TEXT, " Hello.", " Go away.") and not found.implicit


@pytest.mark.parametrize("prompt", ["Write code.", [user("Write code.")], "\n\nHuman: Write code.\n\nAssistant:"])
def test_an_answer_keeps_the_indent_of_its_first_line(prompt):
    assert pair(read({"prompt": prompt, "chosen": "    return 1", "rejected": " No."}))[1:] == ("    return 1", "No.")
    given = {"prompt": [user("p")], "chosen": [answer("\treturn 1\n")], "rejected": [answer(" No.")]}
    assert pair(read(given))[1:] == ("\treturn 1\n", " No.")


TURNS_OF = [
    ("User", "Assistant"),
    ("USER", "ASSISTANT"),
    ("### Human", "### Assistant"),
    ("Human", "AI"),
    ("User", "Bot"),
    ("H", "A"),
]


@pytest.mark.parametrize(("asker", "name"), TURNS_OF)
@pytest.mark.parametrize("between", ["\n", "\n\n"])
def test_a_dialogue_whose_turns_have_other_names_is_read_as_hh(asker, name, between):
    start = f"{asker}: Hi{between}{name}: Hello.{between}{asker}: Sing"
    names = [name.removeprefix("### ") for name in (asker, name)]
    kind = OTHER_NAMES.format(*(name.capitalize() if len(name) != 2 else name for name in names))
    for row in (
        {"prompt": f"{start}{between}{name}:", "chosen": " La.", "rejected": " No."},
        {"prompt": start, "chosen": "La.", "rejected": "No."},
        {"prompt": start, "chosen": f"{name}: La.", "rejected": f"{name}: No."},
        {"chosen": f"{start}{between}{name}: La.", "rejected": f"{start}{between}{name}: No."},
        {"prompt": "Hi", "chosen": f"{start}{between}{name}: La.", "rejected": f"{start}{between}{name}: No."},
    ):
        found = read(row)
        assert pair(found) == (TURNS, "La.", "No.") and kind in found.changed, row
        assert OTHER_NAMES.split("{")[0] not in str(read(row, None).changed)  # plain text is learned as it is


@pytest.mark.parametrize(
    "prose",
    [
        "H: hydrogen\nHe: helium",
        "Here is a list.\nA: apples",
        "User: root",
        "User: a\nUser: b\nAssistant: c",
        "A: yes\nH: no",
        "Assistant: Hi\nUser: Hello",
        "Fix this.\nUser: Hi\nAssistant: Hello",
        "USER: Hi ASSISTANT: Hello",
        "h: 3\na: 4",
    ],
)
def test_other_text_is_no_dialogue(prose):
    assert pair(read({"prompt": prose, "chosen": "x", "rejected": "y"})) == ([user(prose)], "x", "y")


def test_an_answer_that_is_a_dialogue_is_one_answer():
    said = ["User: Tea?\nAssistant: Yes.", "User: Tea?\nAssistant: No."]
    row = {"prompt": "Write a dialogue.", "chosen": said[0], "rejected": said[1]}
    assert pair(read(row)) == ([user("Write a dialogue.")], *said)


def test_a_prompt_as_text_with_answers_as_messages():
    found = read({"prompt": "Hi", "chosen": [answer("Hello.")], "rejected": [answer("No.")]})
    assert found.messages == [user("Hi")] and plain(found) == (as_text([user("Hi")]), " Hello.", " No.")


# ------------------------------------------------------------------------------------------------------ the whole table


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.columns)
def test_each_form_reads_its_example(form):
    messages, chosen, rejected = pair(read(form.example))
    assert [" ".join(message["content"].split()) for message in messages] == ["Say hello."]
    assert (chosen, rejected) == ("Hello!", "No.")
    require_form([*form.example], Reading())
    assert not read(form.example).unused


@pytest.mark.parametrize(("answers", "prompt", "example"), WITHOUT_PROMPT)
def test_each_way_to_find_a_prompt_reads_its_example(answers, prompt, example):
    assert pair(read(example)) == ([user("Say hello.")], "Hello!", "No.")
    assert read(example).implicit == (answers == "other text"), prompt


@pytest.mark.parametrize(("columns", "meaning", "example"), BESIDE)
def test_each_column_beside_them_is_used(columns, meaning, example):
    found = read(example)
    assert not found.unused and found.messages[-1] == user("Say hello.") and pair(found)[1:] == ("Hello!", "No.")
    without = {name: value for name, value in example.items() if f"`{name}`" not in columns}
    assert len(without) < len(example) and replace(read(without), unused=[]) != found, meaning


@pytest.mark.parametrize("name", layouts.LAYOUTS)
@pytest.mark.parametrize("n", [0, 1, 9])
def test_public_layouts(name, n):
    made = layouts.LAYOUTS[name](n)
    found = read(made.row)
    assert pair(found) == (made.messages, made.chosen, made.rejected)
    assert len(found.pairs) == 1 and len(found.answers) == 2 and not found.implicit
    safe = [OTHER_QUESTION.format("better_response_id", "safer_response_id")] if name == "PKU-SafeRLHF" else []
    assert found.changed == safe
    require_form([*made.row], Reading())


def test_what_public_layouts_do_not_use_is_named():
    assert read(layouts.ultrafeedback_binarized(1).row).unused == ["column prompt_id", "column messages"]
    assert read(layouts.orca_dpo_pairs(1).row).unused == []
    unused = {*read(layouts.ultrafeedback(1).row).unused}
    assert {
        "column source",
        "column models",
        "key critique of completions",
        "key fine-grained_score of completions",
    } < unused
    assert "column instruction" not in unused and "key response of completions" not in unused


def test_margins_of_public_layouts():
    margins = {name: read(made(1).row).pairs[0].margin for name, made in layouts.LAYOUTS.items()}
    assert {name: margin for name, margin in margins.items() if margin is not None} == {
        "UltraFeedback binarized": pytest.approx(3.1), "UltraFeedback": 7.0, "Nectar": 6.0, "SHP": 26.0,
        "HelpSteer3": 2.0, "Argilla's UltraFeedback": 2.5,
    }  # fmt: skip


# ----------------------------------------------------------------------------- the cases of shared/data/forms, and more

WEATHER = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
HEADERS = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>" + LLAMA_3.opening
REASONED = "<think>\n{}\n</think>\n\n{}"

# file: (template's markers, for each of its first rows: prompt's messages, chosen, rejected, and more fields)
CASES = {
    "01_r1_reasoning": (
        CHATML,
        [
            (
                [user("2+2?")],
                answer(REASONED.format("Two and two make four.", 4)),
                answer(REASONED.format("Let me guess five.", 5)),
                {},
            ),
        ],
    ),
    "01b_r1_same_answer": (
        CHATML,
        [
            (
                [user("2+0?")],
                answer(REASONED.format("short 0", 4)),
                answer(REASONED.format("long and winding 0", 4)),
                {},
            ),
        ],
    ),
    "02_reasoning_content": (
        CHATML,
        [
            (
                [user("2+2?")],
                {**answer("4"), "reasoning_content": "Two and two make four."},
                {**answer("5"), "reasoning_content": "guess"},
                {},
            ),
        ],
    ),
    "03_prerendered_chatml": (
        CHATML,
        [
            (
                None,
                answer("Hello.<|im_end|>"),
                answer("Go.<|im_end|>"),
                {"rendered": True, "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
            ),
        ],
    ),
    "03b_prerendered_inst": (
        MISTRAL,
        [
            (
                None,
                answer("hi nice to meet you</s>"),
                answer("leave me alone</s>"),
                {"rendered": True, "text": "<s>[INST] hello [/INST]"},
            ),
        ],
    ),
    "03d_prerendered_whole": (
        LLAMA_3,
        [
            (None, answer("Hello.<|eot_id|>"), answer("Go away.<|eot_id|>"), {"rendered": True, "text": HEADERS}),
        ],
    ),
    "04_orca_columns": (
        CHATML,
        [
            (
                [system("You are an assistant."), user(f"What is {n}+{n}?")],
                answer(f"The answer is {2 * n}."),
                answer(f"The answer is {2 * n + 1}."),
                {"unused": []},
            )
            for n in (1, 2, 3, 4)
        ],
    ),
    "04b_llamafactory_alpaca": (
        CHATML,
        [
            (
                [user("What is 1+1?")],
                answer("Sure! Here is the answer: 2."),
                answer("Sure! Here is the answer: 3."),
                {},
            ),
        ],
    ),
    "04c_messages_column_str_answers": (
        CHATML,
        [([user("How are you?")], answer("I am fine"), answer("I am bad"), {})],
    ),
    "05_system_column": (
        CHATML,
        [
            ([system("Answer in French."), user("Hi")], answer("Bonjour"), answer("Hello"), {"unused": []}),
        ],
    ),
    "06_tool_calls": (
        CHATML,
        [
            (
                [system("You are helpful."), user("Weather in Paris?")],
                {**answer("Let me look."), "tool_calls": WEATHER},
                answer("I cannot."),
                {"tools": [TOOL]},
            ),
        ],
    ),
    "06b_tool_call_turn_without_tool_role": (
        CHATML,
        [
            (
                [user("Weather?"), {**answer(""), "tool_calls": WEATHER}, user("the tool said sunny")],
                answer("Sunny."),
                answer("I cannot."),
                {"tools": None, "text": None},
            ),
        ],
    ),
    "06c_tool_role": (
        CHATML,
        [
            (
                [
                    user("Weather?"),
                    {"role": "assistant", "content": None, "tool_calls": WEATHER},
                    {"role": "tool", "name": "get_weather", "content": "sunny"},
                ],
                answer("Sunny."),
                answer("I cannot."),
                {"tools": [TOOL], "text": None},
            ),
        ],
    ),
    "06d_chosen_is_a_tool_call": (
        CHATML,
        [
            ([user("Weather?")], {**answer(""), "tool_calls": WEATHER}, answer("I cannot."), {"tools": [TOOL]}),
        ],
    ),
    "07_json_strings": (CHATML, [([user("Hi")], answer("Hello"), answer("Go"), {"implicit": False})]),
    "09_implicit_prompts_leak": (
        None,
        [
            ([user("Q: what is item 0?\nA: It is")], answer("blue and big."), answer("red."), {"implicit": True}),
            ([user("Q: what is item 0?\nA:")], answer("Blue it is."), answer("No idea."), {"implicit": True}),
        ],
    ),
    "09b_blank_variants_leak": (
        LLAMA_3,
        [
            ([user("Item 0?")], answer("a1"), answer("b1"), {}),
            ([user("Item 0? ")], answer("a2"), answer("b2"), {}),
        ],
    ),
    "10_prefill": (
        CHATML,
        [
            (
                [user("Write code"), answer("Sure, here is")],
                answer(" the code: x=1"),
                answer(" nothing"),
                {"changed": [BEGUN], "text": "\n\nHuman: Write code\n\nAssistant: Sure, here is"},
            ),
        ],
    ),
    "11_prompt_repeated_as_text": (
        None,
        [
            (
                [user("Hi")],
                answer("Hello"),
                answer("Go"),
                {"text": "\n\nHuman: Hi\n\nAssistant:", "changed": [REPEATED]},
            ),
        ],
    ),
    "11b_prompt_repeated_plain": (
        CHATML,
        [
            ([user("What is 2+2?")], answer("It is 4."), answer("It is 5."), {"changed": [REPEATED]}),
        ],
    ),
    "12_null_prompt_beside_whole_chats": (
        CHATML,
        [
            ([user("Hi")], answer("Hello"), answer("Go"), {}),
            ([user("Hey")], answer("Hello 0"), answer("Go"), {}),
        ],
    ),
    "13_stripped_hh": (
        CHATML,
        [([user("Hi")], answer("Hello"), answer("Go"), {"text": "\n\nHuman: Hi\n\nAssistant:"})],
    ),
    "14_sharegpt": (CHATML, [([user("Hi")], answer("Hello"), answer("Go"), {})]),
    "14b_messages_and_dicts": (CHATML, [([user("Hi")], answer("Hello"), answer("Go"), {})]),
    "14d_content_parts": (CHATML, [([user("Hi")], answer("Hello"), answer("Go"), {})]),
    "14e_human_assistant_roles": (CHATML, [([user("Hi")], answer("Hello"), answer("Go"), {})]),
}


def require_read(found: Comparison, messages, chosen, rejected, more: dict) -> None:
    assert messages is None or found.messages == messages
    assert [(p.chosen, p.rejected) for p in found.pairs] == [(0, 1)]
    assert [a.messages for a in found.answers] == [[chosen], [rejected]]
    assert {name: getattr(found, name) for name in more} == more
    if found.rendered:
        assert RENDERED in found.changed and [a.text for a in found.answers] == [chosen["content"], rejected["content"]]


@pytest.mark.skipif(not FILES.is_dir(), reason=f"{FILES} is not here")
@pytest.mark.parametrize("name", CASES)
def test_the_forms_that_went_wrong(name):
    markers, expected = CASES[name]
    rows = [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) >= len(expected)
    for row, wanted in zip(rows, expected, strict=False):
        require_read(read(row, markers), *wanted)
    for row in rows:
        read(row, markers)


@pytest.mark.skipif(not FILES.is_dir(), reason=f"{FILES} is not here")
def test_every_file_of_forms_is_looked_at():
    files = {file.stem for file in FILES.glob("*.jsonl")}
    assert files - {*CASES} == {"08_long_rejected"}, "whose answer is cut by the encoder"


HELLO_GO = (answer("Hello"), answer("Go"))
MORE = {
    "01: reasoning, then a tool call": (
        CHATML,
        {
            "prompt": [user("2+2?")],
            "chosen": [{**answer("<think>\nadd\n</think>\n\n"), "tool_calls": WEATHER}],
            "rejected": [answer("5")],
        },
        [user("2+2?")],
        {**answer("<think>\nadd\n</think>\n\n"), "tool_calls": WEATHER},
        answer("5"),
        {},
    ),
    "01: reasoning in whole chats": (
        CHATML,
        {
            "chosen": [user("2+2?"), answer("<think>a</think>4")],
            "rejected": [user("2+2?"), answer("<think>b</think>4")],
        },
        [user("2+2?")],
        answer("<think>a</think>4"),
        answer("<think>b</think>4"),
        {},
    ),
    "02: thinking": (
        CHATML,
        {
            "prompt": "2+2?",
            "chosen": [{**answer("4"), "thinking": "add"}],
            "rejected": [{**answer("4"), "thinking": None}],
        },
        [user("2+2?")],
        {**answer("4"), "thinking": "add"},
        answer("4"),
        {},
    ),
    "02: reasoning alone, in earlier turns too": (
        CHATML,
        {
            "messages": [user("a"), {**answer("b"), "reasoning": "r"}, user("c")],
            "chosen": {"role": "assistant", "content": None, "reasoning_content": "so"},
            "rejected": answer("d"),
        },
        [user("a"), {**answer("b"), "reasoning": "r"}, user("c")],
        {"role": "assistant", "content": None, "reasoning_content": "so"},
        answer("d"),
        {"text": None},
    ),
    "03: the header stands in the answers": (
        CHATML,
        {
            "prompt": "<|im_start|>user\nHi<|im_end|>\n",
            "chosen": "<|im_start|>assistant\nHello",
            "rejected": "<|im_start|>assistant\nGo",
        },
        None,
        *HELLO_GO,
        {"rendered": True, "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
    ),
    "03: the prompt is repeated": (
        CHATML,
        {
            "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "chosen": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello",
            "rejected": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGo",
        },
        None,
        *HELLO_GO,
        {"rendered": True, "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
    ),
    "03: nothing opens the answers": (
        CHATML,
        {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "chosen": "Hello", "rejected": "Go"},
        None,
        *HELLO_GO,
        {
            "rendered": True,
            "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "changed": [RENDERED, OPENED_FOR],
        },
    ),
    "03: the same after another answer, without the last line break": (
        CHATML,
        {
            "prompt": "<|im_start|>assistant\nWhat?<|im_end|>\n<|im_start|>user\nHi<|im_end|>",
            "chosen": answer("Hello"),
            "rejected": answer("Go"),
        },
        None,
        *HELLO_GO,
        {
            "rendered": True,
            "text": "<|im_start|>assistant\nWhat?<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        },
    ),
    "03: the opening without its line breaks": (
        LLAMA_3,
        {"prompt": HEADERS.rstrip(), "chosen": "Hello", "rejected": "Go"},
        None,
        *HELLO_GO,
        {"rendered": True, "text": HEADERS, "changed": [RENDERED, OPENED_FOR]},
    ),
    "03: an answer is begun": (
        CHATML,
        {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,", "chosen": "Hello", "rejected": "Go"},
        None,
        *HELLO_GO,
        {
            "rendered": True,
            "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,",
            "changed": [RENDERED],
        },
    ),
    "03: a begun answer where the template ends none": (
        Markers(frozenset({"<b>"}), "<a>"),
        {"prompt": "<b>Hi<a>Well,", "chosen": "Hello", "rejected": "Go"},
        None,
        *HELLO_GO,
        {"rendered": True, "text": "<b>Hi<a>Well,", "changed": [RENDERED]},
    ),
    "03: the prompt without its opening is repeated": (
        CHATML,
        {
            "prompt": "<|im_start|>user\nHi<|im_end|>\n",
            "chosen": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello",
            "rejected": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGo",
        },
        None,
        *HELLO_GO,
        {"rendered": True, "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
    ),
    "03b: without BOS": (
        MISTRAL,
        {"prompt": "[INST] Hi [/INST]", "chosen": "Hello", "rejected": "Go"},
        None,
        *HELLO_GO,
        {"rendered": True, "text": "[INST] Hi [/INST]"},
    ),
    "03b: whole": (
        MISTRAL,
        {"chosen": "<s>[INST] Hi [/INST]Hello", "rejected": "<s>[INST] Hi [/INST]Go"},
        None,
        *HELLO_GO,
        {"rendered": True, "text": "<s>[INST] Hi [/INST]"},
    ),
    "03d: it is not known what opens an answer": (
        UNKNOWN_OPENING,
        {"chosen": HEADERS + "Hello", "rejected": HEADERS + "Go"},
        None,
        *HELLO_GO,
        {"rendered": True, "text": HEADERS},
    ),
    "03d: the same, and the answers begin alike": (
        UNKNOWN_OPENING,
        {
            "chosen": HEADERS + "It is a dog",
            "rejected": HEADERS + "It is a cat",
        },
        None,
        answer("It is a dog"),
        answer("It is a cat"),
        {"rendered": True, "text": HEADERS},
    ),
    "03d: several turns": (
        LLAMA_3,
        {
            "chosen": HEADERS + "Yes?<|eot_id|>" + HEADERS + "Hello",
            "rejected": HEADERS + "Yes?<|eot_id|>" + HEADERS + "Go",
        },
        None,
        *HELLO_GO,
        {"rendered": True, "text": HEADERS + "Yes?<|eot_id|>" + HEADERS},
    ),
    "03: a prompt that asks about a token": (
        CHATML,
        {"prompt": "What is <|im_end|> for?", "chosen": "Hello", "rejected": "Go"},
        [user("What is <|im_end|> for?")],
        *HELLO_GO,
        {"rendered": False},
    ),
    "03: answers that end in EOS": (
        MISTRAL,
        {"prompt": "Hi", "chosen": "Hello</s>", "rejected": "Go</s>"},
        [user("Hi")],
        answer("Hello</s>"),
        answer("Go</s>"),
        {"rendered": False},
    ),
    "03: a template that writes as people do": (
        Markers(frozenset({"</s>"}), "\n\nAssistant:"),
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go"},
        [user("Hi")],
        *HELLO_GO,
        {"rendered": False},
    ),
    "04: HelpSteer2's turns": (
        CHATML,
        {"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nHi", "chosen": "Hello", "rejected": "Go"},
        [user("a"), answer("b"), user("Hi")],
        *HELLO_GO,
        {"text": as_text([user("a"), answer("b"), user("Hi")])},
    ),
    "04: query": (
        CHATML,
        {"query": "Hi", "chosen": "The one", "rejected": "The other"},
        [user("Hi")],
        answer("The one"),
        answer("The other"),
        {"implicit": False},
    ),
    "04: a prompt that is empty beside a question": (
        CHATML,
        {"prompt": "", "question": "Hi", "chosen": "Hello", "rejected": "Go"},
        [user("Hi")],
        *HELLO_GO,
        {},
    ),
    "04b: an input": (
        CHATML,
        {"instruction": "Add.", "input": "1 1", "output": None, "chosen": "Hello", "rejected": "Go"},
        [user("Add.\n1 1")],
        *HELLO_GO,
        {"unused": []},
    ),
    "04b: with history and system": (
        CHATML,
        {
            "instruction": "c",
            "input": "",
            "history": [["a", "b"]],
            "system": "s",
            "chosen": "Hello",
            "rejected": "Go",
        },
        [system("s"), user("a"), answer("b"), user("c")],
        *HELLO_GO,
        {"unused": []},
    ),
    "04c: a dialogue as text in `conversation`": (
        CHATML,
        {"conversation": "Human: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "Go"},
        [user("Hi")],
        *HELLO_GO,
        {},
    ),
    "05: an empty system column": (
        CHATML,
        {"system": "", "prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        [user("Hi")],
        *HELLO_GO,
        {"unused": [], "text": "Hi"},
    ),
    "05: before a dialogue as text": (
        None,
        {"system": "s", "prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go"},
        [system("s"), user("Hi")],
        *HELLO_GO,
        {"text": "\n\nSystem: s\n\nHuman: Hi\n\nAssistant:"},
    ),
    "06: everything as JSON text": (
        CHATML,
        {
            "prompt": json.dumps([user("Weather?")]),
            "tools": json.dumps([TOOL["function"]]),
            "chosen": [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": json.dumps(
                        [
                            {
                                "id": "1",
                                "type": "function",
                                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                            }
                        ]
                    ),
                }
            ],
            "rejected": "I cannot.",
        },
        [user("Weather?")],
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **WEATHER[0]}]},
        answer("I cannot."),
        {"tools": [TOOL]},
    ),
    "06: nulls where another row has keys": (
        CHATML,
        {
            "prompt": [{**user("Weather?"), "tool_calls": None, "name": None}],
            "tools": [{**TOOL, "strict": None}],
            "chosen": [{**answer("Hello"), "tool_calls": None}],
            "rejected": [answer("Go")],
        },
        [user("Weather?")],
        *HELLO_GO,
        {"tools": [TOOL]},
    ),
    "06: LLaMA-Factory's roles": (
        CHATML,
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
                {"from": "observation", "value": "sunny"},
            ],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go"},
        },
        [
            user("Weather?"),
            {"role": "assistant", "content": None, "tool_calls": WEATHER},
            {"role": "tool", "content": "sunny"},
        ],
        *HELLO_GO,
        {},
    ),
    "06: tools in OpenAI's input": (
        CHATML,
        {
            "input": {"messages": [user("Weather?")], "tools": [TOOL]},
            "preferred_output": answer("Hello"),
            "non_preferred_output": answer("Go"),
        },
        [user("Weather?")],
        *HELLO_GO,
        {"tools": [TOOL]},
    ),
    "07: JSON text beside a plain prompt": (
        CHATML,
        {
            "prompt": "Hi",
            "chosen": json.dumps([user("Hi"), answer("Hello")]),
            "rejected": json.dumps([user("Hi"), answer("Go")]),
        },
        [user("Hi")],
        *HELLO_GO,
        {},
    ),
    "07: answers that are JSON, but no messages": (
        CHATML,
        {"prompt": "Hi", "chosen": "[1, 2]", "rejected": '{"role": "king"}'},
        [user("Hi")],
        answer("[1, 2]"),
        answer('{"role": "king"}'),
        {},
    ),
    "10: begun in a dialogue as text": (
        CHATML,
        {"prompt": "\n\nHuman: Write\n\nAssistant: Sure, ", "chosen": "yes", "rejected": "no"},
        [user("Write"), answer("Sure, ")],
        answer("yes"),
        answer("no"),
        {"changed": [BEGUN], "text": "\n\nHuman: Write\n\nAssistant: Sure, "},
    ),
    "10: a whole answer at the end of a dialogue": (
        CHATML,
        {"messages": [user("Hi"), answer("Good morning to you.")], "chosen": "Hello", "rejected": "Go"},
        [user("Hi")],
        *HELLO_GO,
        {"changed": [ANSWERED]},
    ),
    "10: the same with answers as messages": (
        CHATML,
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good day "}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go"},
        },
        [user("Hi")],
        *HELLO_GO,
        {"changed": [ANSWERED]},
    ),
    "10: the same as text": (
        None,
        {"conversation": "Human: Hi\n\nAssistant: Good morning.", "chosen": "Hello", "rejected": "Go"},
        [user("Hi")],
        *HELLO_GO,
        {"changed": [ANSWERED], "text": "\n\nHuman: Hi\n\nAssistant:"},
    ),
    "10: a dialogue as text that ends in one of the answers": (
        None,
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello", "chosen": "Hello", "rejected": "Go"},
        [user("Hi")],
        *HELLO_GO,
        {"changed": [REPEATED], "text": "\n\nHuman: Hi\n\nAssistant:"},
    ),
    "10: begun within a word's reach": (
        CHATML,
        {"messages": [user("Write"), answer("Sure, here is")], "chosen": " the code", "rejected": " nothing"},
        [user("Write"), answer("Sure, here is")],
        answer(" the code"),
        answer(" nothing"),
        {"changed": [BEGUN]},
    ),
    "10: whatever a prompt ends with is continued": (
        CHATML,
        {"prompt": [user("Write"), answer("Done.")], "chosen": "Yes", "rejected": "No"},
        [user("Write"), answer("Done.")],
        answer("Yes"),
        answer("No"),
        {"changed": [BEGUN]},
    ),
    "10: begun in a column of messages": (
        CHATML,
        {
            "messages": [user("Write"), answer("Sure, ")],
            "chosen": "yes ",
            "rejected": answer("no"),
        },
        [user("Write"), answer("Sure, ")],
        answer("yes "),
        answer("no"),
        {"changed": [BEGUN]},
    ),
    "11: a dialogue beside its question": (
        CHATML,
        {
            "prompt": "Hi",
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go",
        },
        [user("Hi")],
        *HELLO_GO,
        {"changed": []},
    ),
    "11: dialogues as text beside a prompt as messages with a system message": (
        CHATML,
        {
            "prompt": [system("s"), user("Hi")],
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go",
        },
        [system("s"), user("Hi")],
        *HELLO_GO,
        {"changed": []},
    ),
    "11: a prompt as messages": (
        CHATML,
        {
            "prompt": [user("What is 2+2?")],
            "chosen": "What is 2+2? Hello",
            "rejected": "What is 2+2? Go",
        },
        [user("What is 2+2?")],
        *HELLO_GO,
        {"changed": [REPEATED]},
    ),
    "11: answers that open their turn": (
        None,
        {
            "prompt": "\n\nHuman: Hi",
            "chosen": "\n\nAssistant: Hello",
            "rejected": "\n\nAssistant: Go",
        },
        [user("Hi")],
        *HELLO_GO,
        {"text": "\n\nHuman: Hi\n\nAssistant:"},
    ),
    "11b: one answer alone repeats it": (
        CHATML,
        {"prompt": "What is 2+2?", "chosen": "What is 2+2? It is 4.", "rejected": "It is 5."},
        [user("What is 2+2?")],
        answer("What is 2+2? It is 4."),
        answer("It is 5."),
        {"changed": []},
    ),
    "11b: a greeting that both return": (
        CHATML,
        {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi. Go."},
        [user("Hi")],
        answer("Hi there!"),
        answer("Hi. Go."),
        {"changed": []},
    ),
    "11b: a word of the answers begins as the prompt ends": (
        CHATML,
        {"prompt": "one two three four", "chosen": "one two three fourteen", "rejected": "one two three fourty"},
        [user("one two three four")],
        answer("one two three fourteen"),
        answer("one two three fourty"),
        {"changed": []},
    ),
    "11b: in Chinese": (
        CHATML,
        {"prompt": "今天天气怎么样？", "chosen": "今天天气怎么样？好。", "rejected": "今天天气怎么样？坏。"},
        [user("今天天气怎么样？")],
        answer("好。"),
        answer("坏。"),
        {"changed": [REPEATED]},
    ),
    "12: null messages beside dialogues as text": (
        CHATML,
        {
            "messages": None,
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go",
        },
        [user("Hi")],
        *HELLO_GO,
        {},
    ),
    "12: null in all columns of another form": (
        CHATML,
        {
            "question": None,
            "responses": None,
            "scores": None,
            "prompt": "Hi",
            "chosen": "Hello",
            "rejected": "Go",
        },
        [user("Hi")],
        *HELLO_GO,
        {"unused": []},
    ),
    "13: as a prompt": (
        CHATML,
        {"prompt": "Human: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go"},
        [user("Hi")],
        *HELLO_GO,
        {"text": "\n\nHuman: Hi\n\nAssistant:"},
    ),
    "13: with single line breaks and more turns": (
        CHATML,
        {
            "chosen": "Human: Hi\nAssistant: Yes?\nHuman: Go\nAssistant: Hello",
            "rejected": "Human: Hi\nAssistant: Yes?\nHuman: Go\nAssistant: Go",
        },
        [user("Hi"), answer("Yes?"), user("Go")],
        *HELLO_GO,
        {},
    ),
    "14: from and value in the answers' lists": (
        CHATML,
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi"}],
            "chosen": [{"from": "gpt", "value": "Hello"}],
            "rejected": [{"from": "gpt", "value": "Go"}],
        },
        [system("s"), user("Hi")],
        *HELLO_GO,
        {},
    ),
    "14: turns as objects": (
        CHATML,
        {
            "conversation": [{"human": "a", "assistant": "b"}, {"human": "Hi", "assistant": None}],
            "chosen": "Hello",
            "rejected": "Go",
        },
        [user("a"), answer("b"), user("Hi")],
        *HELLO_GO,
        {},
    ),
    "14: messages as `datasets` has its sequences": (
        CHATML,
        {
            "conversations": {"from": ["human"], "value": ["Hi"]},
            "chosen": {"role": ["assistant"], "content": ["Hello"]},
            "rejected": {"role": ["assistant"], "content": ["Go"]},
        },
        [user("Hi")],
        *HELLO_GO,
        {},
    ),
    "14b: whole chats with ids in the messages": (
        CHATML,
        {
            "chosen": [{**user("Hi"), "id": 1}, {**answer("Hello"), "id": 2}],
            "rejected": [{**user("Hi"), "id": 3}, {**answer("Go"), "id": 4}],
        },
        [user("Hi")],
        *HELLO_GO,
        {"unused": ["message key id"]},
    ),
    "14d: several parts of text": (
        CHATML,
        {
            "prompt": [{"type": "text", "text": "Hi"}],
            "chosen": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Go", "image": None}]}],
        },
        [user("Hi")],
        *HELLO_GO,
        {},
    ),
    "14e: other names": (
        CHATML,
        {
            "prompt": [{"role": "Developer", "content": "s"}, {"role": "prompter", "content": "Hi"}],
            "chosen": [{"role": "bot", "content": "Hello"}],
            "rejected": [{"role": "MODEL", "content": "Go"}],
        },
        [system("s"), user("Hi")],
        *HELLO_GO,
        {},
    ),
}


@pytest.mark.parametrize("case", MORE)
def test_more_of_each_kind(case):
    markers, row, *expected = MORE[case]
    require_read(read(row, markers), *expected)


# --------------------------------------------------------------------------------------------------------- trajectories


def test_dialogues_that_go_on_after_their_answers_differ():
    chosen = [user("a"), answer("b"), user("c"), answer("d")]
    rejected = [user("a"), answer("x"), user("y"), answer("z"), user("thanks")]
    found = read({"chosen": chosen, "rejected": rejected})
    assert found.messages == [user("a")] and found.implicit and found.changed == [parts.TAIL]
    assert found.answers == [Answer(chosen[1:], None), Answer(rejected[1:4], None)]


def test_an_agents_trajectories():
    call = {"role": "assistant", "content": None, "tool_calls": WEATHER}
    tool = {"role": "tool", "content": "sunny"}
    found = read({"prompt": "Weather?", "chosen": [call, tool, answer("Sunny.")], "rejected": [answer("I cannot.")]})
    assert found.messages == [user("Weather?")] and not found.implicit
    assert [a.messages for a in found.answers] == [[call, tool, answer("Sunny.")], [answer("I cannot.")]]
    both = read(
        {
            "chosen": [user("Weather?"), call, tool, answer("Sunny.")],
            "rejected": [user("Weather?"), call, tool, answer("Bad.")],
        }
    )
    assert both.messages == [user("Weather?"), call, tool] and both.answers[1].messages == [answer("Bad.")]


def test_dialogues_as_text_that_go_on():
    start = "\n\nHuman: a\n\nAssistant:"
    found = read({"chosen": start + " b\n\nHuman: c\n\nAssistant: d", "rejected": start + " x"})
    assert found.messages == [user("a")] and found.implicit
    assert [a.messages for a in found.answers] == [[answer("b"), user("c"), answer("d")], [answer("x")]]


def test_lists_of_turns_as_the_arenas_55k():
    row = {"prompt": '["a", "c"]', "response_a": '["b", "d"]', "response_b": '["x", "z"]', "winner_model_a": 0,
           "winner_model_b": 1, "winner_tie": 0}  # fmt: skip
    found = read(row)
    assert found.messages == [user("a")] and not found.unused
    assert [a.messages for a in found.answers] == [
        [answer("x"), user("c"), answer("z")],
        [answer("b"), user("c"), answer("d")],
    ]


# ------------------------------------------------------------------------------------------------------ several answers

SCORED = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [3, 9, 1, 9]}


def better(comparison: Comparison) -> list[tuple[str, str, float | None]]:
    said = [a.messages[0]["content"] for a in comparison.answers]
    return [(said[p.chosen], said[p.rejected], p.margin) for p in comparison.pairs]


CHOICES = {
    "best_worst": [("b", "c", 8)],
    "all": [("b", "a", 6), ("b", "c", 8), ("d", "a", 6), ("d", "c", 8), ("a", "c", 2)],
    "adjacent": [("b", "a", 6), ("d", "a", 6), ("a", "c", 2)],
    "above_margin": [("b", "c", 8), ("d", "c", 8)],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_pairs_of_several_answers(choice):
    found = read(SCORED, pairs=choice, min_margin=7)
    assert better(found) == CHOICES[choice]
    assert found.changed == ([ranking.TIED] if choice != "best_worst" else [])
    used = {place for p in found.pairs for place in (p.chosen, p.rejected)}
    assert used == {*range(len(found.answers))}, "an answer in no pair is not kept"


SEVERAL = {
    "ranks: 1 is the best": {"responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
    "scores as text, as CSV has them": {"responses": '["a", "b", "c"]', "scores": "[2, 3, 1]"},
    "messages": {"completions": [[answer("a")], [answer("b")], [answer("c")]], "rewards": [0.2, 0.3, 0.1]},
    "single messages with scores in them": {
        "responses": [{**answer(x), "score": s} for x, s in (("a", 2), ("b", 3), ("c", 1))]
    },
    "NeMo's": {"completions": [{"rank": r, "completion": [answer(x)]} for x, r in (("a", 1), ("b", 0), ("c", 2))]},
    "objects as `datasets` has its sequences": {"answers": {"answer": ["a", "b", "c"], "rank": [2, 1, 3]}},
    "Stack Exchange's": {"answers": [{"text": x, "pm_score": s} for x, s in (("a", 2), ("b", 3), ("c", 1))]},
    "scores and ranks that agree": {"candidates": ["a", "b", "c"], "scores": [2, 3, 1], "ranks": [2, 1, 3]},
}


@pytest.mark.parametrize("case", SEVERAL)
def test_ways_to_give_several_answers(case):
    found = read({"prompt": "p", **SEVERAL[case]}, pairs="adjacent")
    assert [(x, y) for x, y, _ in better(found)] == [("b", "a"), ("a", "c")] and found.unused == []


def test_another_key_may_be_the_score():
    row = layouts.ultrafeedback(0).row
    row["completions"][0]["fine-grained_score"] = 5.0
    assert better(read(row, columns={"scores": "fine-grained_score"}))[0][0] == row["completions"][0]["response"]


def test_an_empty_or_equal_answer_among_several_is_not_used_and_said():
    found = read({"prompt": "p", "responses": ["a", "", "c", "a"], "scores": [3, 9, 1, 2]}, pairs="all")
    assert better(found) == [("a", "c", 1.5)]
    assert found.changed == [preferences.EMPTY_OF_SEVERAL, preferences.SCORED_TWICE]


SAMPLED_TWICE = {
    "the best and the worst": ([3, 2.5, 1], [("b", "a", 0.5)], [preferences.SCORED_TWICE]),
    "the best twice": ([3, 1, 3], [("a", "b", 2)], [preferences.EQUAL_OF_SEVERAL]),
    "the worst twice": ([1, 2, 1], [("b", "a", 1)], [preferences.EQUAL_OF_SEVERAL]),
}


@pytest.mark.parametrize("case", SAMPLED_TWICE)
@pytest.mark.parametrize("choice", ["best_worst", "all", "adjacent"])
def test_equal_answers_are_one_answer(case, choice):
    scores, pairs, changed = SAMPLED_TWICE[case]
    found = read({"prompt": "p", "responses": ["a", "b", "a"], "scores": scores}, pairs=choice)
    assert better(found) == pairs and found.changed == changed


def test_an_answer_that_is_only_an_end_of_turn_is_empty():
    row = {"prompt": "p", "responses": ["a", "<|im_end|>\n", "c"], "scores": [3, 1, 2]}
    found = read(row, ends=("</s>", "<|im_end|>"))
    assert better(found) == [("a", "c", 1)] and found.changed == [preferences.EMPTY_OF_SEVERAL]
    assert left_out({"prompt": "p", "chosen": "a", "rejected": "<|im_end|>"}, ends=("<|im_end|>",)) == EMPTY


REJECTED = {
    "texts": ("a", ["b", "c"]),
    "messages": ([answer("a")], [[answer("b")], [answer("c")]]),
    "single messages": (answer("a"), [answer("b"), answer("c")]),
    "whole chats": ([user("p"), answer("a")], [[user("p"), answer("b")], [user("p"), answer("c")]]),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_may_be_a_list(case):
    chosen, rejected = REJECTED[case]
    found = read({"prompt": "p", "chosen": chosen, "rejected": rejected})
    assert better(found) == [("a", "b", None), ("a", "c", None)] and found.messages == [user("p")]


@pytest.mark.parametrize("rejected", ['["b", "c"]', "['b', 'c']"])
@pytest.mark.parametrize("chosen", ["chosen", "messages"])
def test_rejected_may_be_a_list_as_a_csv_has_it(chosen, rejected):
    row = {"prompt": "p", "chosen": "a", "rejected": rejected}
    if chosen == "messages":
        row = {"messages": [user("p"), answer("a")], "rejected_response": rejected}
    found = read(row)
    assert better(found) == [("a", "b", None), ("a", "c", None)] and found.changed == [LIST_AS_TEXT]


def test_a_list_is_an_answer_if_both_are_lists():
    found = read({"prompt": "p", "chosen": '["a"]', "rejected": '["b", "c"]'})
    assert better(found) == [('["a"]', '["b", "c"]', None)] and not found.changed
    assert left_out({"prompt": "p", "chosen": "a", "rejected": "[]"}) == ONE_ANSWER


@pytest.mark.parametrize(
    ("ranking", "pair"), [([2, 0, 1], ("b", "a", 2)), ([3, 1, 2], ("b", "a", 2)), ("[2, 3, 1]", ("c", "b", 2))]
)
def test_a_ranking_that_may_be_an_order_is_left_out(ranking, pair):
    row = {"prompt": "p", "responses": ["a", "b", "c"]}
    assert left_out({**row, "Ranking": ranking}) == RANKS_OR_ORDER.format("Ranking")
    for found in (read({**row, "ranks": ranking}), read({**row, "ranking": ranking}, columns={"ranks": "ranking"})):
        assert better(found) == [pair] and found.changed == ([FROM_ZERO] if "0" in str(ranking) else [])
    for same in ([0, 1, 2], [2, 1, 3], [3, 2, 1], [1, 1, 2]):
        ranks = read({**row, "ranks": same}, pairs="all")
        assert read({**row, "ranking": same}, pairs="all") == ranks, "as ranks and as an order it says the same"


VERDICTS = {
    "letter": {"response_a": "good", "response_b": "bad", "preference": "A"},
    "name": {"response_a": "bad", "response_b": "good", "winner": "response_b"},
    "model": {"response_a": "bad", "response_b": "good", "winner": "model_b"},
    "index from 0": {"response_0": "bad", "response_1": "good", "better_response_id": 1},
    "index from 1": {"output_1": "good", "output_2": "bad", "preference": 1.0},
    "index as text": {"response_1": "bad", "response_2": "good", "choice": "2"},
    "strength": {"response_1": "good", "response_2": "bad", "preference_strength": -1},
    "chosen says which": {"response_a": "bad", "response_b": "good", "chosen": "b"},
    "scores": {"answer_0": "bad", "answer_1": "good", "score_0": -0.5, "score_1": 0.5},
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts_between_two(case):
    assert better(read({"prompt": "p", **VERDICTS[case]}))[0][:2] == ("good", "bad")


@pytest.mark.parametrize("scores", [{"margin": -1}, {"score_chosen": 1, "score_rejected": 2}])
def test_a_chosen_answer_with_the_lower_score_is_counted(scores):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    found = read({**row, **scores})
    assert found.pairs[0].margin == -1 and found.changed == [preferences.BELOW]
    assert not read({**row, **{name: -value for name, value in scores.items()}}).changed


def test_weights_and_margins():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert read({**row, "weight": "0.5", "margin": 2}).pairs == [Preference(0, 1, 0.5, 2.0)]
    assert read({**row, "score_chosen": 8, "score_rejected": 8.5}).pairs == [Preference(0, 1, 1.0, -0.5)]
    assert [p.weight for p in read({**SCORED, "weight": 3}, pairs="all").pairs] == [3.0] * 5
    found = read({**row, "score_chosen": float("nan"), "score_rejected": 2})
    assert found.pairs[0].margin is None
    assert found.changed == ["score_chosen is nan; it must be a finite number: the pair's margin is not known"]


# -------------------------------------------------------------------------------------------------------- --columns


def test_a_prompt_is_not_guessed_past_a_column_that_is_taken_for_another():
    row = {"prompt": "Hi", "chosen": "Hello to you", "rejected": "Hello to me"}
    said = "no column is the prompt, since --columns takes prompt for system; say which is: --columns prompt=COLUMN"
    assert left_out(row, columns={"system": "prompt"}) == said
    found = read({"Question": "Hi", **row}, columns={"prompt": "Question", "system": "prompt"})
    assert found.messages == [system("Hi"), user("Hi")]


def test_a_prompt_is_guessed_beside_what_is_none():
    row = {"chosen": "Say hello. Hello!", "rejected": "Say hello. No."}
    beside = {"System-Prompt": "Be brief.", "difficulty": "easy", "safe": "True", "p": "0.5", "note": "", "n": 3}
    found = read({**row, **beside})
    assert found.implicit and found.messages == [system("Be brief."), user("Say hello.")]
    found = read({**row, "who": "Be brief."}, columns={"system": "who"})
    assert found.messages[0] == system("Be brief.")


def test_columns_are_named():
    row = {"ask": "Hi", "best": "Hello", "worst": "Go", "prompt": "not this", "why": "it is so"}
    found = read(row, columns={"question": "ask", "chosen": "best", "rejected": "worst"})
    assert pair(found) == ([user("Hi")], "Hello", "Go") and found.unused == ["column prompt", "column why"]
    mapped = {"response_a": "left", "response_b": "right", "preference": "vote", "prompt": "q"}
    found = read({"left": "Go", "right": "Hello", "vote": "right", "q": "Hi"}, columns=mapped)
    assert pair(found) == ([user("Hi")], "Hello", "Go") and found.unused == []
    row = layouts.safe_rlhf(0).row
    assert pair(read(row, columns={"preference": "safer_response_id"}))[1] == row["response_1"]


MAPPED = {
    "prompt": GOOD,
    "messages": {"messages": [user("p")], "chosen": "a", "rejected": "b"},
    "question": {"question": "p", "chosen": "a", "rejected": "b"},
    "instruction": {"instruction": "p", "chosen": "a", "rejected": "b"},
    "input": {"instruction": "p", "input": "q", "chosen": "a", "rejected": "b"},
    "system": {**GOOD, "system": "s"},
    "history": {**GOOD, "history": [["a", "b"]]},
    "tools": {**GOOD, "tools": [TOOL]},
    "chosen": GOOD,
    "rejected": GOOD,
    "response_a": {"prompt": "p", "response_a": "x", "response_b": "y", "preference": "b"},
    "response_b": {"prompt": "p", "response_a": "x", "response_b": "y", "preference": "b"},
    "preference": {"prompt": "p", "response_a": "x", "response_b": "y", "preference": "b"},
    "responses": SCORED,
    "scores": SCORED,
    "ranks": {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]},
    "ranked_responses": {"prompt": "p", "ranked_responses": ["a", "b"]},
    "score_chosen": {**GOOD, "score_chosen": 3, "score_rejected": 1},
    "score_rejected": {**GOOD, "score_chosen": 3, "score_rejected": 1},
    "weight": {**GOOD, "weight": 2},
    "margin": {**GOOD, "margin": 2},
    "chat_template_kwargs": {**GOOD, "chat_template_kwargs": {"a": 1}},
}


@pytest.mark.parametrize("name", config.COLUMNS)
def test_each_name_that_columns_takes_is_looked_for(name):
    row = {("other name" if column == name else column): value for column, value in MAPPED[name].items()}
    found = read(row, columns={name: "other name"})
    assert found == read(MAPPED[name]) and not found.unused
    require_form([*row], Reading(columns={name: "other name"}))


SETS = {
    "no form": (
        ["question", "answer"],
        {},
        "has the columns question, answer, which fit no form .* chosen and rejected: .*--columns",
    ),
    "one half of it": (
        ["prompt", "chosen"],
        {},
        "nearest form has chosen and rejected: say which column is rejected with --columns rejected=COLUMN",
    ),
    "answers under a name that is much like one": (
        ["prompt", "ranked_outputs"],
        {},
        "the nearest form has ranked_responses: say which column is ranked_responses with --columns "
        "ranked_responses=COLUMN",
    ),
    "no columns": ([], {}, "it has the columns none, which fit no form"),
    "a map to nothing": (
        ["q", "chosen", "rejected"],
        {"prompt": "Q"},
        "--columns prompt=Q: there is no column Q; it has q, chosen, rejected",
    ),
}


@pytest.mark.parametrize("case", SETS)
def test_a_set_that_fits_no_form(case):
    columns, mapped, message = SETS[case]
    with pytest.raises(UserError, match=message) as error:
        require_form(columns, Reading(columns=mapped))
    assert "\n" not in str(error.value)
    require_form(["q", "best", "worst"], Reading(columns={"prompt": "q", "chosen": "best", "rejected": "worst"}))


# ---------------------------------------------------------------------------------------------- rows that are left out

TWO = {"prompt": "p", "response_a": "x", "response_b": "y"}
ACCEPTED = "write response_a or a, response_b or b, or tie"
LEFT_OUT = {
    "no rejected": ("the field rejected is missing", {"prompt": "p", "chosen": "a"}),
    "null response": ("the field chosen is missing", {"prompt": "p", "chosen": None, "rejected": "b"}),
    "null prompt": ("the field prompt is missing", {"prompt": None, "chosen": "a", "rejected": "b"}),
    "null question": ("the field question is missing", {"question": None, "chosen": "I am a", "rejected": "I am b"}),
    "an empty question": (
        "the field question is empty",
        {"question": " ", "chosen": "I am a", "rejected": "I am b"},
    ),
    "nothing that we know": ("the columns of the row fit no form: it has a, b", {"b": 1, "a": 2}),
    "no columns": ("the columns of the row fit no form: it has none", {}),
    "a text beside which no prompt is named": (
        "no column is the prompt, but task_text may be: say so with --columns prompt=task_text, or remove it",
        {"task_text": "Add one and one.", "chosen": "It is two", "rejected": "It is three"},
    ),
    "a word beside which no prompt is named": (
        "no column is the prompt, but ask may be: say so with --columns prompt=ask, or remove it",
        {"ask": "Hi", "chosen": "Hello to you", "rejected": "Hello to me"},
    ),
    "two columns that could be the prompt": (
        "question and problem could both be the prompt; name one: --columns prompt=question",
        {"question": "a b", "problem": "c d", "chosen": "It is two", "rejected": "It is three"},
    ),
    "a number": ("chosen is a number; it must be text or messages", {"prompt": "p", "chosen": 5, "rejected": "b"}),
    "a number for a prompt": (
        "prompt is a number; it must be text or messages",
        {"prompt": 5, "chosen": "a", "rejected": "b"},
    ),
    "a number for a chat's prompt": (
        "prompt is a number; it must be text or messages",
        {"prompt": 5, "chosen": [answer("a")], "rejected": [answer("b")]},
    ),
    "no row at all": ("the row is text; it must be an object", "p"),
    "a row that is null": ("the row is null; it must be an object", None),
    "a list of texts": (
        "message 1 of chosen is text; it must be an object with role and content",
        {"prompt": "p", "chosen": ["a"], "rejected": ["b"]},
    ),
    "a message without content": (
        "message 1 of chosen (assistant) has no content",
        {"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": [answer("b")]},
    ),
    "a message of null": (
        "message 2 of prompt (user) has no content",
        {"prompt": [user("a"), {"role": "user", "content": None}], "chosen": "a", "rejected": "b"},
    ),
    "a message whose content is a number": (
        "the content of message 1 of prompt is a number; it must be text or parts of text",
        {"prompt": [{"role": "user", "content": 3}], "chosen": "a", "rejected": "b"},
    ),
    "an unknown role": (
        'message 2 of prompt has the role "critic"; roles are system, user, assistant, tool',
        {"prompt": [user("x"), {"role": "critic", "content": "x"}], "chosen": "a", "rejected": "b"},
    ),
    "a role far down": (
        'a message after the ninth of prompt has the role "critic"; roles are system, user, assistant, tool',
        {"prompt": [user("x")] * 12 + [{"role": "critic", "content": "x"}], "chosen": "a", "rejected": "b"},
    ),
    "a role that is a story": (
        "message 1 of prompt has the role a long text; roles are system, user, assistant, tool",
        {"prompt": [{"role": "once upon a time in a land", "content": "x"}], "chosen": "a", "rejected": "b"},
    ),
    "a message without a role": (
        "message 2 of prompt has no role",
        {"prompt": [user("a"), {"content": "x"}], "chosen": "a", "rejected": "b"},
    ),
    "an image": (
        'message 1 of prompt holds a part of type "image"; only text can be trained on',
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}],
            "chosen": "a",
            "rejected": "b",
        },
    ),
    "a user's answer": (
        "an answer has the role user; it must be the assistant's",
        {"prompt": "p", "chosen": [user("a")], "rejected": [answer("b")]},
    ),
    "a call without a name": (
        "a call in tool_calls of message 1 of chosen names no function",
        {"prompt": "p", "chosen": [{**answer(""), "tool_calls": [{"id": "1"}]}], "rejected": "b"},
    ),
    "tools that are a number": (
        "tools is a number; it must be a list of functions as JSON schemas",
        {"tools": 3, "prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    "a call that nobody answers": (
        parts.OPEN_CALL,
        {"prompt": [user("a"), {**answer(""), "tool_calls": WEATHER}], "chosen": "a", "rejected": "b"},
    ),
    "a system column of its own mind": (
        parts.TWO_SYSTEMS,
        {"system": "s", "prompt": [system("t"), user("a")], "chosen": "a", "rejected": "b"},
    ),
    "a system column of numbers": (
        "system is a number; it must be text",
        {"system": 3, "prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    "template variables that are text": (
        "chat_template_kwargs is text; it must be an object",
        {"chat_template_kwargs": "no", "prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    "half a surrogate pair": (NOT_UNICODE, {"prompt": "p", "chosen": "a \ud83d", "rejected": "b"}),
    "half a surrogate pair in a prompt": (NOT_UNICODE, {"prompt": "p \ud83d", "chosen": "a", "rejected": "b"}),
    "half a surrogate pair in a tool": (
        NOT_UNICODE,
        {"prompt": "p", "tools": [{"name": "\ud83d"}], "chosen": [answer("a")], "rejected": [answer("b")]},
    ),
    "equal texts": (EQUAL, {"prompt": "p", "chosen": "a", "rejected": "a"}),
    "equal chats": (EQUAL, {"prompt": "p", "chosen": [answer("a")], "rejected": [answer("a")]}),
    "answers equal but for blanks": (EQUAL, {"prompt": CHAT, "chosen": "a ", "rejected": " a"}),
    "empty text": (EMPTY, {"prompt": "p", "chosen": "a", "rejected": ""}),
    "blank text": (EMPTY, {"prompt": "p", "chosen": " \n", "rejected": "b"}),
    "empty answer in a chat": (EMPTY, {"prompt": "p", "chosen": [answer("a")], "rejected": [answer("")]}),
    "an answer without messages": (
        "rejected is an empty object",
        {"prompt": CHAT, "chosen": [answer("a")], "rejected": {}},
    ),
    "empty answer in a dialogue": (EMPTY, {"chosen": DIALOGUE + " a", "rejected": DIALOGUE}),
    "dialogues with other questions": (
        DIFFER,
        {"chosen": DIALOGUE + " a", "rejected": DIALOGUE.replace("Sing", "Dance") + " b"},
    ),
    "chats with other questions": (DIFFER, {"chosen": [user("x"), answer("a")], "rejected": [user("y"), answer("b")]}),
    "a chat that goes on from the other": (
        BEGINNING,
        {"chosen": [user("x"), answer("a")], "rejected": [user("x"), answer("a"), user("y"), answer("c")]},
    ),
    "no common word": (NO_PROMPT, {"chosen": "Paris", "rejected": "Pisa"}),
    "a dialogue without answers": (NO_PROMPT, {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}),
    "a dialogue of answers alone": (NO_PROMPT, {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}),
    "no messages before the answer": (NO_PROMPT, {"chosen": [answer("a")], "rejected": [answer("b")]}),
    "an empty list of messages": ("prompt is an empty list", {"prompt": [], "chosen": "a", "rejected": "b"}),
    "another model's text": (
        "a text begins with <|start_header_id|>, which another model's chat template writes; give messages, or use "
        "--chat_template none",
        {"prompt": "<|start_header_id|>user", "chosen": "a", "rejected": "b"},
    ),
    "a rendered prompt with its answer": (
        NOT_OPEN,
        {
            "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
            "chosen": "a",
            "rejected": "b",
        },
    ),
    "a rendered prompt that breaks off": (
        NOT_OPEN,
        {"prompt": "<|im_start|>user\nHi", "chosen": "a", "rejected": "b"},
    ),
    "a rendered dialogue that goes on": (
        "a dialogue that is rendered already goes on after its answers differ; give it as messages",
        {"chosen": "<|im_start|>assistant\na<|im_start|>assistant\nc", "rejected": "<|im_start|>assistant\nb"},
    ),
    "an images column": (assemble.NOT_TEXT, {**GOOD, "images": ["a.png"]}),
    "two messages of the assistant's as one answer": (
        parts.TWO_ASSISTANTS,
        {"prompt": "p", "chosen": [answer("a")], "rejected": [answer("b"), answer("c")]},
    ),
    "two messages of the assistant's before the answers": (
        parts.TWO_ASSISTANTS,
        {
            "chosen": [user("p"), answer("a"), answer("b")],
            "rejected": [user("p"), answer("a"), answer("c")],
        },
    ),
    "one answer": (ONE_ANSWER, {"prompt": "p", "responses": ["a"], "scores": [1]}),
    "one answer and no other": (ONE_ANSWER, {"prompt": "p", "chosen": "a", "rejected": []}),
    "no answers": ("responses is an empty list", {"prompt": "p", "responses": [], "scores": []}),
    "answers without scores": (
        "responses has neither scores nor ranks beside it",
        {"prompt": "p", "responses": ["a", "b"]},
    ),
    "too few scores": (
        "scores does not have as many entries as there are answers",
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2]},
    ),
    "scores that are text": (
        'an entry of scores is "good", which is text; it must be a number',
        {"prompt": "p", "responses": ["a", "b"], "scores": ["good", "bad"]},
    ),
    "a score that is NaN": (
        "an entry of scores is nan; it must be a finite number",
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]},
    ),
    "a score that is null": (
        "an entry of scores is null; it must be a number",
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, None]},
    ),
    "a rank that is missing": (
        "rank of an entry of answers is null; it must be a number",
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
    ),
    "an answer that is null": (
        "an entry of responses is null",
        {"prompt": "p", "responses": ["a", None], "scores": [1, 2]},
    ),
    "all scores equal": (ranking.ALL_TIED, {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}),
    "all ranks equal": (ranking.ALL_TIED, {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}),
    "scores against ranks": (
        f"{DISAGREE}: the scores and the ranks of responses",
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]},
    ),
    "no verdict": (
        "no column says which of response_a and response_b is better; if one does: --columns preference=COLUMN",
        TWO,
    ),
    "a tie": (f'winner is "tie (bothbad)": {ranking.ALL_TIED}', {**TWO, "winner": "tie (bothbad)"}),
    "a strength of 0": (f"preference_strength is 0: {ranking.ALL_TIED}", {**TWO, "preference_strength": 0}),
    "an index of letters": (
        f"preference is 1, which may count the answers from 0 or from 1: {ACCEPTED}",
        {**TWO, "preference": 1},
    ),
    "an index from 0 of names from 1": (
        ranking.COUNTED_OTHERWISE,
        {"prompt": "p", "response_1": "x", "response_2": "y", "preference": 0},
    ),
    "an index from 1 of names from 0": (
        ranking.COUNTED_OTHERWISE,
        {"prompt": "p", "response_0": "x", "response_1": "y", "preference": "2"},
    ),
    "a verdict that denies": (
        f'winner is "not a", but the answers are response_a and response_b: {ACCEPTED}',
        {**TWO, "winner": "not a"},
    ),
    "a verdict that denies a name": (
        f'winner is "not_response_b", but the answers are response_a and response_b: {ACCEPTED}',
        {**TWO, "winner": "not_response_b"},
    ),
    "a probability": (
        f"preference is 0.7, but the answers are response_a and response_b: {ACCEPTED}",
        {**TWO, "preference": 0.7},
    ),
    "a verdict of NaN": (
        f"preference is not a number, but the answers are response_a and response_b: {ACCEPTED}",
        {**TWO, "preference": float("nan")},
    ),
    "a verdict against the scores": (
        f"{DISAGREE}: the verdict and the scores",
        {**TWO, "winner": "a", "score_a": 1, "score_b": 2},
    ),
    "a label of SHP's that is none": (
        "labels is 2; it must be 1 (human_ref_A is better) or 0",
        {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 2},
    ),
    "a weight of 0": ("weight is 0; it must be above 0", {"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0}),
    "a weight that is text": (
        'weight is "much", which is text; it must be a number',
        {"prompt": "p", "chosen": "a", "rejected": "b", "weight": "much"},
    ),
    "a margin that is infinite": (
        "margin is inf; it must be a finite number",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("inf")},
    ),
    "ms-swift's without an answer": (
        "messages must end in the chosen answer, but ends in the role user",
        {"messages": [user("a")], "rejected_response": "b"},
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_row_that_cannot_be_used_says_why(case):
    kind, row = LEFT_OUT[case]
    assert left_out(row) == kind


def test_above_margin_leaves_out_what_is_below_or_not_known():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert left_out(row, pairs="above_margin") == ranking.NO_MARGIN_KNOWN
    assert left_out({**row, "margin": 1}, pairs="above_margin", min_margin=2) == ranking.BELOW_MARGIN
    assert left_out(SCORED, pairs="above_margin", min_margin=9) == ranking.BELOW_MARGIN
    assert len(read({**row, "margin": 2}, pairs="above_margin", min_margin=2).pairs) == 1


@pytest.mark.parametrize(
    ("verdicts", "names"),
    [
        ({"preference": "a", "winner": "b"}, "preference and winner"),
        ({"preference": "a", "winner": "tie"}, "preference and winner"),
        ({"winner": "model_a", "choice": "response_b"}, "winner and choice"),
        ({"preference_strength": 2, "preference": "a"}, "preference_strength and preference"),
        (
            {"winner_model_a": 1, "winner_model_b": 0, "better_response_id": "b"},
            "winner_model_a and better_response_id",
        ),
        ({"winner": "a", "score_a": 1, "score_b": 2}, "the verdict and the scores"),
        ({"winner": "a", "rating_a": 1, "rating_b": 2}, "the verdict and the scores"),
        ({"score_a": 2, "score_b": 1, "reward_a": 1, "reward_b": 2}, "two kinds of scores"),
    ],
)
def test_verdicts_that_disagree_leave_a_row_out(verdicts, names):
    assert left_out({**TWO, **verdicts}) == f"{DISAGREE}: {names}"


def test_a_second_column_counts_only_if_it_is_a_verdict():
    assert pair(read({**TWO, "winner": "a", "choice": "A", "chosen": "yes"}))[1] == TWO["response_a"]
    assert read({**TWO, "winner": "a", "choice": "A", "chosen": "yes"}).unused == ["column chosen"]
    told = read({**TWO, "winner": "b", "choice": "a"}, columns={"preference": "choice"})
    assert pair(told)[1] == TWO["response_a"] and told.unused == ["column winner"]


def test_which_answer_is_safer_is_another_question():
    row = {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 0, "safer_response_id": 1}
    found = read(row)
    assert pair(found)[1] == "x" and found.changed == [OTHER_QUESTION.format("better_response_id", "safer_response_id")]


@pytest.mark.parametrize("winner", [0, 1, "1"])
def test_a_verdict_that_may_count_from_0_or_1_names_what_is_accepted(winner):
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y", "winner": winner}
    accepted = "write answer_a or a, answer_b or b, or tie"
    said = f'"{winner}"' if isinstance(winner, str) else winner
    assert left_out(row) == f"winner is {said}, which may count the answers from 0 or from 1: {accepted}"


def test_ranked_answers_are_a_list_from_the_best():
    row = {"prompt": "p", "ranked_responses": ["x", "y", "z"]}
    found = read(row, pairs="adjacent")
    assert [(pair(found, n)[1:]) for n in range(2)] == [("x", "y"), ("y", "z")]
    assert found.changed == [BEST_FIRST]
    assert pair(read({**row, "scores": [3, 2, 1]}))[1:] == ("x", "z")
    assert left_out({**row, "scores": [1, 2, 3]}).startswith(f"{DISAGREE}: the order of ranked_responses")
    require_form([*row], Reading())


def test_a_prompt_that_the_dialogues_do_not_say_is_counted():
    row = {"prompt": "Bye", "chosen": [user("Hi"), answer("a")], "rejected": [user("Hi"), answer("b")]}
    assert read(row).changed == [OTHER_PROMPT]


def test_columns_that_differ_in_case_alone():
    found = read({"Prompt": "other", "prompt": "p", "chosen": "a", "Chosen": "x", "rejected": "b", "images": []})
    assert pair(found) == ([user("p")], "a", "b")
    assert found.unused == ["column Prompt", "column Chosen", "column images"]


def test_other_columns_and_keys_are_named_once_each():
    row = {**GOOD, "score": 3.5, "chosen_model": None, "source": "flan", "id": 3}
    assert read(row).unused == ["column score", "column source", "column id"]
    row = {"prompt": [{**user("a"), "id": 1, "ts": 2}, {**user("b"), "id": 2}], "chosen": "a", "rejected": "b"}
    assert read(row).unused == ["message key id", "message key ts"]


@pytest.mark.skipif(not HH.is_file(), reason=f"{HH} is not here")
def test_hh_as_it_is():
    kinds: dict[str, int] = {}
    kept = 0
    for line in gzip.open(HH, "rt", encoding="utf-8"):
        source = json.loads(line)
        try:
            found = read(source)
        except LeftOut as reason:
            kinds[str(reason)] = kinds.get(str(reason), 0) + 1
            continue
        kept += 1
        text, chosen, rejected = plain(found)
        assert (text + chosen, text + rejected) == (source["chosen"], source["rejected"])
        assert text.endswith("\n\nAssistant:") and found.messages[-1]["role"] != "assistant"
        assert not found.changed and not found.unused and not found.implicit
    assert (kept, kinds) == (2303, {DIFFER: 5, EMPTY: 4})
