"""Preference sets in every form and kind of file. Rows that cannot be used are counted by kind."""

import gzip
import json
import logging

import datasets
import launching
import numpy as np
import pytest

from dpo_ds.data import rows as rows_file
from dpo_ds.data import sources
from dpo_ds.data.pairs import held_out
from dpo_ds.data.rows import (
    DIFFER,
    EMPTY,
    EQUAL,
    MISSING,
    NO_PROMPT,
    NOT_UNICODE,
    WRONG_TYPE,
    as_text,
    check_preferences,
    prompt_hash,
)
from dpo_ds.data.sources import load_preferences
from dpo_ds.errors import UserError

HH = launching.ROOT.parent / "shared" / "data" / "hh-harmless" / "test.jsonl.gz"
GOOD = {"prompt": "Once", "chosen": " upon a time.", "rejected": " there was."}
OTHER = {"prompt": "Then", "chosen": " it rained.", "rejected": " nothing."}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def jsonl(folder, rows: list) -> str:
    (folder / "pairs.jsonl").write_text(lines(rows))
    return str(folder / "pairs.jsonl")


def checked(folder, rows: list, max_left_out: float = 1.0):
    return check_preferences(load_preferences(jsonl(folder, rows)), max_left_out)


def only(folder, row: dict) -> dict:
    pairs, report = checked(folder, [row])
    assert report.kept == report.total == 1 and not report.left_out
    return pairs[0]


# ------------------------------------------------------------------------------------------------------ the forms


def test_an_explicit_prompt_as_text(tmp_path):
    assert only(tmp_path, GOOD) == {
        "row": 0, "text": "Once", "messages": [user("Once")], "chosen": " upon a time.", "rejected": " there was.",
    }  # fmt: skip


DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello. \n\nHuman: Sing\n\nAssistant:"
TURNS = [user("Hi"), answer("Hello."), user("Sing")]


def test_an_explicit_prompt_that_is_a_dialogue_as_text(tmp_path):
    pair = only(tmp_path, {"prompt": DIALOGUE, "chosen": " La.", "rejected": " No."})
    assert pair["text"] == DIALOGUE and pair["messages"] == TURNS


def test_a_dialogue_as_text_with_answers_as_messages(tmp_path):
    pair = only(tmp_path, {"prompt": DIALOGUE, "chosen": [answer("La.")], "rejected": [answer("No.")]})
    assert pair["messages"] == TURNS and (pair["chosen"], pair["rejected"]) == (" La.", " No.")


def test_an_implicit_dialogue_as_text(tmp_path):
    pair = only(tmp_path, {"chosen": DIALOGUE + " La, la.", "rejected": DIALOGUE + " La."})
    assert pair["text"] == DIALOGUE and pair["messages"] == TURNS
    assert (pair["chosen"], pair["rejected"]) == (" La, la.", " La."), "the dialogue is the prompt, not all they share"


def test_an_implicit_prompt_is_what_both_share_in_whole_words(tmp_path):
    pair = only(tmp_path, {"chosen": "The cat sat on\na warm mat.", "rejected": "The cat sat on\na wall."})
    assert (pair["text"], pair["chosen"], pair["rejected"]) == ("The cat sat on\na", " warm mat.", " wall.")
    assert pair["messages"] == [user("The cat sat on\na")]


def test_a_shared_prompt_that_ends_in_a_line_break_keeps_its_last_word(tmp_path):
    pair = only(tmp_path, {"chosen": "Say it\ntwice\nYes", "rejected": "Say it\ntwice\nNo"})
    assert (pair["text"], pair["chosen"], pair["rejected"]) == ("Say it\ntwice", "\nYes", "\nNo")


