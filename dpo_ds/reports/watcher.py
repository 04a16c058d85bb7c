"""Looking on while a run trains: what progress, benchmarks and tests hook into."""

from dpo_ds.scoring.packed import PackedBatch


class Watcher:
    """Does nothing; whoever looks on overrides what it wants to see. Each rank calls its own, in this order."""

    def starting(self, steps_done: int, steps: int) -> None:
        """Before the first step that this start of the run makes, of `steps` in all."""

    def step_begins(self, step: int) -> None:
        """Before a step's first micro-batch; steps count from 1."""

    def learned(self, batch: PackedBatch) -> None:
        """After a micro-batch's forward and backward."""

    def step_ended(self, metrics: dict) -> None:
        """After the update."""

    def evaluated(self, metrics: dict) -> None:
        """After the held-out pairs were scored."""

    def step_settled(self, step: int) -> None:
        """After the checkpoint and the evaluation that follow a step, if any do."""

    def ended(self) -> None:
        """After the last step, or an error."""
