"""What a run's metrics show while it trains.

The limits are measured: the embedded sample with the defaults (30 steps) is silent; the comments give what it has, and
what runs have that are to be found. The figures are those of docs/doctor.md.
"""

from array import array

import numpy as np

from dpo_ds.config import Options
from dpo_ds.doctor.check import BY_LENGTH, Check, report
from dpo_ds.reports.record import HELD_OUT, Reader, Record, is_evaluation

LOOKS = 10  # at the run's figures, at even distances
RECENT = 10  # steps whose mean is taken, at least; of a long run, a twentieth of the steps
MOVED = 0.005  # of the first loss: the sample 0.06 after the warm-up; with a learning rate of 1e-9, 4e-6
FALL = 0.1  # nats per token: the sample 0.00; with LoRA, 0.59; with a learning rate of 3e-3, 6.1
MOST_CLIPPED = 0.95  # the sample 0.13; a model that does not know the data's language, 1.0
GROWN, KNOWN = 2.0, 0.95  # the margin by this factor; an accuracy that need not rise
TURNED = 0.1  # of the best margin
LEAST_MARGIN = 0.02  # that is worth losing: with a learning rate of 1e-9, margins of 1e-7 come and go
WORSE = 0.05  # of the first held-out loss
MOST_BY_LENGTH = 0.6  # correlation

READ = ("step", "loss", "clipped", "grad_norm", "rewards/margins", "rewards/accuracies", "logps_per_token/chosen",
        "length_correlation")  # fmt: skip


