"""Hooks into training, for progress, benchmarks and tests."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command that refuses its options must not wait for torch
    from dpo_ds.scoring.packed import PackedBatch


class Watcher:
    """Base class whose hooks do nothing: override those that you need. Each rank calls its own watchers' hooks, in the
    order below."""

    def starting(self, steps_done: int, steps: int) -> None:
        """Before the first step. `steps_done` were done by earlier starts of the run; `steps` is the total."""

    def step_begins(self, step: int) -> None:
        """Before a step's first micro-batch; steps count from 1."""

    def learned(self, batch: "PackedBatch") -> None:
        """After a micro-batch's forward and backward."""

    def step_ended(self, metrics: dict) -> None:
        """After the update."""

    def evaluated(self, metrics: dict) -> None:
        """After the held-out pairs were scored."""

    def step_settled(self, step: int) -> None:
        """After a step's checkpoint and evaluation, if it has any."""

    def ended(self) -> None:
        """After the last step, or an error."""
