"""Mistakes that real data hold: no row of these is trained as something else, and none ends in a traceback."""

import copy
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import templates
from layouts import answer, system, user

from dpo_ds.data.cache import tokenize_pairs
from dpo_ds.data.comparison import Comparison, LeftOut
from dpo_ds.data.encoder import FOREIGN, SPECIAL, SPECIAL_PROMPT, Encoder, Tokenizing
from dpo_ds.data.files import RAW
from dpo_ds.data.held_out import shared
from dpo_ds.data.pairs import PairSet
from dpo_ds.data.rows.assemble import EMPTY_PROMPT
from dpo_ds.data.rows.chats import NO_PROMPT, OTHER_PROMPT
from dpo_ds.data.rows.forms import Reading, read_row
from dpo_ds.data.rows.parts import REPEATED, TAIL
from dpo_ds.data.rows.preferences import EMPTY
from dpo_ds.data.rows.rendered import MARKS, NOT_OPEN
from dpo_ds.data.rows.texts import FRAMED, RENDERED
from dpo_ds.data.sources import Split, fields, load_sources
from dpo_ds.errors import UserError

QWEN = "Qwen/Qwen2-7B-Instruct"
PAIR = {"chosen": "Hello!", "rejected": "No."}
GOOD = {"prompt": "Say hello.", **PAIR}


def reading(model) -> Reading:
    encoder = Encoder(templates.tokenizer(model), Tokenizing(400))
    return Reading(markers=encoder.markers if encoder.template else None, ends=encoder.ends)


def read(row, model=QWEN) -> Comparison:
    return read_row(row, reading(model))


def left_out(row, model=QWEN) -> str:
    with pytest.raises(LeftOut) as reason:
        read(row, model)
    return str(reason.value)


@pytest.fixture
def tokenised(tmp_path):
    """Tokenises rows; returns the pairs and the report's lines."""

    def run(*rows, model=QWEN):
        encoder = Encoder(templates.tokenizer(model), Tokenizing(400))
        source = datasets.Dataset.from_dict({RAW: [json.dumps(row) for row in rows]})
        split = Split("train", source, [*dict.fromkeys(name for row in rows for name in row)])
        folder, (report,) = tokenize_pairs([split], encoder, reading(model), True, tmp_path / "cache", 1)
        return PairSet.open(folder), report.lines()

    return run


# -------------------------------------------------------------------------------------------------------- no traceback


@pytest.mark.parametrize("said", ["{{1}, {2}}", "[" * 50_000, "{{a}}", "[1](url)", '{"a": ' * 3000])
def test_an_answer_that_begins_like_code_is_text(said):
    assert [a.text for a in read({**GOOD, "rejected": said}).answers] == ["Hello!", said]
    assert [a.text for a in read({**GOOD, "chosen": said}).answers] == [said, "No."]


@pytest.mark.parametrize("weight", [10**400, 1e39, 1e308, 1e-50])
def test_a_weight_that_float32_cannot_hold_is_refused(weight):
    assert left_out({**GOOD, "weight": weight}).startswith("weight is ")


def test_scores_that_float32_cannot_hold_give_no_margin():
    comparison = read({**GOOD, "score_chosen": 1e308, "score_rejected": -1e308})
    assert comparison.pairs[0].margin is None and "score_chosen is 1e+308" in comparison.changed[0]


def test_a_prompt_may_hold_a_tools_answer(tokenised):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": {}}}]}
    messages = [user("Weather?"), call, {"role": "tool", "content": "sunny"}]
    pairs, lines = tokenised({"messages": messages, **PAIR}, model="Qwen/Qwen3-8B")
    assert len(pairs) == 1 and lines == ["1 of 1 row is used"]


def test_names_that_are_not_utf8_are_reported(tokenised):
    _, lines = tokenised({**GOOD, "cat\udce9gory": "x"}, {"messages": [{"role": "\udce9", "content": "x"}], **PAIR})
    assert lines[0] == "1 of 2 rows is used (row numbers count from 0)"
    assert 'role "\\udce9"' in lines[1] and "column cat\\udce9gory" in lines[2]


# ----------------------------------------------------------------------------------------------- nothing else is meant


def test_a_prompt_is_not_guessed_beside_messages_or_a_text_without_blanks():
    answers = {"chosen": "I think yes", "rejected": "I think no"}
    for column in ([user("Say hello.")], "请介绍一下北京的历史"):
        assert left_out({"chat": column, **answers}).startswith("no column is the prompt, but chat may be")


