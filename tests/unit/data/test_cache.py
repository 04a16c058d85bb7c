"""Tokenised pairs on disk: made once for each content, whole or not there, groups joined, everything counted."""

import json
import multiprocessing
import shutil

import datasets
import numpy as np
import pytest
from byte_tokenizer import tokenizer

from dpo_ds.data import cache
from dpo_ds.data.cache import tokenize_pairs
from dpo_ds.data.counts import Report
from dpo_ds.data.encoded import NO_ROOM
from dpo_ds.data.encoder import Encoder, Tokenizing
from dpo_ds.data.held_out import prompt_hash
from dpo_ds.data.pairs import PairSet
from dpo_ds.data.rows.forms import read_row
from dpo_ds.data.rows.preferences import NO_DIFFERENCE
from dpo_ds.data.rows.row import Reading
from dpo_ds.data.sources import Split
from dpo_ds.errors import UserError

COUNT = 40
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)


def rows_of(content: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(content)


def plain_rows(count=COUNT, **changes) -> datasets.Dataset:
    """`changes`: {field: value} of row 3."""
    rows = [{"prompt": f"Question {n}:", "chosen": f" answer {n}", "rejected": f" no {n * n}"} for n in range(count)]
    rows[3] |= changes
    return rows_of(rows)


def made(folder, *sources, tok=None, max_length=64, join=True, num_proc=None, reading=None, **options):
    """The set and its reports."""
    sources = sources or (plain_rows(),)
    encoder = Encoder(tok or tokenizer(), Tokenizing(max_length, **options))
    splits = [Split("train", rows, rows.column_names) for rows in sources]
    folder, reports = tokenize_pairs(splits, encoder, reading or Reading(), join, folder, num_proc)
    return PairSet.open(folder), reports


def folders(folder) -> list:
    return sorted(folder.iterdir())


def same(one: PairSet, other: PairSet) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "margins")
        for name in PairSet.__dataclass_fields__
    )


def test_a_set_holds_every_pair_as_encoded(tmp_path):
    rows, tok = plain_rows(), tokenizer()
    pairs, _ = made(tmp_path, rows, tok=tok)
    encoded = Encoder(tok, Tokenizing(64)).encode([read_row(row, Reading()) for row in rows])
    assert len(pairs) == COUNT and pairs.tokens.dtype == np.int32 and isinstance(pairs.tokens, np.memmap)
    for n, expected in enumerate(encoded):
        assert [list(part) for part in pairs.pair(n)] == [expected.prompt, *expected.answers]
        assert pairs.packed_lengths[n] == sum(map(len, [expected.prompt, *expected.answers]))
        assert pairs.prompt_hashes[n].tobytes() == prompt_hash(rows[n]["prompt"])
    assert len({pairs.pair_id(n) for n in range(COUNT)}) == COUNT and list(pairs.rows) == list(range(COUNT))
    assert not len(pairs.scored) and set(pairs.weights) == {1} and np.isnan(pairs.margins).all()


# --------------------------------------------------------------------------------------------------------------- groups


def several(n: int, prompt: str | None = None, **more) -> dict:
    """A row with four answers to one prompt."""
    answers = [f" answer {n} {letter}" for letter in "abcd"]
    return {"prompt": prompt or f"Question {n}:", "responses": answers, "scores": [4.0, 1.0, 3.0, 2.0], **more}


@pytest.mark.parametrize("choice", ["all", "best_worst", "adjacent"])
def test_each_answer_is_there_once_and_each_pair_points_to_its_own(choice, tmp_path):
    rows = rows_of([several(n) for n in range(5)])
    reading = Reading(pairs=choice)
    pairs, (report,) = made(tmp_path, rows, reading=reading)
    expected = [read_row(row, reading) for row in rows]
    assert len(pairs) == report.pairs == 5 * {"all": 6, "best_worst": 1, "adjacent": 3}[choice]
    assert len(pairs.answers) == 5 * (2 if choice == "best_worst" else 4) and len(pairs.prompts) == 5
    tok, at = tokenizer(), 0
    for n, comparison in enumerate(expected):
        for wanted in comparison.pairs:
            texts = [tok.decode(part) for part in pairs.pair(at)]
            answers = [comparison.answers[place].text for place in (wanted.chosen, wanted.rejected)]
            assert texts == [f"Question {n}:", *(f"{answer}</s>" for answer in answers)]
            assert pairs.margins[at] == pytest.approx(wanted.margin) and pairs.rows[at] == n
            at += 1


