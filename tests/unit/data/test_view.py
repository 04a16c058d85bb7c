"""python -m dpo_ds.data: what it shows is what a run trains, on a terminal, in plain text and as a page."""

import io
import json
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser

import launching
import numpy as np
import pytest
import templates
import tiny
from rich.console import Console

from dpo_ds.config import parse_options
from dpo_ds.data.__main__ import main, parse
from dpo_ds.data.view import Cut, Run, Summary, first_groups, shown_group, token_texts, visible
from dpo_ds.models.files import load_tokenizer
from dpo_ds.models.find import find_model
from dpo_ds.ranks import console
from dpo_ds.ranks.world import from_environment
from dpo_ds.reports.data_listing import Listing, sparkline
from dpo_ds.runs.data import load_pairs, read_pairs

QWEN_3, GEMMA, PLAIN = "Qwen/Qwen3-8B", "google/gemma-7b-it", "gpt2"
DAY = "2026-11-26"


def model_folder(folder, name: str):
    """A model's folder without weights."""
    folder = folder / tiny.short(name)
    if not folder.is_dir():
        templates.tokenizer(name).save_pretrained(folder)
        config = tiny.config("llama")
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("view")


def chat(*turns: str) -> list[dict]:
    """ "a: Hi" is the assistant's message Hi."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


EVIL = "<script>alert('&')</script> \x1b[31m \u202eback &lt; ⟦"
WORDS = " ".join(f"w{n}" for n in range(200))
ROWS = [
    {"prompt": chat("u: Ask"), "chosen": chat("a: One 🙂", "u: More", "a: né 日本"), "rejected": chat("a: No")},
    {"prompt": chat("s: Be kind.", f"u: {EVIL}"), "chosen": chat(f"a: {EVIL}"), "rejected": chat("a: No"), "web": 1},
    {"prompt": chat("u: Old", "a: Older", f"u: {WORDS}"), "chosen": chat("a: " + "yes " * 150),
     "rejected": chat("a: No"), "weight": 0.5, "margin": 2.0},
    {"prompt": chat("u: Empty"), "chosen": chat("a:  "), "rejected": chat("a: No")},
    {"prompt": chat("u: Ask"), "chosen": chat("a: Two"), "rejected": chat("a: No")},
    *({"prompt": chat(f"u: Say {n}"), "chosen": chat(f"a: {n}"), "rejected": chat("a: None")} for n in range(9)),
]  # fmt: skip
SEVERAL = [
    {"prompt": f"Name fruit {n}.", "responses": ["Fig.", "Kiwi.", "Plum."], "scores": [1.0, 3.0, 1.5]} for n in range(9)
]


@pytest.fixture(scope="module")
def files(folder):
    for name, rows in (("rows", ROWS), ("several", SEVERAL)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options_of(files, model=QWEN_3, data="rows", *more: str):
    return [str(files / f"{data}.jsonl"), f"--model={model_folder(files, model)}", f"--cache_dir={files / 'cache'}",
            "--max_length=120", *more]  # fmt: skip


def loaded(files, *arguments):
    """What a run reads, and its tokenizer."""
    _, options = parse(options_of(files, *arguments))
    tokenizer = load_tokenizer(find_model(options.model))
    return read_pairs(options, tokenizer, from_environment(), DAY), tokenizer


def shown(files, *arguments, only: int | None = None):
    found, tokenizer = loaded(files, *arguments)
    groups = range(len(found.train.prompts)) if only is None else [only]
    return [shown_group(found.train, group, ["rows"], tokenizer) for group in groups]


# ---------------------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("model", [*templates.SHAPES, *templates.OTHERS])
def test_marks_are_those_of_the_set_and_texts_those_of_the_tokenizer(model, files):
    found, tokenizer = loaded(files, model, "rows", "--eval_pairs=0")
    pairs, several = found.train, 0
    for group in range(len(pairs.prompts)):
        seen = shown_group(pairs, group, ["rows"], tokenizer)
        prompt = pairs.prompt(group).tolist()
        assert "".join(token.text for token in seen.prompt.tokens) == tokenizer.decode(prompt)
        assert [token.special for token in seen.prompt.tokens] == [id in tokenizer.all_special_ids for id in prompt]
        assert not any(token.scored for token in seen.prompt.tokens)
        for answer, number in zip(seen.answers, np.flatnonzero(pairs.answer_groups == group), strict=True):
            ids, mask = pairs.answer(number).tolist(), pairs.scored_of(number)
            several += mask is not None and not mask.all()
            assert [token.scored for token in answer.tokens] == ([True] * len(ids) if mask is None else mask.tolist())
            whole = "".join(token.text for token in [*seen.prompt.tokens, *answer.tokens])
            assert whole == tokenizer.decode(prompt + ids) and len(answer.tokens) == len(ids)
    assert several == 1


def test_a_character_of_several_tokens_stands_with_the_last_of_them():
    tokenizer = templates.tokenizer(PLAIN)
    ids = tokenizer("a 🙂b")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "a 🙂b" and "" in texts and all("\ufffd" not in text for text in texts)
    cut = token_texts(tokenizer, ids[: texts.index("🙂")] if "🙂" in texts else ids[:-2])
    assert "".join(cut).startswith("a ") and len(cut) < len(ids)


def test_what_was_cut_stands_where_it_was(files):
    (group,) = [group for group in shown(files) if group.where == "row 2 of rows"]
    turns, middle = [run.tokens for run in group.prompt.runs() if isinstance(run, Cut)]
    whole = templates.tokenizer(QWEN_3).apply_chat_template(ROWS[2]["prompt"], add_generation_prompt=True)["input_ids"]
    assert turns + middle == len(whole) - len(group.prompt.tokens)
    found, _ = loaded(files)
    (_, report) = found.train_reports[0]
    texts = ["[CUT]" if isinstance(run, Cut) else run.text for run in group.prompt.runs()]
    assert re.search(r"user\n\[CUT\]w0 w1 .*\[CUT\].* w198 w199<\|im_end\|>", "".join(texts))
    *_, last = group.answers[0].runs()
    assert last == Cut(report.cut_tokens["answers"]) and isinstance([*group.answers[1].runs()][-1], Run)


def test_what_could_act_on_a_terminal_is_shown_instead():
    assert visible(EVIL) == "<script>alert('&')</script> ␛[31m <U+202E>back &lt; ⟦"
    assert visible("né 日本\n\t🙂\u200d") == "né 日本\n\t🙂\u200d" and visible("\r\x7f\x9b") == "␍<U+007F><U+009B>"


# ----------------------------------------------------------------------------------------------------------- which rows


def test_the_first_rows_come_in_the_order_of_the_data(files):
    found, tokenizer = loaded(files)
    groups = [shown_group(found.train, group, ["rows"], tokenizer) for group in first_groups(found.train, 4)]
    rows = [int(re.search(r"\d+", group.where)[0]) for group in groups]
    assert rows == sorted(rows) and len(rows) == 4
    assert groups[0].where == "rows 0, 4 of rows" and len(groups[0].answers) == 3, "two rows with one prompt"


def test_titles_say_which_answer_is_better(files):
    (pair,) = [group for group in shown(files) if group.where == "row 2 of rows"]
    assert [pair.verdict(n) for n in (0, 1)] == ["chosen (margin 2, weight 0.5)", "rejected"]
    group = shown(files, GEMMA, "several", "--pairs=all", only=0)[0]
    assert [group.verdict(n) for n in range(3)] == [
        "answer 1: rejected for 2, 3",
        "answer 2: chosen over 1 (margin 2), 3 (margin 1.5)",
        "answer 3: chosen over 1 (margin 0.5); rejected for 2",
    ]
    assert [group.role(n) for n in range(3)] == ["rejected", "chosen", "both"]


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("data", [("rows",), ("several", "--pairs=all")])
def test_the_summary_counts_what_the_set_holds(data, files):
    found, _ = loaded(files, QWEN_3, *data)
    pairs, summary = found.train, Summary.of(found.train)
    masks = [pairs.scored_of(answer) for answer in range(len(pairs.answers))]
    assert summary.learned == sum(
        len(pairs.answer(answer)) if mask is None else int(mask.sum()) for answer, mask in enumerate(masks)
    )
    triples = [pairs.pair(n) for n in range(len(pairs))]
    assert summary.apart == sum(2 * len(p) + len(c) + len(r) for p, c, r in triples)
    assert summary.packed == sum(map(len, map(pairs.prompt, range(len(pairs.prompts))))) + sum(
        len(pairs.answer(answer)) for answer in range(len(pairs.answers))
    )
    assert (summary.pairs, summary.prompts, summary.answers) == (len(pairs), len(pairs.prompts), len(pairs.answers))
    assert list(summary.per_prompt["pairs"]) == [list(pairs.pair_groups).count(n) for n in range(len(pairs.prompts))]


def test_a_sparkline_has_its_peak_where_most_are():
    line = sparkline(np.array([1] * 50 + [8] * 3 + [16]))
    assert len(line) == 16 and line[0] == "█" and line[1] == " " and line[-1] == "▁"
    assert sparkline(np.array([7, 7])) == ""


# --------------------------------------------------------------------------------------------------------- the terminal


def test_plain_text_has_the_report_the_numbers_and_the_rows(files, capsys):
    main(options_of(files, QWEN_3, "rows", "--rows=1"))
    out = capsys.readouterr().out
    found, _ = loaded(files)
    lines = [f"dpo_ds: {files / 'rows.jsonl'}: {line}" for line in found.train_reports[0][1].lines()]
    assert lines == capsys.readouterr().out.splitlines(), "what a run says"
    assert all(line in out.splitlines() for line in lines)
    assert f"{len(found.train)} training pairs: " in out and len(found.held_out) == 1
    assert "1 held-out pair: 1 prompt" in out and "; --loss odpo and --pairs above_margin read them" in out
    assert "\x1b" not in out and "margins (known for 1 of" in out and "weights: from 0.5 to 1" in out
    assert re.search(r"rows 0, 4 of \S+rows.jsonl · \d+ tokens", out)
    assert "One 🙂<|im_end|>⟦\n  <|im_start|>user\n  More<|im_end|>\n  <|im_start|>assistant\n  ⟧<think>" in out


def test_colours_say_what_is_learned(files):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=60, no_color=False)
    (group,) = [group for group in shown(files) if group.where == "row 1 of rows"]
    Listing(console).groups([group])
    text = out.getvalue()
    assert "␛[31m" in text and "\x1b[31m <U" not in text, "the data's own escape is not one"
    green = "".join(re.findall(r"\x1b\[(?:7;)?32m([^\x1b]*)", text[text.index("──") :]))
    assert "".join(green.split()) == "".join(visible("".join(token.text for token in group.answers[0].tokens)).split())
    plain = re.sub(r"\x1b\[[\d;]*m", "", text[text.index("──") :])
    assert "\x1b[7;31m<|im_end|>" in text and all(len(line) <= 60 for line in plain.splitlines())


# ------------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """The page's tags, and the text of each kind of element."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.inside: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.inside.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert tag == self.inside.pop(), "tags nest"

    def handle_data(self, data):
        for tag in {*self.inside}:
            self.texts[tag][-1] += data


