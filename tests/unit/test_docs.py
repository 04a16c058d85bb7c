"""The documents: generated parts are up to date, links lead somewhere, and the commands that they show exist."""

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from dpo_ds import __version__
from dpo_ds.config import Options, parse_options
from dpo_ds.data.__main__ import parse
from dpo_ds.data.rows.forms import BESIDE, FORMS, WITHOUT_PROMPT, Reading, read_row, require_form
from dpo_ds.evaluate import parse as parse_evaluate
from dpo_ds.plan.choose import choose
from dpo_ds.plan.machine import Machine
from dpo_ds.plan.refuse import described

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    + [ROOT / folder / "README.md" for folder in ("ds_configs", "launch/recipes", "benchmarks")]
)
LAUNCHERS = {"python", "deepspeed", "torchrun", "accelerate", "bash"}
TAKE_OPTIONS = {"dpo_ds.train", "dpo_ds.score", "dpo_ds.doctor", "dpo_ds.plan", "launch/train_dpo.py"}
# Of commands, and of DeepSpeed.
OTHER_FLAGS = {"config", "help", "all", "json", "html", "output", "plots", "row", "rows", "module"}
OTHER_FLAGS |= {"temperature", "top_p", "answer_tokens"}  # of dpo_ds.evaluate
FLAGS = {field.name for field in dataclasses.fields(Options)} | OTHER_FLAGS


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path) -> list[str]:
    """What a page shows as code: spans, and indented lines without their `$` and comment."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^    (?:\$ )?(.+?)(?: {2,}#.*)?$", text, re.M)
    return re.findall(r"`([^`\n]+)`", text) + lines


def commands() -> list[tuple[str, str]]:
    shown = ((name(page), line) for page in PAGES for line in code(page))
    return sorted({(page, line) for page, line in shown if line.split(" ")[0] in LAUNCHERS and " " in line})


@pytest.mark.parametrize("page", [page for page in make.PAGES if page != "launch/recipes/README.md"])
def test_what_is_generated_is_up_to_date(page):
    """The recipes' page takes a minute: tests/unit/plan/test_plan.py compares its table."""
    assert (ROOT / page).read_text(encoding="utf-8") == make.page(page), f"run python docs/make.py {page}"


def test_wings_import_downwards():
    for place, targets in make.imports().items():
        for target in targets:
            assert make.ORDER.index(target) > make.ORDER.index(place), f"{place} imports {target}, which is above it"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_options_that_are_named_exist(page):
    for span in code(page):
        if re.fullmatch(r"(dpo_ds|tests|launch|docs|ds_configs)/[\w./-]+", span):
            # A test may have moved to another folder of tests.
            named = [ROOT / span, *(ROOT / "tests").rglob(Path(span).name)]
            assert any(path.exists() for path in named), span
        if flag := re.match(r"--(\w+)\b(?!-)", span):
            assert flag[1] in FLAGS, span


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_exist(page, command, monkeypatch):
    """The script or module is there, and what follows it are options that it knows."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "bash":
        assert Path(words[1]).is_file()
        return
    at = next((n for n, word in enumerate(words) if word in ("-m", "--module") or word.endswith(".py")), None)
    assert at is not None, "neither a module nor a script"
    if words[at].endswith(".py"):
        target, rest, source = words[at], words[at + 1 :], Path(words[at])
        assert source.is_file()
    else:
        target, rest = words[at + 1], words[at + 2 :]
        if not target.startswith("dpo_ds"):
            return
        source = Path(*target.split(".")) / "__main__.py"
        source = source if source.is_file() else source.parent.with_suffix(".py")
        assert source.is_file(), f"no module {target}"
    if target == "dpo_ds.data":
        parse(rest)
    elif target == "dpo_ds.evaluate":
        parse_evaluate(rest)
    elif target in TAKE_OPTIONS:
        rest = [word for word in rest if word not in ("--all", "--json", "--help")]
        if "--output" in rest:  # of dpo_ds.score and dpo_ds.doctor
            at = rest.index("--output")
            del rest[at : at + 2]
        parse_options(rest if {"--config", "--model", "--model_name"} & {*rest} else ["--model", "gpt2", *rest])
    else:
        text = source.read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in rest if word.startswith("--"))


def test_rows_that_are_shown_are_understood():
    rows = [json.loads(span) for span in code(ROOT / "docs" / "data.md") if span.startswith('{"') and "..." not in span]
    assert len(rows) == len(FORMS) + len(WITHOUT_PROMPT) + len(BESIDE) > 20
    for row in rows:
        found = read_row(row, Reading())
        said = [found.answers[at].messages[0]["content"] for at in (found.pairs[0].chosen, found.pairs[0].rejected)]
        assert " ".join(found.messages[-1]["content"].split()) == "Say hello." and said == ["Hello!", "No."], row
        require_form([*row], Reading())


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_readme_says_what_the_set_up_installs_for_the_whole_system():
    script = (ROOT / "launch" / "setup.sh").read_text(encoding="utf-8")
    installed = set(re.findall(r"install --yes ([\w-]+)", script))
    quickstart = (ROOT / "README.md").read_text(encoding="utf-8").partition("bash launch/quickstart.sh")[0]
    assert installed == {"libaio-dev"} and "apt" in quickstart and all(name in quickstart for name in installed)


@pytest.mark.usefixtures("documented_torch")
@pytest.mark.parametrize("page", ["README.md", "docs/planning.md"])
def test_the_plan_is_what_the_command_prints(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("    $ python -m dpo_ds.plan"))
    length = next(n for n, line in enumerate(lines[start:]) if line and not line.startswith("    "))
    shown = [line.strip() for line in lines[start + 1 : start + length] if line.strip() not in ("", "...")]
    options = parse_options(shlex.split(lines[start])[4:])
    printed = [line for line in described(choose(options, Machine.of(options))).splitlines() if line]
    assert shown == [line for line in printed if line in shown]
    assert len(shown) > 5 and ("..." in "".join(lines[start : start + length]) or shown == printed)


def test_versions_agree():
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    ruff = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f"rev: v{ruff}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
