"""A check: one figure, the range in which it is healthy, and what helps where it is not."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dpo_ds.ranks import console

# The advice of two checks, one of the pairs and one of a run.
BY_LENGTH = "length alone may be learned: --loss rdpo, --loss simpo and --ld_alpha 0.5 weaken it"


@dataclass(frozen=True)
class Check:
    """A figure of the data or of a run. Without a `value` above `most` or below `least`, it is healthy."""

    kind: str  # its name in summary.json
    figure: str  # a sentence without its full stop
    value: float  # that the figure states
    advice: str  # what usually causes a finding, and the option that helps
    least: float = -math.inf
    most: float = math.inf
    step: int | None = None  # of the run; None: before the first one

    @property
    def healthy(self) -> bool:
        return not (self.value < self.least or self.value > self.most)  # NaN is healthy: nothing is known

    @property
    def line(self) -> str:
        when = "" if self.step is None else f"step {self.step}: "
        return f"doctor: {when}{self.figure}; {self.advice}"

    def as_json(self) -> dict:
        return {
            "kind": self.kind,
            "step": self.step,
            "value": self.value,
            "figure": self.figure,
            "advice": self.advice,
        }


def report(checks: Iterable[Check]) -> list[Check]:
    """Says what is not healthy, one line each. Returns these findings."""
    findings = [check for check in checks if not check.healthy]
    for finding in findings:
        console.say(finding.line)
    return findings