def page_of(files, tmp_path, *arguments) -> Page:
    main([*options_of(files, *arguments), f"--html={tmp_path / 'new' / 'page.html'}"])
    return Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))


def test_the_page_shows_texts_as_texts_and_needs_nothing_else(files, tmp_path):
    page = page_of(files, tmp_path, QWEN_3, "rows", "--rows=20")
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "p", "span", "code", "div", "ul"),
        *("li", "table", "tr", "th", "td", "figure", "img", "section", "pre", "mark", "i"),
    }
    for tag, attributes in page.tags:
        assert not {"href", "onclick", "onload", "style"} & {*attributes}
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
    assert "url(" not in page.texts["style"][0] and "@import" not in page.texts["style"][0]
    assert not page.inside[2:] and "<script>alert('&')</script> ␛[31m <U+202E>back" in "".join(page.texts["pre"])


def test_the_page_marks_exactly_the_learned_tokens(files, tmp_path):
    groups = shown(files)
    order = sorted(groups, key=lambda group: int(re.search(r"\d+", group.where)[0]))
    page = page_of(files, tmp_path, QWEN_3, "rows", "--rows=20")
    learned = "".join(
        run.text for group in order for answer in group.answers for run in answer.runs()
        if isinstance(run, Run) and run.scored
    )  # fmt: skip
    legend = 3
    assert "".join(page.texts["mark"][legend:]).replace("↵", "") == learned
    assert len(page.texts["section"]) == len(groups)
    whole = [
        "".join(f"[… {run.tokens:,} tokens cut …]" if isinstance(run, Cut) else run.text for run in part.runs())
        for group in order
        for part in (group.prompt, *group.answers)
    ]
    assert [text.replace("↵", "") for text in page.texts["pre"]] == whole


