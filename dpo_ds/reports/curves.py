"""curves.png: the run's metrics over its steps, renewed at each evaluation, to be read on a phone too."""

import io
import time
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_ds.reports.record import HELD_OUT, Reader, Record, is_evaluation

POINTS = 300  # of a line, at most: more steps than that share points
SHARE = 0.05  # of a run's time for drawing, at most
SOON = 10.0  # seconds from the start to the first drawing
BLUE, ORANGE, GREEN, RED, INK, PALE = "#2f6fb5", "#e07b00", "#2a8a45", "#c9372c", "#24292f", "#8b949e"


@dataclass(frozen=True)
class Panel:
    title: str
    metrics: tuple[str, ...]
    colours: tuple[str, ...] = (BLUE,)
    smooth: bool = True  # a pale line for the steps and a strong one for their running mean
    whole: bool = False  # the axis shows every value; else values outside 98% of them may lie beyond it


PANELS = (
    Panel("loss", ("loss",)),
    Panel("reward margin", ("rewards/margins",)),
    Panel("accuracy", ("rewards/accuracies",)),
    Panel("log p per token", ("logps_per_token/chosen", "logps_per_token/rejected"), (GREEN, RED)),
    Panel("KL (k3), nats per token", ("kl",)),
    Panel("gradient norm", ("grad_norm",)),
    Panel("learning rate", ("learning_rate",), smooth=False, whole=True),
    Panel("tokens/s", ("tokens/s",)),
)
NAMES = tuple(name for panel in PANELS for name in panel.metrics)


class Series:
    """The metrics that are drawn, 8 bytes a value: {metric: values}, with their steps."""

    def __init__(self) -> None:
        self.steps: dict[str, array] = defaultdict(lambda: array("d"))
        self.values: dict[str, array] = defaultdict(lambda: array("d"))

    def add(self, line: dict) -> None:
        begin = HELD_OUT if is_evaluation(line) else ""
        for name in (begin + name for name in NAMES):
            if name in line:
                self.steps[name].append(line["step"])
                self.values[name].append(np.nan if line[name] is None else line[name])

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.steps[name]), np.array(self.values[name])


class Curves(Reader):
    """Draws curves.png at each evaluation and at the end. An evaluation soon after the last drawing is not worth one:
    drawing takes SHARE of the time at most."""

    name = "curves.png"
    failed = "no more curves are drawn; metrics.jsonl has them"

    def __init__(self, folder: Path, max_grad_norm: float):
        self.folder, self.max_grad_norm = folder, max_grad_norm
        self.series, self.steps, self.next = Series(), 0, 0.0

    def begin(self, kept: Record, steps: int) -> None:
        # A run of seconds is drawn once, at its end.
        self.steps, self.next = steps, time.monotonic() + SOON
        for line in kept.lines():
            self.series.add(line)

    def read(self, line: dict) -> None:
        self.series.add(line)
        if is_evaluation(line) and time.monotonic() >= self.next:
            self.draw()

    def end(self, finished: bool) -> None:
        self.draw()

    def draw(self) -> None:
        started = time.monotonic()
        if self.series.steps["loss"]:
            path = self.folder / "curves.png"
            temporary = path.with_name("curves.png.tmp")  # so that nobody sees half of it
            temporary.write_bytes(picture(self.series, self.folder.name, self.steps, self.max_grad_norm))
            temporary.replace(path)
        now = time.monotonic()
        self.next = now + (now - started) / SHARE


