"""What will be trained, on a terminal: with colours, or in plain text where there are none."""

from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from dpo_ds.data.view import Cut, Run, Shown, ShownGroup, Spread, Summary, visible

SCORED = {"chosen": "green", "rejected": "red", "both": "yellow"}  # colours of learned tokens
BARS = "▁▂▃▄▅▆▇█"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the command handles it for every line that it prints; rich would exit with code 1


class Listing:
    """Prints lines, tables and groups. Without colours, ⟦these brackets⟧ stand around what is not learned."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Console(highlight=False, markup=False, emoji=False)
        self.coloured = self.console.is_terminal and self.console.color_system is not None and not self.console.no_color

    def line(self, text: str | Text = "") -> None:
        self.console.print(Text(visible(text)) if isinstance(text, str) else text, soft_wrap=True)

    def summary(self, summary: Summary, held_out: str) -> None:
        """held_out: the line about those pairs."""
        for line in [*summary.lines(), held_out]:
            self.line(line)
        self.line()
        self.line(f"{'':24}{'median':>8}{'95%':>8}{'longest':>9}")
        for name, numbers in summary.table():
            spread = Spread.of(numbers)
            self.line(f"{name:24}{spread.median:8,.0f}{spread.most:8,.0f}{spread.longest:9,.0f}  {sparkline(numbers)}")

    def groups(self, groups: list[ShownGroup]) -> None:
        if groups:
            self.line()
            self._legend()
        for group in groups:
            self._group(group)

    def _legend(self) -> None:
        if self.coloured:
            parts = [("learned if chosen", "green"), ("if rejected", "red"), ("in pairs of both kinds", "yellow")]
            parts += [("not learned", "dim"), ("special token", "reverse"), ("[cut]", "bold magenta")]
            self.line(Text(" · ").join(Text(name, style) for name, style in parts))
        else:
            self.line("⟦ ⟧: not learned, though it stands in an answer. [… cut …]: taken out by --truncation.")

    def _group(self, group: ShownGroup) -> None:
        self.line()
        held_out = ", held out" if group.held_out else ""
        self.line(Text(visible(f"── {group.where}{held_out} · {group.tokens:,} tokens ──"), "bold"))
        self._shown("prompt", group.prompt, "", "bold")
        for n, answer in enumerate(group.answers):
            role = group.role(n)
            self._shown(group.verdict(n), answer, SCORED[role], f"bold {SCORED[role]}")

    def _shown(self, title: str, shown: Shown, scored: str, heading: str) -> None:
        is_answer = bool(scored)
        text = self._text(shown, scored, is_answer) if self.coloured else self._plain_text(shown, is_answer)
        self.line(Text(f"{title} · {len(shown.tokens):,} tokens", heading))
        for line in text.split("\n", allow_blank=True):
            # On a terminal, long lines are wrapped here, so that their continuation is indented as well.
            width = max(20, self.console.width - 2)
            wrapped = line.wrap(self.console, width) if self.console.is_terminal else [line]
            for part in wrapped:
                self.console.print(Text("  ") + part, soft_wrap=True)

    def _text(self, shown: Shown, scored: str, is_answer: bool) -> Text:
        text = Text()
        for run in shown.runs():
            if isinstance(run, Cut):
                text.append(f"[… {run.tokens:,} tokens cut …]", "bold magenta")
                continue
            look = scored if run.scored else "dim" if is_answer else ""
            text.append(run.text, f"{look} reverse" if run.special else look)
        return text

    def _plain_text(self, shown: Shown, is_answer: bool) -> Text:
        text = ""
        for outside, runs in groupby(shown.runs(), key=lambda run: isinstance(run, Run) and not run.scored):
            words = "".join(run.text if isinstance(run, Run) else f"[… {run.tokens:,} tokens cut …]" for run in runs)
            text += f"⟦{words}⟧" if is_answer and outside else words
        return Text(text)


def sparkline(numbers: np.ndarray, many: int = 16) -> str:
    """A small histogram, from the least number to the largest; nothing where all are the same."""
    if numbers.min() == numbers.max():
        return ""
    counts, _ = np.histogram(numbers, bins=many)
    height = counts / counts.max()
    return "".join(BARS[round(part * (len(BARS) - 1))] if part else " " for part in height)