@pytest.mark.parametrize("verdict", [{"preference": 1}, {"score_1": 1, "score_2": 2, "score_3": 3}])
def test_a_third_answer_is_not_dropped(verdict):
    row = {"prompt": "Say hello.", "response_1": "Hello!", "response_2": "No.", "response_3": "Why?", **verdict}
    assert left_out(row).startswith("there is response_3 beside response_1 and response_2")


@pytest.mark.parametrize("model", [name for name in templates.SHAPES if templates.tokenizer(name).chat_template])
def test_a_rendered_prompt_without_its_opening_gets_it_or_is_refused(model):
    turns = [user("Hi."), answer("Hello."), user("Say hello.")]
    closed, opened = (
        templates.tokenizer(model).apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
        for asks in (False, True)
    )
    for prompt in (closed, closed.rstrip(), opened, opened.rstrip()):
        try:
            assert read({"prompt": prompt, **PAIR}, model).text == opened
        except LeftOut as reason:
            assert str(reason) == NOT_OPEN and model.startswith("microsoft/Phi-3") and prompt in closed


def test_a_prompt_in_another_models_style_is_counted():
    for prompt in ("USER: Say hello. ASSISTANT:", "### Instruction:\nSay hello.\n\n### Response:\n"):
        assert read({"prompt": prompt, **PAIR}).changed == [FRAMED]
        assert read({"prompt": prompt, **PAIR}, "gpt2").changed == []


def test_a_system_message_is_no_prompt():
    row = {"system": "Be brief.", "ask": "Say hello.", "chosen": [answer("Hello!")], "rejected": [answer("No.")]}
    assert left_out(row) == NO_PROMPT


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("", "the field prompt is empty"), (" \n", "the field prompt is empty"), (None, "the field prompt is missing"),
     ([user("")], EMPTY_PROMPT)],
)  # fmt: skip
@pytest.mark.parametrize("answers", [PAIR, {name: [answer(text)] for name, text in PAIR.items()}])
def test_a_row_without_a_prompt_is_left_out(prompt, kind, answers):
    assert left_out({"prompt": prompt, **answers}) == kind


START = {"chosen": "Say hello. Hello!", "rejected": "Say hello. No."}
WHOLE = {"chosen": [user("Say hello."), answer("Hello!")], "rejected": [user("Say hello."), answer("No.")]}


@pytest.mark.parametrize("model", [QWEN, "gpt2"])
@pytest.mark.parametrize("none", [{}, {"prompt": None}, {"prompt": ""}])
def test_no_prompt_is_found_in_the_answers_if_other_rows_have_a_column_for_it(tokenised, model, none):
    pairs, lines = tokenised({"prompt": "Hi.", **PAIR}, {**none, **START}, {**none, **WHOLE}, model=model)
    assert pairs.rows.tolist() == [0, 2]
    assert "1 left out: the field prompt is " + ("empty" if none.get("prompt") == "" else "missing") in lines[1]
    pairs, lines = tokenised(START, model=model)
    assert pairs.rows.tolist() == [0]


def test_two_versions_of_a_question_are_not_two_questions():
    whole = {"chosen": [user("say hello"), answer("Hello!")], "rejected": [user("say hello"), answer("No.")]}
    comparison = read({"prompt": [user("Say hello.")], **whole})
    assert comparison.messages == [user("say hello")] and comparison.changed == [OTHER_PROMPT]
    comparison = read({"prompt": [system("Be brief.")], **whole})
    assert comparison.messages == [system("Be brief."), user("say hello")]


@pytest.mark.parametrize("prompt", ["Say hello.", [answer("Welcome"), user("Say hello.")]])
def test_a_prompt_beside_dialogues_that_the_assistant_begins_is_taken_once(prompt):
    start = [answer("Welcome"), user("Say hello.")]
    row = {"prompt": prompt, "chosen": [*start, answer("Hello!")], "rejected": [*start, answer("No.")]}
    assert read(row).messages == start


def test_a_dialogue_with_one_of_several_answers_in_it():
    messages = [user("Say hello."), answer("Hello!")]
    for answers in (
        {"chosen": "Hello!", "rejected": ["No.", "Why?"]},
        {"responses": ["Hello!", "No."], "scores": [2, 1]},
    ):
        comparison = read({"messages": messages, **answers})
        assert comparison.messages == messages[:1] and comparison.changed == [REPEATED]