def test_rows_of_one_prompt_become_one_group_if_asked_for(tmp_path):
    """The third row brings an answer that is there already, and the fourth a pair that is."""
    rows = [
        {"prompt": "A:", "chosen": " one", "rejected": " two"},
        {"prompt": "B:", "chosen": " one", "rejected": " two"},
        {"prompt": "A:", "chosen": " one", "rejected": " three"},
        {"prompt": "A:", "chosen": " one", "rejected": " two"},
    ]
    joined, _ = made(tmp_path, rows_of(rows))
    assert (len(joined), len(joined.prompts), len(joined.answers)) == (4, 2, 5)
    assert list(joined.rows) == [0, 2, 3, 1] and list(joined.pair_groups) == [0, 0, 0, 1]
    assert joined.pairs.tolist() == [[0, 1], [0, 2], [0, 1], [3, 4]]
    apart, _ = made(tmp_path, rows_of(rows), join=False)
    assert (len(apart), len(apart.prompts), len(apart.answers)) == (4, 4, 8) and list(apart.rows) == [0, 1, 2, 3]
    by_row = {int(row): joined.pair_id(n) for n, row in enumerate(joined.rows)}
    assert [by_row[n] for n in range(4)] == [apart.pair_id(n) for n in range(4)]


def test_weights_and_margins_stay_with_their_pairs(tmp_path):
    rows = [
        {"prompt": f"Q{n % 3}:", "chosen": f" a{n}", "rejected": " b", "weight": 1.0 + n, "margin": n / 2}
        for n in range(7)
    ]
    pairs, _ = made(tmp_path, rows_of(rows))
    assert sorted(pairs.rows) == list(range(7)) and list(pairs.rows) != list(range(7))
    assert list(pairs.weights) == [1.0 + n for n in pairs.rows] and list(pairs.margins) == [n / 2 for n in pairs.rows]


def test_what_is_not_learned_is_kept_with_its_answer(tmp_path):
    """A dialogue that forks before its last answer: of the user's turn no token is learned."""
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: I.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Go.\n\nHuman: Why?\n\nAssistant: So.",
    }
    short = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    pairs, _ = made(tmp_path, rows_of([row, short, row]))
    tok = tokenizer()
    for i, row_number in enumerate(pairs.rows):
        group = pairs.group(*pairs.parts([i], 1000))
        learned = [tok.decode(answer[mask]) for answer, mask in zip(group.answers, group.scored, strict=True)]
        if row_number == 1:
            assert learned == [" Yes.</s>", " No.</s>"] and all(mask.all() for mask in group.scored)
        else:
            assert "Who" not in learned[0] and learned[0].startswith(" Hello.") and learned[0].endswith(" I.</s>")
            assert "Why" not in learned[1] and "Why" in tok.decode(group.answers[1])


def test_several_sources_are_one_set_which_knows_where_each_pair_is_from(tmp_path):
    one, other = plain_rows(5), plain_rows(4, chosen=" another")
    pairs, reports = made(tmp_path, one, other)
    assert [report.rows for report in reports] == [5, 4] and len(pairs) == 9 and len(pairs.prompts) == 5
    found = sorted(zip(pairs.sources.tolist(), pairs.rows.tolist(), strict=True))
    assert found == [(0, n) for n in range(5)] + [(1, n) for n in range(4)]


# ----------------------------------------------------------------------------------------------- once, for each content