class CurveReader(Reader):
    """Looks at the run's figures from time to time. Says each finding once."""

    name, failed = "doctor", "the run's figures are not looked at any more"

    def __init__(self, options: Options):
        self.options = options
        self.findings: list[Check] = []
        self.series = {begin + name: array("d") for begin in ("", HELD_OUT) for name in READ}
        self.steps = 0
        self.quiet = False

    def begin(self, kept: Record, steps: int) -> None:
        """A run that goes on has said what its earlier steps showed."""
        self.steps, self.quiet = steps, True
        last = 0
        for line in kept.lines():
            if line["step"] > last:
                self._look(last)
                last = line["step"]
            self.read(line)
        self._look(last)
        self.quiet = False

    def read(self, line: dict) -> None:
        begin = HELD_OUT if is_evaluation(line) else ""
        for name in READ:
            value = line["step"] if name == "step" else line.get(begin + name)
            self.series[begin + name].append(np.nan if value is None else value)

    def settle(self) -> None:
        self._look(int(self.series["step"][-1]))

    @property
    def clipped(self) -> float | None:
        """The share of steps whose gradients were clipped; None before the first step."""
        return float(np.mean(self.series["clipped"])) if len(self.series["clipped"]) else None

    def checks(self, step: int) -> list[Check]:
        """All that the figures show at this step, healthy or not."""
        found = [self._stands(step), self._clipped(step)]
        found += [self._falls(step), self._accuracy(step), self._turned(step), self._worse(step), self._length(step)]
        return [check for check in found if check is not None]

    def _look(self, step: int) -> None:
        if step and (step == self.steps or step % max(1, self.steps // LOOKS) == 0):
            known = {finding.kind for finding in self.findings}
            checks = [check for check in self.checks(step) if check.kind not in known and not check.healthy]
            self.findings += checks if self.quiet else report(checks)

    def _recent(self, name: str) -> np.ndarray:
        return np.array(self.series[name][-max(RECENT, self.steps // 20) :])

    def _stands(self, step: int) -> Check | None:
        """Whether the loss is still what it was at the start, once the warm-up is over."""
        losses = np.array(self.series["loss"])
        if step < self.options.warmup_ratio * self.steps + max(RECENT, self.steps // 20):
            return None
        first, now = losses[0], float(np.mean(self._recent("loss")))
        moved = abs(now - first) / abs(first) if first else np.nan
        return Check(
            "loss_stands",
            f"the loss is {now:.4f}, and was {first:.4f} at the start",
            moved,
            f"the policy hardly moves: raise --learning_rate (now {self.options.learning_rate:g}); adapters need about "
            "ten times that of all weights",
            least=MOVED,
            step=step,
        )

    def _clipped(self, step: int) -> Check | None:
        clipped = self._recent("clipped")
        if len(clipped) < RECENT:
            return None
        norm = float(np.median(self._recent("grad_norm")))
        return Check(
            "clipped",
            f"the gradient is clipped in {clipped.mean():.0%} of the last {len(clipped)} steps (norm {norm:.3g}, limit "
            f"{self.options.max_grad_norm:g})",
            float(clipped.mean()),
            "each step then has the same length, whatever it learns: lower --learning_rate, or raise --max_grad_norm "
            "above that norm",
            most=MOST_CLIPPED,
            step=step,
        )

    def _falls(self, step: int) -> Check | None:
        chosen = self.series["eval/logps_per_token/chosen"]
        if len(chosen) < 2:
            return None
        fall = chosen[0] - chosen[-1]
        return Check(
            "chosen_falls",
            f"held-out chosen answers have {chosen[-1]:.2f} nats a token, and had {chosen[0]:.2f} before training",
            fall,
            "they get less likely, and margins grow because rejected answers fall faster: --sft_weight 0.2, --loss "
            "dpop or a lower --learning_rate hold chosen ones up",
            most=FALL,
            step=step,
        )

    def _accuracy(self, step: int) -> Check | None:
        """Whether margins have grown since a third of the evaluations, and accuracy has not."""
        margins, accuracies = self.series["eval/rewards/margins"], self.series["eval/rewards/accuracies"]
        then = max(1, len(margins) // 3)
        if len(margins) < 5 or accuracies[-1] >= KNOWN or not margins[then] > 0 or accuracies[-1] > accuracies[then]:
            return None
        growth = margins[-1] / margins[then]
        return Check(
            "margins_without_accuracy",
            f"held-out margins have grown from {margins[then]:.3f} to {margins[-1]:.3f} since step "
            f"{self.series['eval/step'][then]:.0f}, but the accuracy from {accuracies[then]:.3f} to "
            f"{accuracies[-1]:.3f}",
            growth,
            "what is right gets more certain, and nothing else gets right: raise --beta, lower --learning_rate, or "
            "train on fewer --epochs",
            most=GROWN,
            step=step,
        )

    def _turned(self, step: int) -> Check | None:
        """Whether the held-out margin was better before the last two evaluations."""
        margins = np.array(self.series["eval/rewards/margins"])
        if len(margins) < 4 or np.isnan(margins).any() or margins.max() - margins[0] < LEAST_MARGIN:
            return None
        best = int(margins.argmax())
        lost = (margins[best] - margins[-2:].max()) / (margins[best] - margins[0])
        at = f"{self.series['eval/step'][best]:.0f}"
        return Check(
            "margin_turned",
            f"the held-out margin was best at step {at} ({margins[best]:.3f}) and is {margins[-1]:.3f}",
            float(lost),
            "the run overfits: train on fewer --epochs, lower --learning_rate, or export a checkpoint near that step",
            most=TURNED,
            step=step,
        )

    def _worse(self, step: int) -> Check | None:
        losses = self.series["eval/loss"]
        if len(losses) < 3:
            return None
        worse = min(losses[-2:]) / losses[0] - 1 if losses[0] > 0 else np.nan
        return Check(
            "held_out_worse",
            f"the held-out loss is {losses[-1]:.4f}, and was {losses[0]:.4f} before training",
            float(worse),
            f"what is learned does not carry over: lower --learning_rate (now {self.options.learning_rate:g}), or take "
            "a --model that knows this kind of text (python -m dpo_ds.doctor)",
            most=WORSE,
            step=step,
        )

    def _length(self, step: int) -> Check | None:
        values = self.series["eval/length_correlation"]
        if len(values) < 2 or np.isnan(values[-1]):  # too few held-out pairs
            return None
        return Check(
            "rewards_by_length",
            f"held-out reward margins go with the differences in length (correlation {values[-1]:+.2f})",
            abs(values[-1]),
            BY_LENGTH,
            most=MOST_BY_LENGTH,
            step=step,
        )
