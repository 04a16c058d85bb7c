"""The kinds of reference: a precomputed table, a live engine, LoRA's base weights, or none."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dpo_ds.data.steps import MicroBatch
from dpo_ds.engine.engine import Engine
from dpo_ds.engine.moving import MovingWeights
from dpo_ds.ranks import console, world
from dpo_ds.references.table import engine_of, reference_tables
from dpo_ds.runs.prepare import Run
from dpo_ds.scoring.packed import PackedBatch, move
from dpo_ds.scoring.sweep import Places, Score, score_set

UPDATE_ALPHA = 0.6  # the paper's soft update


class Reference(Protocol):
    """What the trainer needs from a reference. It is made before the policy, so that an engine that only fills a table
    is gone by then. Log-probabilities are those of answers [A], or of their learned tokens [N] in a run of LD-DPO."""

    def attach(self, policy: Engine) -> None:
        """Takes the policy's engine. Called once, before the other methods."""

    def begin(self) -> None:
        """Computes what must be known before the first step. Called once: the policy has run `backward` and, unless it
        was restored from a checkpoint, is as it starts."""

    def logps(self, micro_batch: MicroBatch, batch: PackedBatch) -> torch.Tensor:
        """Those of a micro-batch of training pairs, [A] or [N], on the policy's device."""

    def known(self) -> np.ndarray | None:
        """Those of the training answers, float32, as far as they are known before the first step; NaN where not."""

    def held_out_logps(self) -> np.ndarray:
        """Those of all held-out answers, float32. Under ZeRO-3 the policy must have run `backward` once."""

    def follow(self, steps_done: int) -> bool:
        """Called after each step. Returns whether the reference has changed, and with it all its logps."""

    def save(self, folder: Path) -> dict[str, dict]:
        """Writes this rank's part of what has changed since the run's start into a checkpoint's folder. Returns the
        files' sizes and checksums. Raises OSError."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. Called after `attach`, before the policy takes a step."""

    def close(self) -> None:
        """Frees what the reference holds."""


class Fixed:
    """A reference that stays as it is."""

    def begin(self) -> None:
        pass

    def known(self) -> np.ndarray | None:
        return None

    def follow(self, steps_done: int) -> bool:
        return False

    def save(self, folder: Path) -> dict[str, dict]:
        return {}

    def load(self, folder: Path) -> None:
        pass


def reference_of(run: Run) -> Reference:
    """The reference that the run's options name."""
    kind = run.options.reference
    if run.table is not None or kind == "precomputed":
        return Precomputed(run)
    if kind == "live":
        return Live(run) if run.options.reference_update_every is None else Moving(run)
    return Base(run) if kind == "base" else NoReference(run)


class Precomputed(Fixed):
    """Reads the logps from the reference table.

    What the table lacks is scored by the policy itself where it starts as the reference: its weights are not read
    twice, and a lack of memory shows before the scoring. Otherwise an engine of the reference's own has scored it
    before the policy comes.
    """

    training: np.ndarray  # float32, flat; set by `begin` if the policy scores
    held_out: np.ndarray  # likewise
    policy: Engine  # set by attach

    def __init__(self, run: Run):
        self.run = run
        self.places = Places.of_set(run.train_pairs, run.options.ld_alpha is not None)
        self.by_policy = run.table is None and run.starts_equal and run.resume_from is None
        if run.table is not None:
            self.training, self.held_out = run.table.training, run.table.held_out
        elif not self.by_policy:
            self.training, self.held_out = reference_tables(run)

    def attach(self, policy: Engine) -> None:
        self.policy = policy

    def begin(self) -> None:
        if self.by_policy:
            self.training, self.held_out = reference_tables(self.run, score=self.policy.score)

    def known(self) -> np.ndarray | None:
        return self.training

    def logps(self, micro_batch: MicroBatch, batch: PackedBatch) -> torch.Tensor:
        return move(torch.from_numpy(self.training[self.places.of(micro_batch.answers)]), self.policy.device)

    def held_out_logps(self) -> np.ndarray:
        return self.held_out

    def close(self) -> None:
        pass


class Live(Fixed):
    """Scores with a second, frozen engine beside the policy's."""

    def __init__(self, run: Run):
        self.run = run
        with console.working("loading the reference"):
            self.engine = engine_of(run.reference, run.options)

    def attach(self, policy: Engine) -> None:
        pass

    def logps(self, micro_batch: MicroBatch, batch: PackedBatch) -> torch.Tensor:
        return self.engine.score(batch)

    def held_out_logps(self) -> np.ndarray:
        return _score_held_out(self.run, self.engine.score)

    def close(self) -> None:
        self.engine.close()


class Moving(Live):
    """A live reference that moves towards the policy after every n steps (TR-DPO)."""

    weights: MovingWeights  # set by attach

    def __init__(self, run: Run):
        super().__init__(run)
        assert run.options.reference_update_every is not None
        self.every = run.options.reference_update_every
        self.alpha = UPDATE_ALPHA if run.options.reference_update_alpha is None else run.options.reference_update_alpha

    def attach(self, policy: Engine) -> None:
        self.weights = MovingWeights(self.engine, policy)

    def follow(self, steps_done: int) -> bool:
        due = steps_done % self.every == 0
        if due:
            self.weights.move(self.alpha)
        return due

    def save(self, folder: Path) -> dict[str, dict]:
        return self.weights.save(folder, world.from_environment())

    def load(self, folder: Path) -> None:
        self.weights.load(folder, world.from_environment())


class Base(Fixed):
    """Scores with the base weights under the policy's LoRA adapters."""

    policy: Engine  # set by attach

    def __init__(self, run: Run):
        self.run = run

    def attach(self, policy: Engine) -> None:
        self.policy = policy

    def logps(self, micro_batch: MicroBatch, batch: PackedBatch) -> torch.Tensor:
        return self.policy.score_base(batch)

    def held_out_logps(self) -> np.ndarray:
        return _score_held_out(self.run, self.policy.score_base)

    def close(self) -> None:
        pass


class NoReference(Fixed):
    """Log-probabilities of 0: the loss depends on the policy alone."""

    def __init__(self, run: Run):
        self.per_token = run.options.ld_alpha is not None
        self.held_out = Places.of_set(run.eval_pairs, self.per_token).total

    def attach(self, policy: Engine) -> None:
        pass

    def logps(self, micro_batch: MicroBatch, batch: PackedBatch) -> torch.Tensor:
        return torch.zeros(len(batch.targets) if self.per_token else batch.answers, device=batch.input_ids.device)

    def held_out_logps(self) -> np.ndarray:
        return np.zeros(self.held_out, dtype=np.float32)

    def close(self) -> None:
        pass


def _score_held_out(run: Run, score: Score) -> np.ndarray:
    everything = np.arange(len(run.eval_pairs.answers))
    per_token, title = run.options.ld_alpha is not None, "reference: held-out pairs"
    return score_set(score, run.eval_pairs, everything, run.options.scoring_tokens, title, per_token)
