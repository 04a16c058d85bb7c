"""What a run says of itself: metrics.jsonl, the progress bar, the summary."""

import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dpo_ds import world
from dpo_ds.checkpoint import write_whole

LOG_SECONDS = 20  # between two lines of progress where there is no terminal for a bar


class Reporter:
    """Writes on rank 0 and is silent elsewhere."""

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.speaks = world.from_environment().speaks
        self.path = folder / "metrics.jsonl"
        if self.speaks:
            _forget_after(self.path, first_step)
        self.steps = steps
        self.on_terminal = self.speaks and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=first_step, unit="step", desc="dpo", disable=not self.on_terminal)
        self.last_line = time.monotonic()

    def step(self, metrics: dict) -> None:
        self._write(metrics)
        loss, accuracy = f"{metrics['loss']:.4f}", f"{metrics['rewards/accuracies']:.3f}"
        self.bar.set_postfix({"loss": loss, "acc": accuracy}, refresh=False)
        self.bar.update()
        if not self.on_terminal and time.monotonic() - self.last_line > LOG_SECONDS:
            self.last_line = time.monotonic()
            world.say(
                f"step {metrics['step']} of {self.steps}: loss {loss}, accuracy {accuracy}, "
                f"{metrics['pairs/s']} pairs/s"
            )

    def evaluation(self, metrics: dict) -> None:
        self._write(metrics)
        line = (
            f"held out, step {metrics['step']}: loss {metrics['eval/loss']:.4f}, "
            f"accuracy {metrics['eval/rewards/accuracies']:.3f}, margin {metrics['eval/rewards/margins']:+.3f}"
        )
        if self.on_terminal:
            self.bar.write(f"dpo_ds: {line}")  # above the bar
        else:
            world.say(line)

    def _write(self, metrics: dict) -> None:
        if self.speaks:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def close(self) -> None:
        self.bar.close()


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps that a killed run did beyond its last checkpoint: they are done again."""
    if not path.is_file():
        return
    whole = [line for line in path.read_text().split("\n")[:-1] if json.loads(line)["step"] <= step]
    # The evaluation before the first step is repeated by a run that starts anew.
    kept = [line for line in whole if step > 0 or json.loads(line)["step"] > 0]
    write_whole(path, "".join(line + "\n" for line in kept))


def preference_metrics(
    policy: torch.Tensor, reference: torch.Tensor, losses: torch.Tensor, beta: float
) -> torch.Tensor:
    """[B, 7], a row per pair, in the order of METRICS. policy and reference: logps [B, 2]; losses [B].

    A reward is beta * (policy logps - reference logps); equal rewards count as half right.
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards.unbind(1)
    margins = chosen - rejected
    right = (margins.sign() + 1) / 2
    return torch.stack([losses, chosen, rejected, right, margins, policy[:, 0], policy[:, 1]], dim=1)


METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def write_summary(folder: Path, facts: dict) -> None:
    write_whole(folder / "summary.json", json.dumps(facts, indent=1))
