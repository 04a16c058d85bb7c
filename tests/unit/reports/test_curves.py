"""curves.png: thin lines of long runs, what is not finite, and when it is drawn."""

import io
import sys

import numpy as np
import pytest

from dpo_ds.reports.curves import NAMES, POINTS, Curves, Series, brief, picture, smoothed, thin
from dpo_ds.reports.record import Recorder

pytest.importorskip("matplotlib")


def line(number: int, value: float | None) -> dict:
    return {"step": number, **dict.fromkeys(NAMES, value)}


def held_out(number: int) -> dict:
    return {"step": number, **{f"eval/{name}": 0.5 for name in NAMES[:6]}}


def size_of(png: bytes) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(png)).size


def test_thin_keeps_means_and_extremes():
    steps, values = np.arange(1.0, 100_001), np.sin(np.arange(100_000) / 1e4)
    values[777], values[50_000:51_000] = np.inf, np.nan
    x, middle, low, high = thin(steps, values)
    assert len(x) == len(middle) == POINTS and (np.diff(x) > 0).all()
    fine = values[np.isfinite(values)]
    assert np.nanmin(low) == fine.min() and np.nanmax(high) == fine.max()
    assert np.isnan(middle).sum() == 3 and np.isfinite(middle[2]), "a thousand steps are three points"
    np.testing.assert_allclose(middle[10], values[3333:3666].mean(), atol=1e-3)


def test_thin_leaves_a_short_line_alone():
    steps, values = np.arange(5.0), np.ones(5)
    assert thin(steps, values)[0] is steps


def test_smoothed():
    np.testing.assert_allclose(smoothed(np.full(50, 3.0)), 3.0)
    spike = np.ones(200)
    spike[100], spike[7] = 1e6, np.nan
    np.testing.assert_allclose(smoothed(spike), 1.0)
    assert np.isnan(smoothed(np.full(4, np.nan))).all()


@pytest.mark.parametrize("values", [[0.5], [None] * 3, [0.5, None, 0.7] * 20, [0.0] * 400])
def test_every_run_can_be_drawn(values):
    series = Series()
    for number, value in enumerate(values, 1):
        series.add(line(number, value))
    series.add(held_out(len(values)))
    assert size_of(picture(series, "a" * 80, len(values), 1.0))[0] == 1040


def test_without_a_reference_there_is_no_panel_of_kl():
    whole, less = Series(), Series()
    for series, leave_out in ((whole, ()), (less, ("kl", "tokens/s"))):
        series.add({name: value for name, value in line(1, 0.5).items() if name not in leave_out})
    assert size_of(picture(less, "run", 1, 1.0))[1] < size_of(picture(whole, "run", 1, 1.0))[1]


def test_drawn_at_evaluations_and_at_the_end(tmp_path):
    curves = Curves(tmp_path, 1.0)
    recorder = Recorder(tmp_path, [curves])
    recorder.starting(0, 3)
    recorder.step_ended(line(1, 0.5))
    recorder.evaluated(held_out(1))
    assert not (tmp_path / "curves.png").exists(), "a run of seconds is drawn once"
    curves.next = 0.0
    recorder.evaluated(held_out(2))
    first = (tmp_path / "curves.png").read_bytes()
    recorder.step_ended(line(3, 0.7))
    recorder.ended()
    assert (tmp_path / "curves.png").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_without_matplotlib_the_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    recorder = Recorder(tmp_path, [Curves(tmp_path, 1.0)])
    recorder.starting(0, 2)
    recorder.step_ended(line(1, 0.5))
    recorder.ended()
    recorder.ended()
    said = capsys.readouterr().out
    assert said.count("curves.png: ModuleNotFoundError") == 1 and "metrics.jsonl has them" in said


def test_numbers_on_an_axis_are_short():
    values = (0, 0.25, -1.5, 5e-7, 1e-3, 1200, 42_000, 3e6)
    assert [brief(value) for value in values] == ["0", "0.25", "-1.5", "5e-7", "0.001", "1.2k", "42k", "3M"]
