"""Whether a run's figures make sense. Weights that a run has ruined mostly give finite numbers: with a learning rate of
1, DPO's loss is 22, and a ruined model would be saved and exported.

The limits are measured (tiny Llama and tiny-gpt2, every loss of losses/table.py, 12 steps): the comments give what runs
with learning rates from 5e-5 to 1e-2 have, and what runs with 1, 1e3 and 1e9 have.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dpo_ds.config import Planned
from dpo_ds.reports.record import HELD_OUT, is_evaluation

# Of ln V: chosen answers as improbable as text that is drawn blindly, and that far below the start. In nats a token,
# with ln V = 6.9: at most 0.3 below the start with 1e-3; tiny-gpt2 from -0.2 to -10 with 1e-2, to -478 with 1.
BLINDLY, FALL = 0.98, 0.5
GRADIENT = 1e4  # times the largest norm of the first steps: at most 60 (LoRA), and with 1 up to 29,000
FIRST_STEPS = 3
WEIGHT = 100.0  # times the largest weight of the start: below 3, and with 1e3 above 1,000
LOSS = 1e4  # times the first loss, as size, or 1: at most 1, and with 1e3 above 100,000


@dataclass(frozen=True)
class Figures:
    """Means over a step's pairs, or over the held-out ones."""

    chosen: float  # nats a token
    rejected: float
    loss: float

    @classmethod
    def of(cls, metrics: Mapping, begin: str) -> "Figures | None":
        """None if one of them is not finite, as a line of the record says it."""
        names = (f"{begin}logps_per_token/chosen", f"{begin}logps_per_token/rejected", f"{begin}loss")
        values = [value for name in names if (value := metrics.get(name)) is not None]
        return cls(*values) if len(values) == len(names) else None


@dataclass
class Sense:
    """Judges a run's figures against those of its start. Each method returns what is absurd, in words, or None.

    vocabulary: the model's number of tokens. largest: its largest weight before the first step, as size.
    """

    vocabulary: int
    largest: float
    first: dict[str, Figures] = field(default_factory=dict)  # of the steps (""), and of the evaluations (HELD_OUT)
    norms: list[float] = field(default_factory=list)  # of the first steps' gradients

    def remember(self, lines: Iterable[dict]) -> None:
        """Takes the start's figures from the first lines of a run that goes on."""
        for line in lines:
            (self.of_evaluation if is_evaluation(line) else self.of_step)(line)

    def of_step(self, metrics: Mapping) -> str | None:
        """A training step's, whose log-probabilities are those before its update."""
        norm = metrics.get("grad_norm")
        if norm is None or not math.isfinite(norm):  # the guard on steps that are not finite is another one
            return None
        problem = self._gradient(norm)
        if len(self.norms) < FIRST_STEPS:
            self.norms.append(norm)
        return problem or self._figures(metrics, "")

    def of_evaluation(self, metrics: Mapping) -> str | None:
        """The held-out pairs'."""
        return self._figures(metrics, HELD_OUT)

    def of_weights(self, largest: float) -> str | None:
        """The largest weight now, as size."""
        if largest <= WEIGHT * self.largest:
            return None
        return f"the largest weight is {largest:.3g}, and was {self.largest:.3g} before training"

    def of_chosen(self, per_token: float) -> str | None:
        """The mean log-probability of a token of some chosen answers, before a checkpoint."""
        start = self.first.get(HELD_OUT, self.first.get(""))
        return self._chosen(per_token, per_token if start is None else start.chosen, "the step's chosen answers")

    def _figures(self, metrics: Mapping, begin: str) -> str | None:
        now = Figures.of(metrics, begin)
        if now is None:
            return None
        start = self.first.setdefault(begin, now)
        whose = "the held-out" if begin else "the step's"
        if problem := self._chosen(now.chosen, start.chosen, f"{whose} chosen answers"):
            return problem
        behind, before = now.rejected - now.chosen, start.rejected - start.chosen
        if not behind < before + self._blind:
            return (
                f"{whose} rejected answers have {behind:.4g} nats a token more than the chosen ones, and had "
                f"{before:.3g} at the start"
            )
        if not abs(now.loss) <= LOSS * max(1.0, abs(start.loss)):
            return f"{whose} loss is {now.loss:.4g}, and was {start.loss:.4g} at the start"
        return None

    def _chosen(self, now: float, start: float, whose: str) -> str | None:
        if now > min(-BLINDLY * self._blind, start - FALL * self._blind):
            return None
        return (
            f"{whose} have {now:.4g} nats a token, and had {start:.3g} at the start; tokens that are drawn blindly "
            f"have {-self._blind:.3g}"
        )

    def _gradient(self, norm: float) -> str | None:
        usual = max(self.norms, default=0.0)
        if len(self.norms) < FIRST_STEPS or usual == 0 or norm <= GRADIENT * usual:
            return None
        return f"the gradients' norm is {norm:.4g}, and was at most {usual:.3g} in the first {FIRST_STEPS} steps"

    @property
    def _blind(self) -> float:
        return math.log(self.vocabulary)


def remedy(options: Planned) -> str:
    """What to do about absurd figures. runs/stopped.py makes it work in the same folder."""
    return (
        f"lower --learning_rate (now {options.learning_rate:g}): with another one, the same command begins again in "
        f"this folder, and puts what is there into {options.output_dir}/stopped"
    )