def test_messages_that_answer_a_rendered_prompt():
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": prompt, "chosen": [answer("Hello!")], "rejected": [answer("No.")]}
    comparison = read(row)
    assert comparison.text == prompt and comparison.changed == [RENDERED]
    assert "another model's chat template" in left_out(row, "meta-llama/Meta-Llama-3-8B-Instruct")


@pytest.mark.parametrize("model", [QWEN, "meta-llama/Meta-Llama-3-8B-Instruct"])
def test_rendered_answers_beside_a_plain_prompt_are_refused(model):
    framed = {name: f"<|im_start|>assistant\n{text}<|im_end|>\n" for name, text in PAIR.items()}
    assert left_out({"prompt": "Say hello.", **framed}, model).startswith("an answer begins with <|im_start|>")


def test_what_only_a_template_reads_is_counted_without_one(tokenised):
    row = {"prompt": [{**user("Hi"), "name": "Bo"}], **PAIR, "chat_template_kwargs": {"enable_thinking": False}}
    text = "\n".join(tokenised(row, model="gpt2")[1])
    assert "not used: message key name (1 row)" in text and "does not read enable_thinking" in text
    rendered = {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", **PAIR, "tools": [{"name": "f"}]}
    assert "rendered already ignores tools" in "\n".join(tokenised(rendered)[1])


NAMED = {"prompt": [{**user("Hi"), "name": "Bo"}], "chosen": [{**answer("Hello!"), "ref": 3}], "rejected": "No."}


@pytest.mark.parametrize("model", [QWEN, "gpt2", "Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"])
def test_a_key_that_the_model_does_not_see_is_unused(tokenised, model):
    """Qwen3's template writes the names of tools; it does not write a message's."""
    _, lines = tokenised(NAMED, model=model)
    assert lines[-1] == "not used: message key ref (1 row), message key name (1 row)"


def test_a_key_that_the_template_writes_is_used():
    tok = copy.deepcopy(templates.tokenizer(QWEN))
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.get('name', '') }}{{ m.content }}")
    (encoded,) = Encoder(tok, Tokenizing(400)).encode([read(NAMED)])
    assert "Bo" in tok.decode(encoded.prompt) and not encoded.unused


@pytest.mark.parametrize(("model", "token"), [(QWEN, "<|im_end|>"), ("gpt2", "<|endoftext|>")])
def test_a_special_token_within_a_prompt_is_counted(tokenised, model, token):
    _, lines = tokenised({**GOOD, "prompt": f"What is {token} for?"}, GOOD, model=model)
    assert lines[1:] == [f"1 noted: {SPECIAL_PROMPT} (row 0)"]


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|start_header_id|>", "[INST]"])
def test_marks_of_another_models_template_are_counted(tokenised, mark):
    row = {"prompt": f"{mark}user\nSay hello.", **PAIR}
    _, lines = tokenised(row, {**GOOD, "chosen": f"a {mark}"}, GOOD, model="gpt2")
    assert lines[1:] == [f"2 noted: {FOREIGN.format(mark)} (rows 0, 1)"]


@pytest.mark.parametrize("model", [name for name in templates.SHAPES if templates.tokenizer(name).chat_template])
def test_a_models_own_marks_are_not_foreign(model):
    encoder = Encoder(templates.tokenizer(model), Tokenizing(400))
    own = [mark for mark in MARKS if mark in encoder.template.written()]
    assert not {*own} & {*encoder._foreign}


@pytest.mark.parametrize(("model", "end"), [(QWEN, "<|im_end|>"), ("gpt2", "<|endoftext|>")])
def test_a_special_token_within_an_answer_is_counted_and_at_its_end_taken_off(tokenised, model, end):
    pairs, lines = tokenised({**GOOD, "chosen": f"Hello!{end}\n"}, {**GOOD, "rejected": f"No.{end} Yes."}, model=model)
    assert len(pairs) == 2 and lines[1:] == [f"1 noted: {SPECIAL} (row 1)"]
    _, lines = tokenised(GOOD, {**GOOD, "rejected": f" {end}"}, model=model)
    assert lines[1:] == [f"1 left out: {EMPTY} (row 1)"]