def picture(series: Series, title: str, steps: int, max_grad_norm: float) -> bytes:
    """A PNG of two columns of panels, 1,040 pixels wide. steps: the run's total."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = [panel for panel in PANELS if any(series.steps[name] for name in panel.metrics)]
    rows = -(-len(panels) // 2)
    height = 0.95 + 1.62 * rows
    figure = Figure(figsize=(5.2, height), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.105, right=0.975, bottom=0.42 / height, top=1 - 0.78 / height, wspace=0.27, hspace=0.52
    )
    done = int(series.steps["loss"][-1])
    figure.text(0.02, 1 - 0.2 / height, _short(title), fontsize=11, fontweight="bold", color=INK, va="center")
    figure.text(0.98, 1 - 0.2 / height, f"step {done:,} of {steps:,}", fontsize=10, color=INK, va="center", ha="right")
    keys = [
        Line2D([], [], color=BLUE, label="training"),
        Line2D([], [], color=ORANGE, marker="o", markersize=4, label="held out"),
    ]
    figure.legend(
        handles=keys, loc="center", bbox_to_anchor=(0.5, 1 - 0.42 / height), ncols=2, frameon=False, fontsize=9,
        labelcolor=INK, handlelength=1.4, columnspacing=1.5,
    )  # fmt: skip
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, 2, place + 1)
        _panel(axes, panel, series, done, max_grad_norm)
        if place >= len(panels) - 2:
            axes.set_xlabel("step", fontsize=9, color=INK, labelpad=1)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _panel(axes, panel: Panel, series: Series, done: int, max_grad_norm: float) -> None:
    from matplotlib.ticker import MaxNLocator

    seen: list[np.ndarray] = []
    for name, colour in zip(panel.metrics, panel.colours, strict=True):
        steps, values = series.of(name)
        x, middle, low, high = thin(steps, values)
        if panel.smooth and len(steps) > 20:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, middle, color=colour, alpha=0.3, linewidth=0.6)
            middle = smoothed(middle)
        axes.plot(x, middle, color=colour, linewidth=1.5)
        seen += [values if panel.whole else _usual(values), middle]
        x, middle, _, _ = thin(*series.of(HELD_OUT + name))
        dots = ORANGE if len(panel.metrics) == 1 else colour
        axes.plot(
            x, middle, color=dots, marker="o", markersize=3.2, linewidth=1, linestyle="--" if dots == colour else "-"
        )
        seen.append(middle)
    title = panel.title
    if panel.metrics == ("grad_norm",) and max_grad_norm > 0:
        _, norms = series.of("grad_norm")
        title += f" ({(norms > max_grad_norm).mean():.0%} clipped)"
        axes.axhline(max_grad_norm, color=PALE, linewidth=0.8, linestyle=":")
    if panel.metrics == ("rewards/accuracies",):
        axes.axhline(0.5, color=PALE, linewidth=0.8, linestyle=":")
    if len(panel.metrics) == 2:
        for at, word, colour in ((0.74, "chosen", GREEN), (1.0, "rejected", RED)):
            axes.text(at, 1.02, word, transform=axes.transAxes, fontsize=8, color=colour, ha="right", va="bottom")
    axes.set_title(title, fontsize=9, color=INK, loc="left", pad=3)
    everything = np.concatenate(seen)
    everything = everything[np.isfinite(everything)]
    if len(everything):
        bottom, top = float(everything.min()), float(everything.max())
        room = 0.06 * (top - bottom) or 0.05 * abs(top) or 1.0
        axes.set_ylim(bottom - room, top + room)
    axes.set_xlim(0, max(done, 1))
    dress(axes, MaxNLocator(3, integer=True), MaxNLocator(4))


def dress(axes, across, up) -> None:
    """Ticks, a pale grid and two axes, as in every picture. across, up: matplotlib's locators of the ticks."""
    from matplotlib.ticker import FuncFormatter

    for axis, locator in ((axes.xaxis, across), (axes.yaxis, up)):
        axis.set_major_locator(locator)
        axis.set_major_formatter(FuncFormatter(lambda value, _: brief(value)))
    axes.tick_params(labelsize=8, colors=INK, length=2, pad=2)
    axes.grid(color="#d8dee4", linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(PALE)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most POINTS points for the steps: their place, the mean, the least and the largest value of each. Values that
    are not finite count for nothing; where there are no others, a point is NaN."""
    if len(steps) <= POINTS:
        return steps, values, values, values
    starts = np.arange(POINTS) * len(steps) // POINTS
    fine = np.isfinite(values)
    counts = np.add.reduceat(fine.astype(float), starts)
    none = np.where(counts, 0.0, np.nan)
    mean = np.add.reduceat(np.where(fine, values, 0.0), starts) / np.maximum(counts, 1) + none
    low = np.minimum.reduceat(np.where(fine, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(fine, values, -np.inf), starts)
    places = np.add.reduceat(steps, starts) / np.diff([*starts, len(steps)])
    return places, mean, np.where(counts, low, np.nan), np.where(counts, high, np.nan)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The running mean of a line, over a twentieth of it on either side, of what is finite. A spike counts as no more
    than the largest usual value."""
    reach, fine = max(2, len(values) // 20), np.isfinite(values)
    if not fine.any():
        return values
    sums = np.cumsum([0.0, *np.where(fine, np.clip(values, *_usual(values)), 0.0)])
    counts = np.cumsum([0, *fine])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    after = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    many = counts[after] - counts[first]
    return np.where(many, (sums[after] - sums[first]) / np.maximum(many, 1), np.nan)


def _usual(values: np.ndarray) -> np.ndarray:
    """The range that 98% of the values are in, as two numbers; nothing where none is finite."""
    fine = values[np.isfinite(values)]
    return np.quantile(fine, [0.01, 0.99]) if len(fine) else fine


def brief(value: float) -> str:
    """A number on an axis: 12k, 3M, 5e-07, -1.25."""
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    if 0 < size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _short(title: str) -> str:
    return title if len(title) <= 32 else f"{title[:31]}…"
