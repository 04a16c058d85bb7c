"""The training loop: for each step, DPO's loss on its pairs and one update; evaluations and checkpoints between."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo_ds.ahead import ahead
from dpo_ds.data.steps import MicroBatch, deal
from dpo_ds.engine import join
from dpo_ds.engine.engine import Engine
from dpo_ds.errors import RunStopped
from dpo_ds.losses.dpo import dpo_loss
from dpo_ds.losses.metrics import METRICS, preference_metrics
from dpo_ds.models.flops import Flops, peak_of
from dpo_ds.ranks import collectives, console, world
from dpo_ds.references.kinds import Reference
from dpo_ds.reports.watcher import Watcher
from dpo_ds.runs import checkpoint
from dpo_ds.runs.prepare import Run
from dpo_ds.scoring.packed import PackedBatch, move, pack
from dpo_ds.scoring.sweep import score_set

MOST_SKIPPED = 10  # steps in a row without an update
# Rounding error of a pair's margin, in nats (root mean square), between policy and reference when both are the same
# model: rounding differs with the micro-batch that a pair is in. bf16: estimated for GPUs (benchmarks/gpu_layers.py).
ROUNDING = {"fp32": 2e-4, "bf16": 0.3}


def first_loss_tolerance(precision: str, beta: float, pairs: float) -> float:
    """How far the first step's loss may be from ln 2: six standard deviations of the mean of `pairs` rounding errors.
    To first order, a pair's loss changes by beta / 2 times the error of its margin."""
    return 6 * beta / 2 * ROUNDING[precision] / math.sqrt(pairs)


@dataclass(frozen=True)
class Dealt:
    """A micro-batch of one step, packed and on the device."""

    step: int  # from 0
    micro_batch: MicroBatch
    batch: PackedBatch
    weights: torch.Tensor  # [B] fp32, of the batch's pairs
    last: bool  # of its step


@dataclass(frozen=True)
class Outcome:
    """What training returns: the last metrics, and the held-out answers' logps, float32 [answers] each."""

    metrics: dict
    policy_logps: np.ndarray
    reference_logps: np.ndarray