def test_the_same_content_is_tokenised_once(tmp_path, monkeypatch):
    first, reports = made(tmp_path)
    (folder,) = folders(tmp_path)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    monkeypatch.setattr(cache, "_Writer", None)
    again, same_reports = made(tmp_path)
    assert same(first, again) and same_reports == reports
    assert before == {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_how_the_rows_are_cut_up_does_not_matter(tmp_path):
    whole = plain_rows(30)
    scattered = datasets.concatenate_datasets([whole.select(range(10, 30)), whole.select([5, 4, 3, 2, 1, 0])])
    scattered = datasets.concatenate_datasets([scattered, whole.select(range(6, 10))]).select(
        [*range(25, 19, -1), *range(26, 30), *range(20)]
    )
    for rows in (whole, scattered):
        made(tmp_path, rows)
    assert len(folders(tmp_path)) == 1


MISSES = {
    "an answer": dict(rows=lambda: plain_rows(chosen=" another")),
    "a prompt": dict(rows=lambda: plain_rows(prompt="Another:")),
    "a row less": dict(rows=lambda: plain_rows(COUNT - 1)),
    "max_length": dict(max_length=65),
    "truncation": dict(truncation="keep_start"),
    "chat_template": dict(chat_template="none"),
    "the date": dict(date="2026-01-01"),
    "the template": dict(tok=lambda: tokenizer(CHATML)),
    "the special tokens": dict(tok=lambda: tokenizer(eos="<s>")),
    "what the tokenizer adds": dict(tok=lambda: tokenizer(adds="<s> $A")),
    "the vocabulary": dict(tok=lambda: tokenizer(extra=["Question"])),
    "how rows are read": dict(reading=Reading(pairs="all")),
    "groups": dict(join=False),
}


@pytest.mark.parametrize("what", MISSES)
def test_another_content_is_another_set(what, tmp_path):
    made(tmp_path)
    changes = {key: value() if callable(value) else value for key, value in MISSES[what].items()}
    rows = changes.pop("rows", plain_rows())
    made(tmp_path, rows, **changes)
    assert len(folders(tmp_path)) == 2


def test_several_processes_give_the_set_that_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 1)
    rows = plain_rows(prompt="What is the answer? " * 20)
    one, reports = made(tmp_path / "one", rows, num_proc=1)
    two, other_reports = made(tmp_path / "two", rows, num_proc=2)
    assert same(one, two) and reports == other_reports


def test_the_slower_of_two_processes_takes_the_fasters_set(tmp_path, monkeypatch):
    write = cache._Writer.write

    def overtaken(*arguments):
        write(*arguments)
        monkeypatch.setattr(cache._Writer, "write", write)
        fast.append(made(tmp_path)[0])

    fast: list[PairSet] = []
    monkeypatch.setattr(cache._Writer, "write", overtaken)
    assert same(made(tmp_path)[0], fast[0]) and len(folders(tmp_path)) == 1


def tokenise_at_once(folder, ready, results):
    ready.wait()
    results.put(made(folder)[0].digest)


def test_two_processes_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, results = fork.Barrier(2), fork.Queue()
    both = [fork.Process(target=tokenise_at_once, args=(tmp_path, ready, results)) for _ in range(2)]
    for process in both:
        process.start()
    digests = {results.get(timeout=60) for _ in both}
    for process in both:
        process.join(60)
    assert digests == {made(tmp_path)[0].digest} and len(folders(tmp_path)) == 1


def test_a_failed_tokenising_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path)
    assert folders(tmp_path) == []


def shorten(path):
    path.write_bytes(path.read_bytes()[:-40])


def rewrite(path):
    path.write_text(path.read_text().replace('"pairs": 5', '"pairs": 4'))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "no manifest": ("manifest.json", lambda path: path.unlink()),
    "half a manifest": ("manifest.json", shorten),
    "a manifest of something else": ("manifest.json", lambda path: path.write_text("[1]")),
    "a manifest without its numbers": ("manifest.json", lambda path: path.write_text("{}")),
    "no tokens": ("tokens.int32", lambda path: path.unlink()),
    "tokens cut short": ("tokens.int32", shorten),
    "tokens of an odd size": ("tokens.int32", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "no tokens at all": ("tokens.int32", lambda path: path.write_bytes(b"")),
    "an empty file": ("answers.npy", lambda path: path.write_bytes(b"")),
    "fewer rows": ("rows.npy", lambda path: np.save(path, np.load(path)[:-1])),
    "fewer answers": ("answers.npy", lambda path: np.save(path, np.load(path)[:-1])),
    "no array": ("prompts.npy", lambda path: path.write_text("none")),
}
# What only a checksum shows.
SILENT = {
    "a flipped byte of a token": ("tokens.int32", flip),
    "a flipped byte of a length": ("answers.npy", flip),
    "a flipped byte of a pair": ("pairs.npy", flip),
    "an edited report": (
        "manifest.json",
        lambda path: path.write_text(path.read_text().replace('"rows": 5', '"rows": 6')),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE | SILENT)
def test_a_damaged_set_is_made_again(damage, tmp_path, capsys):
    digest = made(tmp_path, plain_rows(5))[0].digest
    assert made(tmp_path, plain_rows(5))[0].digest == digest and "made again" not in capsys.readouterr().out
    (folder,) = folders(tmp_path)
    name, harm = (DAMAGE | SILENT)[damage]
    before = (folder / name).read_bytes()
    harm(folder / name)
    assert not (folder / name).exists() or (folder / name).read_bytes() != before
    assert made(tmp_path, plain_rows(5))[0].digest == digest and folders(tmp_path) == [folder]
    assert (folder / name).read_bytes() == before
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"dpo_ds: the tokenised pairs in {folder} are damaged ({name}") and said.endswith(
        "made again"
    )


