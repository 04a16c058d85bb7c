"""The loop: steps of pairs through the policy, DPO's loss, one optimizer update each; evaluation and checkpoints."""

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dpo_ds import checkpoint, world
from dpo_ds.ahead import ahead
from dpo_ds.data.steps import MicroBatch, deal
from dpo_ds.engines import Engine
from dpo_ds.flops import Flops, peak_of
from dpo_ds.losses import dpo_loss
from dpo_ds.prepare import Run
from dpo_ds.report import METRICS, Reporter, preference_metrics
from dpo_ds.score import score_all
from dpo_ds.scoring.packed import PackedBatch, pack

# (indices of the training pairs, their packed batch) -> the reference's logps [B, 2]
Reference = Callable[[MicroBatch, PackedBatch], torch.Tensor]

# How far a pair's margin may be from its reference's, in nats (root mean square), when both are the same model: a row's
# products are rounded in another way in another micro-batch. bf16 is an estimate for GPUs (benchmarks/gpu_layers.py).
ROUNDING = {"fp32": 2e-4, "bf16": 0.3}


def first_loss_tolerance(precision: str, beta: float, pairs: int) -> float:
    """How far from ln 2 the first step's loss may be: six standard deviations of a mean of `pairs` rounding errors. To
    first order, a pair's loss moves by beta / 2 times its margin's error."""
    return 6 * beta / 2 * ROUNDING[precision] / math.sqrt(pairs)


