"""The layout: one wing imports DeepSpeed, imports form no circle, and each workaround of a library has an entry."""

import ast
import importlib
import re
from pathlib import Path

import launching
import pytest

from dpo_ds.engine.workarounds import WORKAROUNDS, needed

PACKAGE = launching.ROOT / "dpo_ds"
TESTS = launching.ROOT / "tests"
MODULES = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}


def imported(file: Path) -> set[str]:
    """The modules that a file imports anywhere, except for the type checker only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_deepspeed_is_imported_in_one_wing():
    strangers = {
        name
        for name, file in MODULES.items()
        if not name.startswith("dpo_ds.engine.") and any(m.split(".")[0] == "deepspeed" for m in imported(file))
    }
    assert strangers == {"dpo_ds.deepspeed_command"}, "outside the engine wing, only the console script may"


def test_no_file_imports_in_a_circle():
    arrows = {name: imported(file) & set(MODULES) for name, file in MODULES.items()}
    while ends := {name for name, targets in arrows.items() if not targets & set(arrows)}:
        for name in ends:
            del arrows[name]
    assert not arrows, "each of these imports another of them"


def test_no_folder_for_one_file():
    for folder in (file.parent for file in PACKAGE.rglob("__init__.py")):
        files = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert folder.name == "embedded" or len(files) > 1, folder


@pytest.mark.parametrize("name", WORKAROUNDS)
def test_a_workaround_is_where_its_entry_says_and_has_its_test(name):
    workaround = WORKAROUNDS[name]
    module, _, path = workaround.where.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    assert callable(found)
    file, _, test = workaround.test.partition("::")
    assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.M), workaround.test
    assert needed(name), "the installed version no longer has this fault: remove the workaround"
