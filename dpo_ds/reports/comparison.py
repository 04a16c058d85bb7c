"""An evaluation's report: evaluation.md, the table on the terminal, evaluation.png, and generations.md."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ds.reports.curves import BLUE, GREEN, INK, ORANGE, PALE, RED, dress
from dpo_ds.reports.figures import Evaluation, Figures, Judged, Mean, Share, Slice

POINTS = 1500  # of the scatter plot, at most


@dataclass(frozen=True)
class About:
    """What was evaluated, in words."""

    policy: str
    policy_short: str
    reference: str | None
    reference_short: str | None
    dataset: str
    beta: float


# ------------------------------------------------------------------------------------------------------------ Markdown


def as_markdown(evaluation: Evaluation, about: About) -> str:
    """The whole report."""
    lines = [
        f"# Evaluation of {about.policy_short}",
        "",
        "| | |",
        "|---|---|",
        f"| model | {_cell(about.policy)} |",
        f"| reference | {_cell(about.reference or 'none')} |",
        f"| pairs | {_cell(about.dataset)} |",
        *([f"| reward | {about.beta:g} · log(model / reference) |"] if about.reference else []),
        "",
        table(evaluation.all),
    ]
    for title, slices in (("By source", evaluation.by_source), ("By length of both answers", evaluation.by_length)):
        if slices:
            lines += ["", f"## {title}", "", _slices(slices)]
    lines += ["", "## What the figures are", "", *_notes(evaluation.all), ""]
    return "\n".join(lines)


def table(figures: Figures) -> str:
    """The figures of all pairs, a row each."""
    rows = [("pairs (prompts)", f"{figures.pairs:,} ({figures.prompts:,})")]
    if (against := figures.against) is not None:
        rows += [
            ("accuracy of the reward", share(against.accuracy)),
            ("margin of rewards", mean(against.margin)),
            ("KL, nats a token", f"{against.kl:.4g}"),
            (
                "log(model / reference), chosen",
                f"{mean(against.chosen)} nats, {mean(against.chosen_per_token)} a token",
            ),
            (
                "log(model / reference), rejected",
                f"{mean(against.rejected)} nats, {mean(against.rejected_per_token)} a token",
            ),
            ("correlation of reward and length", _signed(against.reward_and_length)),
            ("correlation of margin and difference of lengths", _signed(against.margin_and_length)),
        ]
    sides = [("the model", figures.policy), ("the reference", figures.reference)]
    for name, likelihood in sides:
        if likelihood is not None:
            per_token = f"{likelihood.chosen.value:.3f} chosen, {likelihood.rejected.value:.3f} rejected"
            rows.append((f"accuracy of {name}'s likelihood", share(likelihood.accuracy)))
            rows.append((f"log p per token of {name}", per_token))
    rows.append(("accuracy of “the longer answer wins”", share(figures.longer)))
    return "\n".join(["| figure | all pairs |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _slices(slices: Sequence[Slice]) -> str:
    compared = slices[0].figures.against is not None
    titles = ["", "pairs", "accuracy (95%)", "the longer wins"]
    titles += ["margin", "KL", "chosen, a token", "rejected, a token"] if compared else ["log p, chosen", "rejected"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for part in slices:
        found = part.figures
        cells = [_cell(part.name), f"{found.pairs:,}", share(found.accuracy), f"{found.longer.value:.1%}"]
        if (against := found.against) is not None:
            per_token = [mean(against.chosen_per_token), mean(against.rejected_per_token)]
            cells += [mean(against.margin), f"{against.kl:.4g}", *per_token]
        else:
            cells += [mean(found.policy.chosen), mean(found.policy.rejected)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _notes(figures: Figures) -> list[str]:
    notes = [
        "- Accuracy: pairs whose chosen answer has strictly the higher value; ties are shown beside it. The range is "
        "Wilson's 95% interval (1927). It takes pairs as independent; those of one prompt are less so.",
        "- ±: one standard error of the mean.",
        "- Lengths are learned tokens. “The longer answer wins” is what a judge gets right who reads nothing else.",
        "- Pairs count by their weights, as in training.",
    ]
    if figures.against is not None:
        notes += [
            "- KL: Schulman's k3 of an answer's mean log-ratio per token, as training's metric `kl`. The answers are "
            "the data's, not the model's own: read small values as nats, large ones as a warning.",
            "- Correlations are Spearman's, of ranks; the first is over all answers.",
        ]
    return notes


def share(found: Share) -> str:
    """72.0% (58.3 to 82.5), with ties if there are any."""
    ties = f", ties {found.ties:.1%}" if found.ties else ""
    return f"{found.value:.1%} ({100 * found.low:.1f} to {100 * found.high:.1f}){ties}"


def mean(found: Mean) -> str:
    """+0.412 ± 0.031: the error has two digits, and the value ends where it does."""
    if not found.error:
        return f"{found.value:+.4g}"
    places = max(0, 1 - math.floor(math.log10(found.error)))
    return f"{found.value:+.{places}f} ± {found.error:.{places}f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table: in one line, without what would end the cell or start HTML."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


# --------------------------------------------------------------------------------------------------------- generations


@dataclass(frozen=True)
class Generated:
    """A prompt and its answers: {way: [the model's, the reference's]}."""

    prompt: str
    answers: dict[str, list[str]]


def side_by_side(found: Sequence[Generated], about: About, how: str) -> str:
    """generations.md: a table for each prompt, a column for each model. how: a line about the ways."""
    names = [about.policy_short, *([about.reference_short] if about.reference_short else [])]
    lines = ["# Answers side by side", "", how, ""]
    for number, each in enumerate(found, 1):
        lines += [f"**Prompt {number}** {_cell(each.prompt)}", ""]
        lines += ["| | " + " | ".join(map(_cell, names)) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {way} | " + " | ".join(map(_cell, texts)) + " |" for way, texts in each.answers.items()]
        lines.append("")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- the PNG


WIDTH = 5.2  # inches, at 200 dots each


def picture(evaluation: Evaluation, judged: Judged, about: About) -> bytes:
    """A PNG, 1,040 pixels wide, to be read on a phone too: accuracy by slice, margins, shifts, margin over length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slices = [Slice("all pairs", evaluation.all), *evaluation.by_source, *evaluation.by_length]
    first = 0.2 + 0.22 * len(slices)
    height = first + 4.85
    figure = Figure(figsize=(WIDTH, height), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)

    def text(top: float, words: str, **look) -> None:
        figure.text(0.02, 1 - top / height, words, color=INK, va="center", **look)

    def axes(left: float, right: float, top: float, size: float):
        """left, right: parts of the width; top, size: inches."""
        return figure.add_axes((left, 1 - (top + size) / height, right - left, size / height))

    text(0.2, _short(about.policy_short, 38), fontsize=11, fontweight="bold")
    against = f" against {_short(about.reference_short, 30)}" if about.reference_short else ""
    text(0.42, f"{evaluation.all.pairs:,} pairs{against}", fontsize=9)
    _accuracies(axes(0.36, 0.96, 0.85, first), slices)
    _margins(axes(0.1, 0.485, first + 1.4, 1.2), judged)
    _shifts(axes(0.585, 0.97, first + 1.4, 1.2), judged)
    _over_length(axes(0.1, 0.97, first + 3.15, 1.35), judged)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _accuracies(axes, slices: Sequence[Slice]) -> None:
    names = [f"{_short(part.name, 24)} ({part.figures.pairs:,})" for part in slices]
    _dress(axes, "accuracy, % with 95% interval", left=-0.55)
    axes.text(1.0, 1.02, "◆ the longer answer wins", transform=axes.transAxes, fontsize=8.5, color=ORANGE, ha="right",
              va="bottom")  # fmt: skip
    axes.axvline(50, color=PALE, linewidth=0.8, linestyle=":")
    for place, part in enumerate(slices):
        found, longer = part.figures.accuracy, part.figures.longer
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=BLUE, linewidth=1.6)
        axes.plot(100 * found.value, place, color=BLUE, marker="o", markersize=4.5)
        axes.plot(100 * longer.value, place, color=ORANGE, marker="D", markersize=3.5, linestyle="")
    axes.set_yticks(range(len(slices)), names)
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(slices) - 0.4, -0.6)  # all pairs at the top