def test_the_page_has_the_counts_of_the_report(files, tmp_path):
    page = page_of(files, tmp_path)
    found, _ = loaded(files)
    _, report = found.train_reports[0]
    cells = page.texts["td"]
    at = cells.index(str(files / "rows.jsonl"))
    counts = (report.rows, report.used, report.rows - report.used, report.pairs)
    assert cells[at + 1 : at + 5] == [str(count) for count in counts] == ["14", "13", "1", "13"]
    for kinds in (report.left_out, report.changed, report.unused):
        for kind, (count, _) in kinds.items():
            assert cells[cells.index(kind) + 1] == str(count)
    assert {*report.unused} == {"column web"} and len(report.left_out) == 1 and report.cut


def test_histograms_are_images_in_the_page_and_files(files, tmp_path):
    pytest.importorskip("matplotlib")
    page = page_of(files, tmp_path, QWEN_3, "rows", f"--plots={tmp_path / 'plots'}")
    assert [tag for tag, _ in page.tags].count("img") == 3
    images = sorted((tmp_path / "plots").iterdir())
    assert [image.name for image in images] == ["answer.png", "packed_row.png", "prompt.png"]
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)


def test_without_matplotlib_the_page_says_what_to_install(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(files, tmp_path)
    assert "pip install matplotlib" in page.texts["p"] or any("pip install matplotlib" in p for p in page.texts["p"])
    assert "img" not in [tag for tag, _ in page.tags]


# ------------------------------------------------------------------------------------------------------ as a run has it


def test_nothing_is_fetched_and_the_run_reads_the_same_set(files, tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("a network connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    cache = tmp_path / "cache"
    arguments = [f"--model={model_folder(files, QWEN_3)}", f"--dataset={files / 'rows.jsonl'}", f"--cache_dir={cache}"]
    main(arguments)
    (made,) = (cache / "tokens").iterdir()
    before = made.stat().st_mtime_ns
    from dpo_ds.plan.refuse import for_run

    options = for_run(parse_options([*arguments, "--plan=off"])).options
    pairs, _ = load_pairs(options, load_tokenizer(find_model(options.model)), from_environment(), DAY)
    assert len(pairs) and [*(cache / "tokens").iterdir()] == [made] and made.stat().st_mtime_ns == before
    assert not [*model_folder(files, QWEN_3).glob("*.safetensors")]


@pytest.mark.launch
def test_deepspeed_is_not_started_and_a_reader_may_leave(files, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "dpo_ds.data", *options_of(files, PLAIN, "rows", "--rows=9")]
    with open(tmp_path / "errors", "w+", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=launching.environment())
        assert process.stdout.readline().startswith("dpo_ds: ")
        process.stdout.close()
        assert process.wait(100) == 0
    errors = (tmp_path / "errors").read_text(encoding="utf-8")
    assert "Traceback" not in errors and "dpo_ds:" not in errors
    assert "dpo_ds.data.view" in errors and not re.search(r"\| +deepspeed", errors)


# ------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "no model": (["sample"], "--model is needed"),
    "no such model": (["sample", "--model=./nowhere"], "is not there: check the path"),
    "no such data": (["nowhere.jsonl", "--model=tiny-gpt2"], "--dataset nowhere.jsonl"),
    "the data twice": (["sample", "--model=tiny-gpt2", "--dataset", "sample"], "sample and --dataset name the same"),
    "two words": (["sample", "more", "--model=tiny-gpt2"], "unexpected argument more"),
    "an unknown option": (["sample", "--model=tiny-gpt2", "--max_lenght=9"], "did you mean --max_length"),
    "too long": (["sample", "--model=tiny-gpt2", "--max_length=4096"], "above the model's context"),
    "rows and row": (["sample", "--model=tiny-gpt2", "--rows=1", "--row=1"], "--rows and --row exclude each other"),
    "fewer than no rows": (["sample", "--model=tiny-gpt2", "--rows=-1"], "--rows is -1, but must be 0 or more"),
    "rows that are no number": (["sample", "--model=tiny-gpt2", "--rows=few"], "--rows: invalid int value: 'few'"),
    "no such row": (["sample", "--model=tiny-gpt2", "--row=1000"], "--row 1000 is not there: there are 1000 rows"),
    "the data behind --html": (["--model=tiny-gpt2", "--html", "sample"], "name a file that ends in .html"),
    "no place for the page": (["sample", "--model=tiny-gpt2", "--html=/dev/null/x.html"], "--html /dev/null/x.html: "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, files, monkeypatch, capsys):
    words, expected = MISTAKES[case]
    monkeypatch.setattr(sys, "argv", ["dpo_ds.data", *words, f"--cache_dir={files / 'cache'}"])
    with pytest.raises(SystemExit) as stopped:
        console.run_main(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("dpo_ds: error: ") and expected in line


def test_a_row_that_is_left_out_says_why(files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpo_ds.data", *options_of(files, QWEN_3, "rows", "--row=3")])
    with pytest.raises(SystemExit):
        console.run_main(main)
    assert "--row 3 is left out: an answer is empty" in capsys.readouterr().err


def test_a_row_may_be_held_out(files, capsys):
    found, _ = loaded(files)
    row = int(found.held_out.rows[0])
    capsys.readouterr()
    main(options_of(files, QWEN_3, "rows", f"--row={row}"))
    assert re.search(rf"row {row} of \S+, held out · \d+ tokens", capsys.readouterr().out)


def test_the_data_may_stand_anywhere_and_the_page_has_a_name():
    for words in (["a/b", "--model=x/y"], ["--model", "x/y", "a/b"], ["--model=x/y", "--dataset", "a/b"]):
        own, options = parse([*words, "--html"])
        assert options.dataset == "a/b" and options.model == "x/y" and own.html == "runs/y-b.html"
    own, options = parse(["--model=x/y"])
    assert own.html is None and options.dataset == parse_options(["--model=x/y"]).dataset


def test_help_names_both_kinds_of_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--html" in text and "--max_length" in text and "--beta" not in text
