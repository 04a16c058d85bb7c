"""The recipes: make.py would write the same today, every key has a comment, and the options take them."""

import importlib.util

import launching
import pytest
import yaml

from dpo_ds.config import parse_options
from dpo_ds.models.find import known_models
from dpo_ds.plan.__main__ import everything
from dpo_ds.plan.choose import choose

FOLDER = launching.ROOT / "launch" / "recipes"
spec = importlib.util.spec_from_file_location("make_recipes", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

pytestmark = pytest.mark.usefixtures("documented_torch")
RECIPES = [(model, lora) for model in known_models() for lora in (False, True)]


@pytest.mark.parametrize(("model", "lora"), RECIPES, ids=[make.name(*recipe) for recipe in RECIPES])
def test_a_recipe_is_what_the_plan_says(model, lora):
    path = FOLDER / make.name(model, lora)
    text = path.read_text()
    assert text == make.text(model, lora), "run python launch/recipes/make.py"
    lines = text.splitlines()
    for number, line in enumerate(lines):
        assert not line or line.startswith("#") or lines[number - 1].startswith("# "), f"{line} has no comment"
    options = parse_options(["--config", str(path)])
    assert (options.model, options.lora) == (model, lora)
    written = {key: value for key, value in yaml.safe_load(text).items() if value is not None}
    assert written.keys() <= vars(options).keys()
    assert choose(options, make.MACHINE).fits


def test_there_are_no_others():
    assert {path.name for path in FOLDER.glob("*.yaml")} == {make.name(*recipe) for recipe in RECIPES}


def test_the_readme_shows_the_plan_of_all():
    assert everything() in (FOLDER / "README.md").read_text(), "run python docs/make.py launch/recipes/README.md"