# --------------------------------------------------------------------------------------------------- files and held out


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_that_follow_each_other_are_refused(tmp_path, indent):
    file = tmp_path / "two.json"
    file.write_text(json.dumps([GOOD], indent=indent) + json.dumps([GOOD], indent=indent))
    with pytest.raises(UserError, match=r"more follows the array, which ends after row 0 \(counted from 0\)"):
        load_sources(str(file), tmp_path)


def test_a_file_that_no_split_takes_is_named(tmp_path):
    folder = tmp_path / "set"
    (folder / ".git").mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", ".git/x.jsonl"):
        (folder / name).write_text(json.dumps(GOOD) + "\n")
    assert load_sources(str(folder), tmp_path)[0].test is not None
    (folder / "more.jsonl").write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(UserError, match=r"holds more\.jsonl beside files named after splits"):
        load_sources(str(folder), tmp_path)


def test_objects_with_rows_under_two_keys_are_not_read_in_part(tmp_path):
    file = tmp_path / "object.json"
    file.write_text(json.dumps({"train": [GOOD], "about": {"version": 1}}))
    assert [fields(row) for row in load_sources(str(file), tmp_path)[0].split.rows] == [GOOD]
    file.write_text(json.dumps({"data": [GOOD], "test": [GOOD]}))
    assert load_sources(str(file), tmp_path)[0].split.columns == ["data", "test"]


def test_a_row_of_too_many_brackets_is_named(tmp_path):
    file = tmp_path / "deep.jsonl"
    file.write_text(json.dumps(GOOD) + '\n{"x": ' + "[" * 5000 + "]" * 5000 + "}\n")
    with pytest.raises(UserError, match="line 2 has too many brackets"):
        load_sources(str(file), tmp_path)


@pytest.mark.parametrize("model", [QWEN, "gpt2"])
def test_a_question_as_text_and_as_messages_is_one_prompt(tokenised, model):
    one, _ = tokenised(GOOD, model=model)
    for row in ({"prompt": [user("say  Hello.")]}, {"question": "SAY hello. "}, {"messages": [user("say hello.")]}):
        other, _ = tokenised({**row, **PAIR}, model=model)
        assert np.all(shared(one.prompt_keys, other.prompt_keys))
    other, _ = tokenised({"prompt": "Say goodbye.", **PAIR}, model=model)
    assert not shared(one.prompt_keys, other.prompt_keys).any()


def test_whole_dialogues_and_their_question_are_one_prompt(tokenised):
    start = [user("Well. Say  hello")]
    forked = {"chosen": [*start, answer("Hello!"), user("Thanks"), answer("Bye.")], "rejected": [*start, answer("No.")]}
    found, _ = tokenised(forked)
    given, _ = tokenised({"prompt": [system("Be kind."), user("well. say hello")], **PAIR})
    assert shared(found.prompt_keys, given.prompt_keys).all() and shared(given.prompt_keys, found.prompt_keys).all()


def test_the_shares_of_a_mix_are_of_what_is_not_held_out(tokenised, tmp_path):
    """The second source's pairs are all held out but one: the mix has one of each."""
    from dpo_ds.runs.data import _without_shared, mixed

    ask = [{**GOOD, "prompt": f"Question {n}?"} for n in range(8)]
    held, _ = tokenised(*ask[4:7])
    pairs, _ = tokenised(*ask)
    train = replace(pairs, sources=np.repeat([0, 1], 4))
    left, shares = _without_shared(train, held, "--eval_dataset", print), [("one", 0.5), ("two", 0.5)]
    assert np.bincount(mixed(left, shares, 0, print).sources).tolist() == [1, 1]
    with pytest.raises(UserError, match="no pair of two is left for the mix"):
        mixed(_without_shared(train, tokenised(*ask[4:])[0], "--eval_dataset", print), shares, 0, print)


def test_what_a_user_says_after_the_last_answer_is_not_learned():
    hh = "\n\nHuman: Say hello.\n\nAssistant:"
    comparison = read({"chosen": f"{hh} Hello!\n\nHuman: Thanks", "rejected": f"{hh} No."})
    assert [a.text for a in comparison.answers] == [" Hello!", " No."] and comparison.changed == [TAIL]


@pytest.mark.parametrize("tools", [[{"function": "f"}], ["f"], '["f"]'])
def test_tools_that_are_no_schemas_are_refused(tools):
    assert "must be a list of functions as JSON schemas" in left_out({**GOOD, "tools": tools})