class Trainer:
    """Trains `policy` through `run`'s schedule.

    `reference` gives the reference's logps of a micro-batch, `eval_reference` of all held-out pairs (or how to get
    them, for references that need a warm policy engine).
    """

    def __init__(self, run: Run, policy: Engine, reference: Reference, eval_reference: Callable[[], np.ndarray]):
        self.run, self.policy, self.reference = run, policy, reference
        self.options = run.options
        self.here = world.from_environment()
        self.eval_reference = eval_reference
        self.starts_equal = self.options.reference != "none"
        self.router_coefficient = float(self.options.router_aux_loss_coef)
        self.metrics = [*METRICS, *(["router_aux_loss"] if self.router_coefficient > 0 else [])]
        self.flops, self.peak = Flops(run.model, self.options), peak_of(policy.device)

    def train(self) -> dict:
        """Runs what is left of the schedule. Returns the last metrics."""
        torch.manual_seed(self.options.seed + self.here.rank)  # only LoRA's dropout draws from it
        done = checkpoint.load(self.policy, self.run.resume_from) if self.run.resume_from else 0
        self.reporter = Reporter(self.run.folder, done, self.run.schedule.steps)
        self.warm_up(done)
        self.eval_reference = self.eval_reference() if len(self.run.eval_pairs) else None
        last: dict = self.evaluate(0) if done == 0 else {}
        self.upcoming = ahead(lambda micro_batch: (micro_batch, self.pack(micro_batch)), self.micro_batches(done))
        for number in range(done, self.run.schedule.steps):
            last |= self.step(number)
            self.after_step(number + 1, last)
        if done == self.run.schedule.steps:
            last |= self.evaluate(done)
        self.reporter.close()
        return last

    def after_step(self, steps_done: int, last: dict) -> None:
        ended = steps_done == self.run.schedule.steps
        if ended or (self.options.save_every and steps_done % self.options.save_every == 0):
            checkpoint.save(self.policy, self.run.folder, steps_done, self.options)
        if ended or (self.options.eval_every and steps_done % self.options.eval_every == 0):
            last |= self.evaluate(steps_done)

    def warm_up(self, number: int) -> None:
        """One forward and backward that count for nothing. ZeRO-3 fixes what it prefetches on its first pass, and a
        first pass without a backward (an evaluation) would spoil every step; and what lacks memory fails here."""
        with torch.random.fork_rng(devices=[self.policy.device] if self.policy.device.type == "cuda" else []):
            logps, balance = self.policy(self.pack(self.deal(self.run.schedule.step(number))[0]))
            nothing = 0.0 * logps.sum() + (0.0 if balance is None else 0.0 * balance.sum())
            self.policy.backward(nothing, last=False)

    def deal(self, indices: np.ndarray) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        lengths = self.run.train_pairs.packed_lengths
        return deal(indices, lengths, self.here.size, self.options.micro_batch_tokens)[self.here.rank]

    def micro_batches(self, first_step: int) -> Iterator[MicroBatch]:
        """Of all steps from that one on."""
        for number in range(first_step, self.run.schedule.steps):
            yield from self.deal(self.run.schedule.step(number))

    def pack(self, micro_batch: MicroBatch) -> PackedBatch:
        """On the device."""
        return pack([self.run.train_pairs.pair(i) for i in micro_batch.indices]).to(self.policy.device)

    def step(self, number: int) -> dict:
        """One optimizer step: every pair of it once, over all ranks. Returns its metrics."""
        started = time.perf_counter()
        indices = self.run.schedule.step(number)
        count = len(self.deal(indices))
        sums = torch.zeros(len(self.metrics), device=self.policy.device)
        for place in range(count):
            sums += self.learn(*next(self.upcoming), len(indices), last=place == count - 1)
        learning_rate = self.policy.learning_rate
        grad_norm, applied = self.policy.step()
        # The step's one collective of ours (DeepSpeed has its own for the gradients), and the one wait for the device.
        means = world.sum_over_ranks(sums) / len(indices)
        *values, grad_norm = torch.cat([means, grad_norm.to(means).view(1)]).tolist()
        self.check(number, indices, values[0])
        seconds = time.perf_counter() - started
        flops = self.flops.step(self.run.train_pairs.lengths[indices]) / seconds / self.here.size
        metrics = {
            "step": number + 1,
            "epoch": round((number + 1) / self.run.schedule.steps_per_epoch, 4),
            **dict(zip(self.metrics, values, strict=True)),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "applied": applied,
            "tokens/s": round(int(self.run.train_pairs.packed_lengths[indices].sum()) / seconds, 1),
            "pairs/s": round(len(indices) / seconds, 2),
            "TFLOP/s a rank": round(flops / 1e12, 4),
            **({"mfu": round(flops / self.peak, 4)} if self.peak else {}),
        }
        self.reporter.step(metrics)
        return metrics

    def learn(self, micro_batch: MicroBatch, batch: PackedBatch, step_pairs: int, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch. Returns its sums of `self.metrics`, on the device."""
        reference = self.reference(micro_batch, batch)
        logps, balance = self.policy(batch)
        losses = dpo_loss(logps[:, 0] - logps[:, 1], reference[:, 0] - reference[:, 1], self.options.beta)
        total = losses.sum()
        if balance is not None:
            total = total + self.router_coefficient * balance.sum()
        # DeepSpeed averages gradients over ranks: times their number, the average is the sum over all pairs.
        self.policy.backward(micro_batch.weight * total * self.here.size / step_pairs, last)
        rows = preference_metrics(logps.detach(), reference, losses.detach(), self.options.beta)
        if balance is not None:
            rows = torch.cat([rows, balance.detach()[:, None]], dim=1)
        return micro_batch.weight * rows.sum(0)

    def check(self, number: int, indices: np.ndarray, loss: float) -> None:
        """Stops a run whose loss is not finite, or whose first loss is not ln 2."""
        if not math.isfinite(loss):
            ids = ", ".join(self.run.train_pairs.pair_id(i) for i in indices)
            raise world.RunStopped(
                f"the loss is {loss} at step {number + 1}: lower --learning_rate, or look at its pairs: {ids}"
            )
        allowed = first_loss_tolerance(self.options.precision, self.options.beta, len(indices))
        if number == 0 and self.starts_equal and abs(loss - math.log(2)) > allowed:
            raise world.RunStopped(
                f"the first loss is {loss:.6f}, but policy and reference start equal and it must be ln 2 = 0.693147: "
                "look at the weights (changed since the reference table was made?), at dropout in the model's code, "
                "and whether its attention gives a token the same value in any packing"
            )

    def evaluate(self, steps_done: int) -> dict:
        """Metrics of the held-out pairs; an empty dict if there are none."""
        pairs = self.run.eval_pairs
        if len(pairs) == 0:
            return {}
        everything = np.arange(len(pairs))
        table = score_all(self.policy.score, pairs, everything, self.options.micro_batch_tokens, "held-out pairs")
        self.eval_logps = table
        policy, reference = torch.from_numpy(table), torch.from_numpy(self.eval_reference)
        losses = dpo_loss(policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1], self.options.beta)
        means = preference_metrics(policy, reference, losses, self.options.beta).double().mean(0).tolist()
        metrics = {"step": steps_done, **{f"eval/{key}": value for key, value in zip(METRICS, means, strict=True)}}
        self.reporter.evaluation(metrics)
        return metrics
