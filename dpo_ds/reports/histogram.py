"""Histograms of lengths as PNG images, drawn with matplotlib."""

import importlib.util
import io

import numpy as np

from dpo_ds.data.view import Spread
from dpo_ds.errors import UserError

BAR, INK = "#4c8fd6", "#7d8590"  # legible on a white page and on a dark one: the background is transparent


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def require_drawing(option: str) -> None:
    """Raises UserError if matplotlib is missing."""
    if not can_draw():
        raise UserError(f"{option} draws with matplotlib, which is not installed: pip install matplotlib")


def histogram(numbers: np.ndarray, title: str) -> bytes:
    """A PNG. Lines mark the median and the length that 95% do not exceed."""
    from matplotlib.figure import Figure

    spread = Spread.of(numbers)
    figure = Figure(figsize=(4.6, 2.5), dpi=160, layout="constrained")
    axes = figure.subplots()
    low, high = int(spread.least), int(spread.longest)
    # Bars of whole numbers of tokens, so that none of them is higher only because it covers more.
    step = max(1, -(-(high + 1 - low) // 40))
    axes.hist(numbers, bins=np.arange(low - 0.5, high + step + 0.5, step).tolist(), color=BAR)
    for value, name, style in ((spread.median, "median", "-"), (spread.most, "95%", "--")):
        axes.axvline(value, color=INK, linewidth=1.2, linestyle=style, label=f"{name}: {value:,.0f}")
    axes.set_xlabel(title, color=INK)
    axes.tick_params(colors=INK)
    axes.locator_params(axis="both", integer=True, nbins=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.legend(frameon=False, labelcolor=INK, fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png", transparent=True)
    return png.getvalue()