CHAT = [system("Be brief."), user("Hi")]
AS_TEXT = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"
CHATS = {
    "prompt as messages, answers as strings": {"prompt": CHAT, "chosen": "Hello. ", "rejected": " Go away."},
    "prompt and answers as messages": {"prompt": CHAT, "chosen": [answer("Hello.")], "rejected": [answer("Go away.")]},
    "whole chats": {"chosen": [*CHAT, answer("Hello.")], "rejected": [*CHAT, answer("Go away.")]},
    "whole chats that repeat a prompt given as messages": {
        "prompt": CHAT, "chosen": [*CHAT, answer("Hello.")], "rejected": [*CHAT, answer("Go away.")],
    },
    "whole chats that go on from a prompt given as messages": {
        "prompt": CHAT[:1], "chosen": [CHAT[1], answer("Hello.")], "rejected": [CHAT[1], answer("Go away.")],
    },
    "whole chats beside a prompt string, as UltraFeedback's": {
        "prompt": "Hi", "chosen": [*CHAT, answer("Hello.")], "rejected": [*CHAT, answer("Go away.")],
    },
    "further keys in a message": {
        "prompt": [{**turn, "name": "x"} for turn in CHAT], "chosen": [answer("Hello.")],
        "rejected": [answer("Go away.")],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", CHATS)
def test_chats(form, tmp_path):
    assert only(tmp_path, CHATS[form]) == {
        "row": 0, "text": AS_TEXT, "messages": CHAT, "chosen": " Hello.", "rejected": " Go away.",
    }  # fmt: skip


def test_a_prompt_string_with_answers_as_messages(tmp_path):
    pair = only(tmp_path, {"prompt": "Hi", "chosen": [answer("Hello.")], "rejected": [answer("No.")]})
    assert pair["messages"] == [user("Hi")] and pair["text"] == as_text([user("Hi")])


def test_other_columns_do_not_matter(tmp_path):
    assert only(tmp_path, {"score": 3.5, "chosen_model": None, **GOOD})["text"] == "Once"


# ------------------------------------------------------------------------------------------------------ where from


def as_json_array(path, rows):
    path.write_text(json.dumps(rows, indent=2))


def as_jsonl_gz(path, rows):
    path.write_bytes(gzip.compress(lines(rows).encode()))


FILES = {
    "a.jsonl": lambda path, rows: path.write_text(lines(rows)),
    "a.jsonl.gz": as_jsonl_gz,
    "a.json": as_json_array,
    "a.csv": lambda path, rows: datasets.Dataset.from_list(rows).to_csv(path),
    "a.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_every_file_kind_and_a_folder_of_it(name, in_folder, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    FILES[name](folder / name, [GOOD, OTHER])
    pairs, report = check_preferences(load_preferences(str(folder if in_folder else folder / name)))
    assert report.kept == 2 and [pair["text"] for pair in pairs] == ["Once", "Then"]
    assert [pair["chosen"] for pair in pairs] == [GOOD["chosen"], OTHER["chosen"]]


def test_a_folder_of_several_files_is_one_set_unless_their_names_are_splits(tmp_path):
    for name, rows in {"one/b1.jsonl": [GOOD], "one/b2.jsonl": [OTHER], "two/train.jsonl": [GOOD] * 3,
                       "two/test.jsonl": [OTHER]}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(rows))
    assert len(load_preferences(str(tmp_path / "one"))) == 2
    assert len(load_preferences(str(tmp_path / "two"))) == 3
    assert load_preferences(str(tmp_path / "two"), role="eval")["prompt"][:] == ["Then"]


def test_a_saved_dataset_is_read_and_nothing_is_written_beside_it(tmp_path):
    datasets.Dataset.from_list([GOOD, OTHER]).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.joinpath("saved").iterdir())
    assert check_preferences(load_preferences(str(tmp_path / "saved")))[1].kept == 2
    assert sorted(tmp_path.joinpath("saved").iterdir()) == before


@pytest.fixture
def with_splits(tmp_path):
    splits = {"train_sft": 5, "train_prefs": 3, "test_prefs": 2, "test_gen": 1}
    sets = {name: datasets.Dataset.from_list([GOOD] * rows) for name, rows in splits.items()}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "splits")
    return str(tmp_path / "splits")


def test_the_preference_splits_are_found_by_themselves(with_splits):
    assert len(load_preferences(with_splits)) == 3
    assert len(load_preferences(with_splits, role="eval")) == 2


def test_a_split_may_be_named(with_splits):
    assert len(load_preferences(with_splits, "train_sft")) == 5
    with pytest.raises(UserError, match=r"no split dev; --dataset_split takes train_sft, train_prefs, test_prefs"):
        load_preferences(with_splits, "dev")