def _margins(axes, judged: Judged) -> None:
    values, what = _margins_of(judged)
    axes.hist(values, bins=_bins(values), weights=judged.weights, color=BLUE)
    axes.axvline(0, color=INK, linewidth=0.8)
    _dress(axes, what)


def _margins_of(judged: Judged) -> tuple[np.ndarray, str]:
    """Margins of rewards [n]; without a reference, of log-probabilities."""
    if judged.reference is None:
        return judged.policy[:, 0] - judged.policy[:, 1], "log p, chosen − rejected"
    log_ratios = judged.log_ratios
    return judged.beta * (log_ratios[:, 0] - log_ratios[:, 1]), "margin of rewards"


def _shifts(axes, judged: Judged) -> None:
    values = (judged.policy if judged.reference is None else judged.log_ratios) / judged.lengths
    bins = _bins(values)
    for side, word, colour, at in ((0, "chosen", GREEN, 0.68), (1, "rejected", RED, 1.0)):
        axes.hist(values[:, side], bins=bins, weights=judged.weights, color=colour, alpha=0.5)
        axes.axvline(float(np.average(values[:, side], weights=judged.weights)), color=colour, linewidth=1.4)
        axes.text(at, 1.02, word, transform=axes.transAxes, fontsize=8.5, color=colour, ha="right", va="bottom")
    _dress(axes, "log p a token" if judged.reference is None else "shift a token")


def _over_length(axes, judged: Judged) -> None:
    margins, what = _margins_of(judged)
    longer = judged.lengths[:, 0] - judged.lengths[:, 1]
    shown = np.linspace(0, len(margins) - 1, min(POINTS, len(margins))).astype(int)
    axes.scatter(longer[shown], margins[shown], s=7, color=BLUE, alpha=0.45, linewidths=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=PALE, linewidth=0.8, linestyle=":")
    _dress(axes, f"{what} over how much longer the chosen answer is, tokens")


def _bins(values: np.ndarray) -> list[float]:
    """The edges of thirty bars over 99% of the values; a single value gets a bar around it."""
    low, high = np.quantile(values, [0.005, 0.995])
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    return np.linspace(low, high, 31).tolist()


def _dress(axes, title: str, left: float = 0.0) -> None:
    """left: where the title begins, in parts of the axes' width."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=9, color=INK, loc="left", pad=3, x=left)
    dress(axes, MaxNLocator(5), MaxNLocator(4))


def _short(text: str | None, most: int) -> str:
    text = text or ""
    return text if len(text) <= most else f"…{text[1 - most :]}"