class Trainer:
    """Trains `policy` against `reference` on `run`'s schedule, and calls `watchers` at each event.

    Without `save`, no checkpoint is written.
    """

    def __init__(
        self, run: Run, policy: Engine, reference: Reference, watchers: Sequence[Watcher] = (), save: bool = True
    ):
        self.run, self.policy, self.reference, self.watchers = run, policy, reference, watchers
        self.options, self.save = run.options, save
        self.here = world.from_environment()
        self.starts_equal = self.options.reference != "none"
        self.router_coefficient = float(self.options.router_aux_loss_coef)
        self.metrics = [*METRICS, *(["router_aux_loss"] if self.router_coefficient > 0 else [])]
        self.flops, self.peak = Flops(run.model, self.options), peak_of(policy.device)
        self.skipped = 0  # steps in a row
        nothing = np.zeros(0, dtype=np.float32)
        self.held_out_policy = self.held_out_reference = nothing  # the latest evaluation's

    def train(self) -> Outcome:
        """Runs the remaining steps of the schedule."""
        try:
            return Outcome(self._train(), self.held_out_policy, self.held_out_reference)
        finally:
            self.notify("ended")

    def _train(self) -> dict:
        torch.manual_seed(self.options.seed + self.here.rank)  # only LoRA's dropout uses it
        done = checkpoint.load(self.policy, self.run.resume_from) if self.run.resume_from else 0
        steps = self.run.schedule.steps
        self.notify("starting", done, steps)
        with console.working("the first forward and backward"):
            self.warm_up(done)
        if len(self.run.eval_pairs):
            self.held_out_reference = self.reference.held_out_logps()
        last = self.evaluate(0) if done == 0 else {}
        dealt = ahead(self.pack, self.micro_batches(done))
        for number in range(done, steps):
            with join.patience(self.options.step_patience):
                last |= self.step(number, dealt)
            last |= self.after_step(number + 1)
            self.notify("step_settled", number + 1)
        return last | (self.evaluate(done) if done == steps else {})

    def notify(self, what: str, *facts) -> None:
        for watcher in self.watchers:
            getattr(watcher, what)(*facts)

    def after_step(self, steps_done: int) -> dict:
        """Saves a checkpoint and evaluates, where due. Returns the evaluation's metrics, or an empty dict."""
        ended = steps_done == self.run.schedule.steps
        if self.save and (ended or (self.options.save_every and steps_done % self.options.save_every == 0)):
            with console.working(f"saving the checkpoint of step {steps_done}"):
                checkpoint.save(self.policy, self.run.folder, steps_done, self.options)
        due = ended or (self.options.eval_every and steps_done % self.options.eval_every == 0)
        return self.evaluate(steps_done) if due else {}

    def warm_up(self, number: int) -> None:
        """Runs one forward and backward without effect on the weights. ZeRO-3 records its prefetch order on the first
        pass; if that pass had no backward (an evaluation), no later step would prefetch. A lack of memory also
        shows here."""
        with torch.random.fork_rng(devices=[self.policy.device] if self.policy.device.type == "cuda" else []):
            logps, balance = self.policy(self.pack(next(self.micro_batches(number))).batch)
            nothing = 0.0 * logps.sum() + (0.0 if balance is None else 0.0 * balance.sum())
            self.policy.backward(nothing, last=False)

    def micro_batches(self, first_step: int) -> Iterator[tuple[int, MicroBatch, bool]]:
        """Yields this rank's micro-batches from `first_step` on, each with its step and whether it is the last."""
        limit = self.options.micro_batch_tokens
        for number in range(first_step, self.run.schedule.steps):
            parts = self.run.train_pairs.parts(self.run.schedule.step(number), limit)
            own = deal(parts, self.here.size, limit)[self.here.rank]
            for place, micro_batch in enumerate(own):
                yield number, micro_batch, place == len(own) - 1

    def pack(self, dealt: tuple[int, MicroBatch, bool]) -> Dealt:
        """Packs a micro-batch and moves it to the device."""
        number, micro_batch, last = dealt
        pairs, device = self.run.train_pairs, self.policy.device
        batch = pack([pairs.group(part) for part in micro_batch.parts]).to(device)
        weights = move(torch.from_numpy(pairs.weights[micro_batch.pairs]), device)
        return Dealt(number, micro_batch, batch, weights, last)

    def step(self, number: int, upcoming: Iterator[Dealt]) -> dict:
        """One optimizer step over all its pairs, on all ranks. Returns its metrics."""
        started = time.perf_counter()
        self.notify("step_begins", number + 1)
        indices = self.run.schedule.step(number)
        weight = float(self.run.train_pairs.weights[indices].sum(dtype=np.float64))
        sums = torch.zeros(len(self.metrics), device=self.policy.device)
        for dealt in upcoming:
            assert dealt.step == number
            sums += self.learn(dealt, weight)
            self.notify("learned", dealt.batch)
            if dealt.last:
                break
        learning_rate = self.policy.learning_rate
        grad_norm, applied = self.policy.step()
        # dpo_ds's only collective in a step (DeepSpeed has its own for gradients), and the only wait for the device.
        means = collectives.sum_over_ranks(sums) / weight
        *values, grad_norm = torch.cat([means, grad_norm.to(means).view(1)]).tolist()
        self.check(number, indices, values[0], applied)
        seconds = time.perf_counter() - started
        prompts, answers, of_answer = self.run.train_pairs.lengths(indices)
        flops = self.flops.step(prompts, answers, of_answer) / seconds / self.here.size
        metrics = {
            "step": number + 1,
            "epoch": round((number + 1) / self.run.schedule.steps_per_epoch, 4),
            **dict(zip(self.metrics, values, strict=True)),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "applied": applied,
            "tokens/s": round(int(prompts.sum() + answers.sum()) / seconds, 1),
            "pairs/s": round(len(indices) / seconds, 2),
            "TFLOP/s a rank": round(flops / 1e12, 4),
            **({"mfu": round(flops / self.peak, 4)} if self.peak else {}),
        }
        self.notify("step_ended", metrics)
        return metrics

    def learn(self, dealt: Dealt, step_weight: float) -> torch.Tensor:
        """Forward and backward of one micro-batch. Returns the weighted sums of `self.metrics` over its pairs, on the
        device. step_weight: the sum of the weights of all the step's pairs."""
        pairs, weights = dealt.batch.pairs, dealt.micro_batch.weight * dealt.weights
        reference = self.reference.logps(dealt.micro_batch, dealt.batch)[pairs]
        answers, balance = self.policy(dealt.batch)
        logps = answers[pairs]
        losses = dpo_loss(logps[:, 0] - logps[:, 1], reference[:, 0] - reference[:, 1], self.options.beta)
        total = losses if balance is None else losses + self.router_coefficient * balance
        # DeepSpeed averages gradients over ranks; multiplied by their number, the average is the sum over all pairs.
        self.policy.backward((weights * total).sum() * self.here.size / step_weight, dealt.last)
        rows = preference_metrics(logps.detach(), reference, losses.detach(), self.options.beta)
        if balance is not None:
            rows = torch.cat([rows, balance.detach()[:, None]], dim=1)
        return (weights[:, None] * rows).sum(0)

    def check(self, number: int, indices: np.ndarray, loss: float, applied: bool) -> None:
        """Stops a run whose loss is not finite, whose first loss is not ln 2, or that no longer learns."""
        self.skipped = 0 if applied else self.skipped + 1
        if self.skipped == MOST_SKIPPED:
            raise RunStopped(
                f"the gradients of the last {MOST_SKIPPED} steps are not finite, so no update was applied: lower "
                "--learning_rate, and start again from an earlier checkpoint with --resume"
            )
        if not math.isfinite(loss):
            ids = ", ".join(self.run.train_pairs.pair_id(i) for i in indices)
            raise RunStopped(
                f"the loss is {loss} at step {number + 1}: lower --learning_rate, or look at its pairs: {ids}"
            )
        if number > 0 or not self.starts_equal:
            return
        weights = self.run.train_pairs.weights[indices].astype(np.float64)
        effective = weights.sum() ** 2 / (weights**2).sum()  # so many pairs of equal weight have as uncertain a mean
        if abs(loss - math.log(2)) > first_loss_tolerance(self.options.precision, self.options.beta, effective):
            raise RunStopped(
                f"the first loss is {loss:.6f}, but policy and reference start equal, so it must be ln 2 = 0.693147: "
                "check whether the weights changed after the reference table was made, whether the model's code has "
                "dropout, and whether its attention gives a token the same value in every packing"
            )

    def evaluate(self, steps_done: int) -> dict:
        """Metrics of the held-out pairs; an empty dict if there are none."""
        pairs = self.run.eval_pairs
        if len(pairs) == 0:
            return {}
        everything = np.arange(len(pairs.answers))
        logps = score_set(self.policy.score, pairs, everything, self.options.micro_batch_tokens, "held-out pairs")
        self.held_out_policy = logps
        policy, reference = (torch.from_numpy(own[pairs.pairs]) for own in (logps, self.held_out_reference))
        losses = dpo_loss(policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1], self.options.beta)
        rows = preference_metrics(policy, reference, losses, self.options.beta).double()
        weights = torch.from_numpy(pairs.weights).double()
        means = ((weights[:, None] * rows).sum(0) / weights.sum()).tolist()
        metrics = {"step": steps_done, **{f"eval/{key}": value for key, value in zip(METRICS, means, strict=True)}}
        self.notify("evaluated", metrics)
        return metrics
