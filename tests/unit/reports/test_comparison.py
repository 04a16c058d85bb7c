"""An evaluation's report: what it shows, in Markdown and as a picture."""

import io

import numpy as np
import pytest
from matplotlib import image

from dpo_ds.reports.comparison import About, Generated, as_markdown, mean, picture, share, side_by_side
from dpo_ds.reports.figures import Judged, Mean, Share, evaluate

ABOUT = About("runs/x/merged", "x", "tiny-gpt2 (its base)", "tiny-gpt2", "a.jsonl,b|c.jsonl", 0.1)
ALONE = About("runs/x/merged", "x", None, None, "a.jsonl", 0.1)


def made(reference: bool, n: int = 60) -> tuple[Judged, np.ndarray]:
    random = np.random.default_rng(0)
    policy, other = random.normal(-50, 5, (2, n, 2)).astype(np.float32)
    lengths = random.integers(5, 80, (n, 2))
    judged = Judged(policy, other if reference else None, lengths, np.ones(n, np.float32), np.arange(n), 0.1)
    return judged, np.arange(n) % 2


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(0.49987, 0.0571, "+0.500 ± 0.057"), (-4.9983, 0.53, "-5.00 ± 0.53"), (-0.00039, 0.0055, "-0.0004 ± 0.0055"),
     (123.4, 12.3, "+123 ± 12"), (0.25, None, "+0.25"), (0.0, 0.0, "+0")],
)  # fmt: skip
def test_a_mean_ends_where_its_error_does(value, error, shown):
    assert mean(Mean(value, error)) == shown


def test_a_share_shows_ties_where_there_are_any():
    assert share(Share(0.5, 0.4, 0.6, 0.0)) == "50.0% (40.0 to 60.0)"
    assert share(Share(0.5, 0.4, 0.6, 0.25)) == "50.0% (40.0 to 60.0), ties 25.0%"


def columns(row: str) -> int:
    return row.replace(r"\|", "").count("|")


@pytest.mark.parametrize(("about", "reference"), [(ABOUT, True), (ALONE, False)])
def test_every_table_is_whole(about, reference):
    judged, sources = made(reference)
    page = as_markdown(evaluate(judged, sources, ["a.jsonl", "b|c.jsonl"]), about)
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4, "about, all pairs, by source, by length"
    for rows in tables:
        assert len({columns(row) for row in rows}) == 1, rows
    assert ("KL" in page) == reference and ("accuracy of the reward" in page) == reference
    assert r"b\|c.jsonl" in page and "accuracy of the model's likelihood" in page


@pytest.mark.parametrize(("about", "reference", "n"), [(ABOUT, True, 60), (ALONE, False, 60), (ABOUT, True, 1)])
def test_a_picture_for_a_phone(about, reference, n):
    judged, sources = made(reference, n)
    png = picture(evaluate(judged, sources, ["a.jsonl", "b.jsonl"]), judged, about)
    pixels = image.imread(io.BytesIO(png))
    assert pixels.shape[1] == 1040 and 900 < pixels.shape[0] < 1800
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2])[::7], axis=0)) > 10


def test_answers_stand_side_by_side():
    found = [Generated("Say\nA | B", {"greedy": ["one", "two"], "sampled": ["<b>", "four"]})]
    page = side_by_side(found, ABOUT, "How.")
    assert r"**Prompt 1** Say A \| B" in page
    assert "| | x | tiny-gpt2 |\n|---|---|---|\n| greedy | one | two |\n| sampled | &lt;b> | four |" in page