def test_splits_that_say_nothing_must_be_chosen(tmp_path):
    sets = {name: datasets.Dataset.from_list([GOOD]) for name in ("easy", "hard")}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits easy, hard: choose one with --dataset_split"):
        load_preferences(str(tmp_path / "splits"))


# ------------------------------------------------------------------------------------------- what cannot be loaded


def truncated_gzip() -> bytes:
    return gzip.compress(lines([{**GOOD, "prompt": str(n)} for n in range(200)]).encode())[:-20]


UNREADABLE = {
    "missing file": ("none.jsonl", None, "is not there"),
    "wrong suffix": ("a.txt", b"x", r"ends in \.txt; it must be one of \.jsonl, .*\.jsonl\.gz"),
    "no suffix": ("pairs", b"x", "ends in nothing"),
    "wrong suffix within gzip": ("a.txt.gz", gzip.compress(b"x"), "must be one of"),
    "empty jsonl": ("a.jsonl", b"", "holds no rows"),
    "empty array": ("a.json", b"[]", "holds no rows"),
    "empty csv": ("a.csv", b"", "cannot be read as csv"),
    "csv of a heading": ("a.csv", b"prompt,chosen,rejected\n", "cannot be read as csv"),
    "empty parquet": ("a.parquet", b"", "cannot be read as parquet"),
    "csv that is not UTF-8": ("a.csv", b"prompt,chosen,rejected\np\xff,a,b\n", "cannot be read as csv: .*utf-8"),
    "broken line": ("a.jsonl", (lines([GOOD, GOOD]) + '{"prompt":\n').encode(), "row 2 is not JSON .*or remove it"),
    "broken array": ("a.json", b'[{"prompt": "p"},', "is not JSON"),
    "no gzip": ("a.jsonl.gz", lines([GOOD]).encode(), "cannot be read: Not a gzipped file"),
    "truncated gzip": ("a.jsonl.gz", truncated_gzip(), "cannot be read: .*ended before"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_says_so_in_one_line(case, tmp_path, caplog, monkeypatch):
    name, content, message = UNREADABLE[case]
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # to caplog
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_preferences(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not caplog.records, "datasets logs nothing itself"


def test_a_folder_without_data_says_so(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match="folder without data"):
        load_preferences(str(tmp_path))


def test_missing_columns_name_those_that_are_there(tmp_path):
    with pytest.raises(UserError, match=r"has the columns question, chosen; .* rename them"):
        checked(tmp_path, [{"question": "a", "chosen": "b"}])


# --------------------------------------------------------------------------------------------- rows that are left out

LEFT_OUT = {
    "no rejected": (MISSING, {"prompt": "p", "chosen": "a"}),
    "null response": (MISSING, {"prompt": "p", "chosen": None, "rejected": "b"}),
    "null prompt": (MISSING, {"prompt": None, "chosen": "a", "rejected": "b"}),
    "a number": (WRONG_TYPE, {"prompt": "p", "chosen": 5, "rejected": "b"}),
    "a number for a prompt": (WRONG_TYPE, {"prompt": 5, "chosen": "a", "rejected": "b"}),
    "a number for a chat's prompt": (WRONG_TYPE, {"prompt": 5, "chosen": [answer("a")], "rejected": [answer("b")]}),
    "a string and a chat": (WRONG_TYPE, {"prompt": "p", "chosen": [answer("a")], "rejected": "b"}),
    "no row at all": (WRONG_TYPE, "p"),
    "a list of strings": (WRONG_TYPE, {"prompt": "p", "chosen": ["a"], "rejected": ["b"]}),
    "a message without content": (
        WRONG_TYPE, {"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": [answer("b")]}),
    "an unknown role": (WRONG_TYPE, {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}),
    "a user's answer": (WRONG_TYPE, {"prompt": "p", "chosen": [user("a")], "rejected": [answer("b")]}),
    "half a surrogate pair": (NOT_UNICODE, {"prompt": "p", "chosen": "a \ud83d", "rejected": "b"}),
    "equal strings": (EQUAL, {"prompt": "p", "chosen": "a", "rejected": "a"}),
    "equal chats": (EQUAL, {"prompt": "p", "chosen": [answer("a")], "rejected": [answer("a")]}),
    "answers equal but for blanks": (EQUAL, {"prompt": CHAT, "chosen": "a ", "rejected": " a"}),
    "empty string": (EMPTY, {"prompt": "p", "chosen": "a", "rejected": ""}),
    "blank string": (EMPTY, {"prompt": "p", "chosen": " \n", "rejected": "b"}),
    "empty answer in a chat": (EMPTY, {"prompt": "p", "chosen": [answer("a")], "rejected": [answer("")]}),
    "empty answer in a dialogue": (EMPTY, {"chosen": DIALOGUE + " a", "rejected": DIALOGUE}),
    "dialogues with other questions": (
        DIFFER, {"chosen": DIALOGUE + " a", "rejected": DIALOGUE.replace("Sing", "Dance") + " b"}),
    "chats with other questions": (
        DIFFER, {"chosen": [user("x"), answer("a")], "rejected": [user("y"), answer("b")]}),
    "chats of other lengths": (
        DIFFER, {"chosen": [user("x"), answer("a")], "rejected": [user("x"), answer("b"), user("y"), answer("c")]}),
    "no common word": (NO_PROMPT, {"chosen": "Paris", "rejected": "Pisa"}),
    "a dialogue without answers": (NO_PROMPT, {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}),
    "a dialogue of answers alone": (NO_PROMPT, {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}),
    "no messages before the answer": (NO_PROMPT, {"chosen": [answer("a")], "rejected": [answer("b")]}),
    "an empty list of messages": (NO_PROMPT, {"prompt": [], "chosen": "a", "rejected": "b"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_row_that_cannot_be_used_is_counted_by_kind(case):
    kind, row = LEFT_OUT[case]
    out = rows_file._check_batch({sources.RAW: [json.dumps(GOOD), json.dumps(row)]}, [7, 8])
    assert (out["kind"], out["row"]) == (["", kind], [7, 8])


def test_the_report_names_every_kind_with_its_first_rows_and_keeps_row_numbers(tmp_path):
    rows = [dict(GOOD) for _ in range(20)]
    for n in (1, 3, 5, 7, 9, 11, 13):
        rows[n]["rejected"] = ""
    rows[4]["chosen"] = rows[4]["rejected"]
    pairs, report = checked(tmp_path, rows)
    assert report.left_out == {EMPTY: (7, [1, 3, 5, 7, 9]), EQUAL: (1, [4])}
    assert report.lines() == [
        "12 of 20 pairs are used",
        f"7 left out: {EMPTY} (rows 1, 3, 5, 7, 9, …)",
        f"1 left out: {EQUAL} (row 4)",
    ]
    assert pairs["row"][:] == [0, 2, 6, 8, 10, 12, 14, 15, 16, 17, 18, 19]


def test_json_rows_of_mixed_types_are_looked_at_one_by_one(tmp_path):
    chat = {"prompt": CHAT, "chosen": [answer("a")], "rejected": [answer("b")]}
    pairs, report = checked(tmp_path, [GOOD, 7, {**GOOD, "chosen": 5}, chat, None, [GOOD], {"prompt": "p"}, OTHER])
    assert pairs["row"][:] == [0, 3, 7] and pairs["messages"][1] == CHAT
    assert report.left_out == {WRONG_TYPE: (4, [1, 2, 4, 5]), MISSING: (1, [6])}


@pytest.mark.parametrize("mixed", [[], [7]], ids=["one type", "mixed types"])
def test_a_line_separator_within_a_string_ends_no_row(mixed, tmp_path):
    odd = {**GOOD, "prompt": "one\u2028two\x85three"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [odd, *mixed]))
    pairs, report = check_preferences(load_preferences(str(tmp_path / "a.jsonl")), 0.5)
    assert pairs["text"][:] == [odd["prompt"]] and report.total == 1 + len(mixed)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_row_that_is_not_utf_8_is_counted(zipped, tmp_path):
    content = lines([GOOD]).encode() + lines([GOOD]).encode().replace(b"Once", b"Onc\xe9") + lines([OTHER]).encode()
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    pairs, report = check_preferences(load_preferences(str(path)), 1.0)
    assert report.left_out == {NOT_UNICODE: (1, [1])} and pairs["text"][:] == ["Once", "Then"]


def test_answers_in_a_table_are_text_even_where_they_look_like_numbers_or_nothing(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\n2+2,4,5\n3+3,6,NA\n1+1,2,null\nx,"a,\nb",None\ny,1,\n')
    pairs, report = check_preferences(load_preferences(str(tmp_path / "a.csv")), 0.5)
    assert pairs["chosen"][:] == ["4", "6", "2", "a,\nb"] and pairs["rejected"][:] == ["5", "NA", "null", "None"]
    assert report.left_out == {EMPTY: (1, [4])}


@pytest.mark.parametrize(
    ("bad", "of", "allowed", "stops"),
    [(2, 20, None, False), (3, 20, None, True), (3, 20, 0.15, False), (29, 100, 0.29, False), (30, 100, 0.29, True),
     (1, 20, 0.0, True), (0, 20, 0.0, False), (19, 20, 1.0, False), (20, 20, 1.0, True)],
)  # fmt: skip
def test_more_than_a_tenth_left_out_stops_unless_allowed(bad, of, allowed, stops, tmp_path):
    rows = load_preferences(jsonl(tmp_path, [{**GOOD, "chosen": ""}] * bad + [GOOD] * (of - bad)))
    more = () if allowed is None else (allowed,)
    if stops:
        with pytest.raises(UserError, match=rf"{bad} of {of} rows cannot be used: {bad} x .* \(row.*--max_left_out"):
            check_preferences(rows, *more)
    else:
        assert check_preferences(rows, *more)[1].kept == of - bad


@pytest.mark.skipif(not HH.is_file(), reason=f"{HH} is not here")
def test_hh_as_it_is():
    rows = load_preferences(str(HH))
    pairs, report = check_preferences(rows)
    assert (report.total, report.kept, len(pairs)) == (2312, 2303, 2303)
    assert {kind: count for kind, (count, _) in report.left_out.items()} == {DIFFER: 5, EMPTY: 4}
    for pair in pairs:
        source = rows[pair["row"]]
        assert pair["text"] + pair["chosen"] == source["chosen"]
        assert pair["text"] + pair["rejected"] == source["rejected"]
        assert pair["text"].endswith("\n\nAssistant:") and pair["messages"][-1]["role"] != "assistant"
    for kind, (_, first) in report.left_out.items():
        for row in first:
            ends = [rows[row][key].rpartition("\n\nAssistant:") for key in ("chosen", "rejected")]
            assert (ends[0][0] != ends[1][0]) if kind == DIFFER else not all(end[2].strip() for end in ends)


# ---------------------------------------------------------------------------------------------------------- held out


def hashes(prompts) -> np.ndarray:
    return np.frombuffer(b"".join(prompt_hash(str(prompt)) for prompt in prompts), dtype=np.uint8).reshape(-1, 16)


def chosen_prompts(prompts, **options) -> set:
    return {prompt for prompt, held in zip(prompts, held_out(hashes(prompts), **options), strict=True) if held}


@pytest.mark.parametrize(("pairs", "held"), [(100, 5), (1000, 50), (10_000, 500), (30_000, 500), (2, 1), (12, 1)])
def test_a_twentieth_is_held_out_up_to_500(pairs, held):
    assert held_out(hashes(range(pairs))).sum() == held


def test_how_much_may_be_said():
    assert held_out(hashes(range(200)), fraction=1.0, most=30).sum() == 30


def test_all_of_a_single_prompt_is_for_training():
    assert held_out(hashes(["one"] * 7)).sum() == 0
    assert held_out(hashes(["one"] * 7 + ["two"]), fraction=1.0).sum() in (1, 7)


def test_no_prompt_is_on_both_sides():
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, 300, 2000)
    held = held_out(hashes(prompts))
    assert not set(prompts[held]) & set(prompts[~held])
    most = np.bincount(prompts).max()
    assert 100 <= held.sum() < 100 + most, "at least as many as wanted, and fewer than one prompt's more"


def test_the_choice_does_not_depend_on_the_order_of_the_rows():
    generator = np.random.default_rng(1)
    prompts = list(generator.integers(0, 500, 1000))
    assert chosen_prompts(prompts) == chosen_prompts(list(generator.permutation(prompts))) != set()


def test_the_choice_hardly_moves_when_rows_are_added():
    first, more = chosen_prompts(range(2000)), chosen_prompts(range(2020))
    assert len(first - more) <= 2