def test_a_set_of_other_rows_is_not_taken(tmp_path, capsys):
    """A folder was copied under another one's name. Each of its files is whole."""
    mine, other = (made(tmp_path / name, plain_rows(n))[0].digest for name, n in (("mine", 5), ("other", 6)))
    (folder,), (theirs,) = folders(tmp_path / "mine"), folders(tmp_path / "other")
    shutil.rmtree(folder)
    shutil.copytree(theirs, folder)
    assert made(tmp_path / "mine", plain_rows(5))[0].digest == mine != other
    assert f"{folder} are damaged (they are those of other rows or options): they are made again" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_set_that_is_damaged_while_it_is_used_says_which_folder_to_remove(damage, tmp_path):
    made(tmp_path)
    (folder,) = folders(tmp_path)
    name, harm = DAMAGE[damage]
    harm(folder / name)
    with pytest.raises(UserError, match="remove it") as error:
        PairSet.open(folder)
    assert str(folder) in str(error.value)


# ----------------------------------------------------------------------------------------------------------- the report


def test_what_is_left_out_is_counted_and_named(tmp_path):
    rows = [{"prompt": f"Question {n}:", "chosen": f" answer {n}", "rejected": f" no {n}"} for n in range(20)]
    for n in (1, 3, 5):
        rows[n]["prompt"] *= 30
    rows[7]["rejected"] = rows[7]["chosen"]
    for _ in range(2):  # the second time from the cache
        pairs, (report,) = made(tmp_path, rows_of(rows), truncation="keep_start")
        assert len(pairs) == report.used == 16 and list(pairs.rows) == [0, 2, 4, 6, *range(8, 20)]
        assert tuple(report.left_out[NO_ROOM]) == (3, [1, 3, 5]) and len(report.left_out) == 2
        with pytest.raises(UserError, match=r"4 of 20 rows cannot be used: .*3 x no room .* \(rows 1, 3, 5\)"):
            report.check(0.15)
        report.check(0.2)


def test_one_verdict_that_puts_all_in_doubt_stops_whatever_may_be_left_out(tmp_path):
    rows = [{"prompt": f"p{n}", "response_1": "a", "response_2": "b", "preference": n and 1} for n in range(9)]
    _, (report,) = made(tmp_path, rows_of(rows))
    assert report.used == 8
    with pytest.raises(
        UserError, match=r"a verdict is 0 where the answers' names are 1 and 2.* \(row 0; counted from 0\)"
    ):
        report.check(1.0)


def test_nothing_left_stops_whatever_may_be_left_out(tmp_path):
    _, (report,) = made(tmp_path, plain_rows(10), max_length=2, truncation="keep_start")
    with pytest.raises(UserError, match="10 of 10 rows cannot be used"):
        report.check(1.0)


def test_what_was_cut_dropped_and_not_used_is_counted(tmp_path):
    rows = [several(n, source="web") for n in range(6)]
    rows[2]["prompt"] = "What is the answer? " * 20
    rows[4]["responses"] = [" the same words " * 9 + end for end in "abcd"]
    pairs, (report,) = made(tmp_path, rows_of(rows), max_length=30, reading=Reading(pairs="all"))
    lines = report.lines()
    assert lines[0].startswith("5 of 6 rows are used: 30 pairs") and len(pairs) == 30
    assert "not used: column source (6 rows)" in lines
    (cut,) = [line for line in lines if "prompts cut" in line]
    assert cut.startswith("1 row with prompts cut: 1 prompt, by ") and cut.endswith("(row 2)")
    assert any(line.startswith("1 left out: the answers are equal once cut") for line in lines), lines


def test_the_cut_is_said_for_each_answer_not_for_each_row():
    report = Report(2)
    for row, cuts in enumerate(([10, 0, 20], [30, 0])):
        report.add({"row": row, "left_out": "", "changed": [], "unused": [], "cut_prompt": 0, "cut_answers": cuts,
                    "weights": [1.0], "dropped_pairs": 0, "spare_answers": 0})  # fmt: skip
    assert report.lines()[-1] == "2 rows with answers cut: 3 answers, by 20 tokens on average (rows 0, 1)"


def test_a_report_survives_the_manifest():
    report = Report(3)
    report.add({"row": 1, "left_out": "why", "changed": [], "unused": ["column x"], "cut_prompt": 4, "cut_answers": [],
                "weights": [], "dropped_pairs": 0, "spare_answers": 0})  # fmt: skip
    again = Report.read(json.loads(json.dumps(report.saved())))
    assert again.lines() == report.lines() and again.used == 2


# ------------------------------------------------------------------------------------------------- reasons, grouped


def counting(*left_out, rows=None, **facts) -> Report:
    """The report on rows that are left out for these reasons; the others, up to `rows`, are used."""
    report = Report(len(left_out) if rows is None else rows)
    for row, reason in enumerate(left_out):
        report.add({"row": row, "left_out": reason, "changed": [], "unused": [], "cut_prompt": 0, "cut_answers": [],
                    "weights": [], "dropped_pairs": 0, "spare_answers": 0, **facts})  # fmt: skip
    return report


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (lambda n: f'scores is "word {n}", which is text; it must be a number',
         'scores is …, which is text; it must be a number (such as "word 0", "word 1", "word 2", …)'),
        (lambda n: f"preference is 0.{n}1, but the answers are a and b",
         "preference is …, but the answers are a and b (such as 0.01, 0.11, 0.21, …)"),
    ],
)  # fmt: skip
def test_reasons_that_differ_in_what_was_found_are_one(reason, kind):
    report = counting(*map(reason, range(1000)))
    assert report.lines()[1:] == [f"1000 left out: {kind} (rows 0, 1, 2, 3, 4, …)"]
    with pytest.raises(UserError) as refusal:
        report.check(0.1)
    assert f"1000 of 1000 rows cannot be used: 1000 x {kind} (rows 0, 1, 2, …)" in str(refusal.value)


def test_a_refusal_and_a_report_stay_short_whatever_the_rows_hold():
    report = counting(*(f"column {'x' * 500}{n} is odd" for n in range(3000)), "the usual", "the usual")
    report.changed, report.unused = dict(report.left_out), dict(report.left_out)
    with pytest.raises(UserError) as refusal:
        report.check(0.1)
    assert len(str(refusal.value)) < 2000 and "2 x the usual (rows 3000, 3001)" in str(refusal.value)
    assert "2997 x 2,996 further reasons" not in str(refusal.value) and "2,996 further reasons" in str(refusal.value)
    assert len(report.lines()) < 50 and "2981 left out: for 2,981 further reasons" in report.lines()


TIES = ["all answers are as good as each other", 'winner is "tie": all answers are as good as each other',
        "--pairs above_margin: no answer is better than another by --min_margin"]  # fmt: skip


@pytest.mark.parametrize("tie", TIES)
def test_rows_without_a_preference_do_not_stop_a_run(tie):
    report = counting(*[tie] * 6, "an answer is empty", rows=10)
    report.check(0.1)
    assert "6 left out" in report.lines()[1]
    with pytest.raises(UserError, match=r"^2 of 10 rows cannot be used: 2 x an answer is empty \(rows 6, 7\)"):
        counting(*[tie] * 6, *["an answer is empty"] * 2, rows=10).check(0.1)
    with pytest.raises(UserError, match=r"6 of 6 rows cannot be used: 6 x .*; correct the data$"):
        counting(*[tie] * 6).check(1.0)


@pytest.mark.parametrize(("choice", "spare"), [("best_worst", 4), ("all", 0), ("adjacent", 0), ("above_margin", 4)])
def test_answers_in_no_pair_are_counted(tmp_path, choice, spare):
    _, (report,) = made(tmp_path, rows_of([several(n) for n in range(2)]), reading=Reading(pairs=choice, min_margin=3))
    said = [line for line in report.lines() if "in no pair" in line]
    assert said == ([f"{spare} answers in no pair: --pairs all uses more"] if spare else [])


def test_pairs_whose_scores_are_equal_are_trained_and_counted(tmp_path):
    rows = [{"prompt": f"Question {n}:", "chosen": " a", "rejected": " b", "score_chosen": n, "score_rejected": 2}
            for n in range(2, 5)]  # fmt: skip
    pairs, (report,) = made(tmp_path, rows_of(rows))
    assert pairs.margins.tolist() == [0, 1, 2]
    assert report.lines()[1:] == [f"1 noted: {NO_DIFFERENCE} (row 0)"]
