"""The training loop: for each step, the loss on its pairs and one update; evaluations and checkpoints between."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch

from dpo_ds.ahead import ahead
from dpo_ds.engine.engine import Engine
from dpo_ds.errors import Nonsense, RunStopped, SaveFailed, Stopped
from dpo_ds.learner import Dealt, Learner, Step
from dpo_ds.models.flops import Flops, peak_of
from dpo_ds.ranks import collectives, console, family, hang, signals, world
from dpo_ds.references.kinds import Reference
from dpo_ds.reports.record import first_lines
from dpo_ds.reports.watcher import Watcher
from dpo_ds.runs import bad_steps, checkpoint, stopped
from dpo_ds.runs.prepare import Run
from dpo_ds.runs.sense import Sense, remedy
from dpo_ds.scoring.sweep import score_set

# Rounding error of a pair's margin, in nats (root mean square), between policy and reference when both are the same
# model: rounding differs with the micro-batch that a pair is in. bf16: estimated for GPUs (benchmarks/gpu_layers.py).
ROUNDING = {"fp32": 2e-4, "bf16": 0.3}
STOP_FILE = "stop"  # in the run's folder: asks the run to stop


@dataclass(frozen=True)
class Outcome:
    """What training returns: the last metrics, and the held-out logps as references give them, float32."""

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
        self.learner = Learner(run, policy, reference)
        self.starts_equal = run.starts_equal
        self.flops, self.peak = Flops(run.model, self.options), peak_of(policy.device)
        self.bad_steps = 0  # in a row
        self.stop_file = run.folder / STOP_FILE
        self.asked: signals.Request | None = None  # this rank was asked to stop
        self.stopping = False  # some rank was, which all ranks learn in a step
        self.sense: Sense  # set by `begin`
        self.done: int  # steps; likewise
        self.latest: Dealt | None = None  # a micro-batch of the last step
        self.reference_moved = True  # since its held-out logps were computed
        nothing = np.zeros(0, dtype=np.float32)
        self.held_out_policy = self.held_out_reference = nothing  # the latest evaluation's

    def begin(self) -> None:
        """Restores the checkpoint, if there is one, and lets the reference compute what the first step needs."""
        torch.manual_seed(self.options.seed + self.here.rank)  # only LoRA's dropout uses it
        self.done, self.sense = 0, Sense(self.run.model.vocabulary, self.policy.largest_weight())
        if self.run.resume_from:
            self.done, self.learner.running = checkpoint.load(
                self.policy, self.reference, self.run.resume_from, self.run.keeps_optimizer
            )
        with console.working("the first forward and backward"):
            # A run that only has to export has no step left.
            self.learner.warm_up(min(self.done, self.run.schedule.steps - 1))
        self.reference.begin()

    def train(self) -> Outcome:
        """Runs the remaining steps of the schedule. `begin` comes first."""
        try:
            return Outcome(self._train(), self.held_out_policy, self.held_out_reference)
        except Nonsense as error:
            if self.here.speaks:
                stopped.mark(self.run.folder, str(error))
            raise
        finally:
            self.notify("ended")

    def _train(self) -> dict:
        done, steps = self.done, self.run.schedule.steps
        self.notify("starting", done, steps)
        self.sense.remember(collectives.on_rank_0(lambda: first_lines(self.run.folder)))
        last = self.evaluate(0) if done == 0 else {}
        dealt = ahead(self.learner.pack, self.learner.micro_batches(done))
        if self.here.speaks and self.stop_file.exists():
            console.say(f"{self.stop_file} was there before training began, and is removed")
            self.stop_file.unlink()
        with signals.at_boundaries(self.options.stop_seconds):
            for number in range(done, steps):
                with hang.limited("step"):
                    last |= self.step(number, dealt)
                last |= self.after_step(number + 1)
                self.notify("step_settled", number + 1)
                if self.stopping:
                    self.stop(number + 1)
        return last | (self.evaluate(done) if done == steps else {})

    def notify(self, what: str, *facts) -> None:
        for watcher in self.watchers:
            getattr(watcher, what)(*facts)

    def after_step(self, steps_done: int) -> dict:
        """Evaluates and saves a checkpoint, where due. Returns the evaluation's metrics, or an empty dict.

        A checkpoint comes last: a run that resumes from it has the evaluation of its step in the record.
        """
        self.reference_moved |= self.reference.follow(steps_done)
        ended = steps_done == self.run.schedule.steps
        due = ended or (self.options.eval_every and steps_done % self.options.eval_every == 0)
        found = self.evaluate(steps_done) if due else {}
        if self.save and (ended or (self.options.save_every and steps_done % self.options.save_every == 0)):
            self.check_weights(steps_done, evaluated=bool(found))
            self.save_checkpoint(steps_done, ended)
        return found

    def stop(self, steps_done: int) -> NoReturn:
        """Saves a checkpoint and ends the run on all ranks, because one of them was asked to stop."""
        request = collectives.first(self.asked)
        assert request is not None
        saved = self.save and self.save_checkpoint(steps_done, ended=False)
        if self.here.speaks:
            self.stop_file.unlink(missing_ok=True)
        kept = "saved" if saved else "which could not be saved" if self.save else "not saved"
        again = "" if self.options.resume == "auto" or self.run.began_elsewhere else " --resume auto"
        raise Stopped(
            f"stopped by {request.why} after step {steps_done} of {self.run.schedule.steps}, {kept}; to go on: "
            f"{family.command()}{again}",
            request.code,
        )

    def asked_by_file(self) -> signals.Request | None:
        """The request that a file `stop` in the run's folder is; rank 0 looks."""
        if not (self.here.speaks and self.stop_file.exists()):
            return None
        return signals.Request(f"the file {self.stop_file}", 0)

    def save_checkpoint(self, steps_done: int, ended: bool) -> bool:
        """Saves a checkpoint. If that fails, the run goes on as --on_save_error says; but a run that has ended stops if
        nothing else would keep its weights. Returns whether it was saved."""
        try:
            with console.working(f"saving the checkpoint of step {steps_done}"):
                checkpoint.save(self.run, self.policy, self.reference, steps_done, self.learner.running)
        except SaveFailed as error:
            if self.options.on_save_error == "stop" or (ended and self.options.export == "none"):
                raise
            console.complain(f"{error}; training goes on, and the next checkpoint is tried when it is due")
            return False
        return True

    def step(self, number: int, upcoming: Iterator[Dealt]) -> dict:
        """One optimizer step over all its pairs, on all ranks. Returns its metrics."""
        started = time.perf_counter()
        console.doing(f"step {number + 1}")
        self.notify("step_begins", number + 1)
        first = next(upcoming)
        step, running = first.step, self.learner.running
        assert step.number == number
        sums = self.learner.learn(_rest_of_step(first, upcoming), lambda batch: self.notify("learned", batch))
        learning_rate = self.policy.learning_rate
        grad_norm, applied = self.policy.step()
        self.asked = signals.asked() or self.asked_by_file()
        # dpo_ds's only collective in a step (DeepSpeed has its own for gradients), and the only wait for the device.
        asked = sums.equal_loss.new_full((1,), float(self.asked is not None))
        own = [sums.metrics, sums.equal_loss[None], sums.square_slopes[None], asked]
        summed = collectives.sum_over_ranks(torch.cat(own))
        found = torch.cat([summed, grad_norm.to(summed).view(1)]).tolist()
        *totals, equal_loss, square_slopes, stopping, grad_norm = found
        self.stopping = stopping > 0
        values = [total / step.weight for total in totals]
        if not applied:
            self.learner.running = running
        indices = step.pairs
        seconds = time.perf_counter() - started
        prompts, answers, of_answer = self.run.train_pairs.lengths(indices)
        flops = self.flops.step(prompts, answers, of_answer) / seconds / self.here.size
        metrics = {
            "step": number + 1,
            "epoch": round((number + 1) / self.run.schedule.steps_per_epoch, 4),
            **dict(zip(self.learner.metrics, values, strict=True)),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "clipped": applied and 0 < self.options.max_grad_norm < grad_norm,
            "applied": applied,
            "tokens/s": round(int(prompts.sum() + answers.sum()) / seconds, 1),
            "pairs/s": round(len(indices) / seconds, 2),
            "TFLOP/s a rank": round(flops / 1e12, 4),
            **({"mfu": round(flops / self.peak, 4)} if self.peak else {}),
        }
        self.notify("step_ended", metrics)
        self.check(step, values[0], grad_norm, applied)
        self.latest = first
        if problem := self.sense.of_step(metrics):
            self.stop_by_figures(
                number + 1, problem, bad_steps.noted(self.run, number + 1, values[0], grad_norm, step.pairs)
            )
        if number == 0 and self.starts_equal and applied:
            self.check_first_loss(values[0], equal_loss / step.weight, math.sqrt(square_slopes / 2) / step.weight)
        return metrics

    def check(self, step: Step, loss: float, grad_norm: float, applied: bool) -> None:
        """Writes down a step whose loss or gradients are not finite, which changed no weights. Stops the run after
        --max_bad_steps of them in a row."""
        self.bad_steps = 0 if applied else self.bad_steps + 1
        if applied:
            return
        if self.here.speaks:
            console.say(
                f"step {step.number + 1}: its loss ({loss:.6g}) or gradients (norm {grad_norm:.6g}) are not finite, so "
                f"it changed nothing{bad_steps.noted(self.run, step.number + 1, loss, grad_norm, step.pairs)}"
            )
        if self.bad_steps == self.options.max_bad_steps:
            raise Nonsense(
                f"{self.bad_steps} steps in a row have a loss or gradients that are not finite; the weights are those "
                f"of step {step.number + 1 - self.bad_steps}: look at the pairs in "
                f"{self.run.folder / bad_steps.FOLDER}, or {remedy(self.options)}"
            )

    def check_first_loss(self, loss: float, equal: float, slope: float) -> None:
        """Stops a run whose first loss is not `equal`, the loss with the policy equal to the reference (DPO: ln 2).

        slope: by how much a rounding error of one nat in each pair's margin would change it, root mean square. Six
        times that is allowed for rounding errors of the usual size, and a millionth of the loss for its own, an fp32
        sum: sppo_hard begins at 500,000.
        """
        if abs(loss - equal) > 6 * slope * ROUNDING[self.options.precision] + 1e-6 * abs(equal):
            raise RunStopped(
                f"the first loss is {loss:.6f}, but policy and reference start equal, so it must be {equal:.6f}: "
                "check whether the weights changed after the reference table was made, whether the model's code has "
                "dropout, and whether its attention gives a token the same value in every packing"
            )

    def evaluate(self, steps_done: int) -> dict:
        """Metrics of the held-out pairs; an empty dict if there are none."""
        pairs = self.run.eval_pairs
        if len(pairs) == 0:
            return {}
        if self.reference_moved:
            self.held_out_reference = self.reference.held_out_logps()
            self.reference_moved = False
        everything, per_token = np.arange(len(pairs.answers)), self.options.ld_alpha is not None
        limit = self.options.scoring_tokens
        logps = score_set(self.policy.score, pairs, everything, limit, "held-out pairs", per_token)
        self.held_out_policy = logps
        found = self.learner.held_out(logps, self.held_out_reference)
        metrics = {"step": steps_done, **{f"eval/{key}": value for key, value in found.items()}}
        self.notify("evaluated", metrics)
        if problem := self.sense.of_evaluation(metrics):
            self.stop_by_figures(steps_done, problem)
        return metrics

    def check_weights(self, steps_done: int, evaluated: bool) -> None:
        """Stops the run rather than let it save ruined weights over good work. An update shows in the next step's
        figures only; so without an evaluation, a micro-batch of the last step is scored once more."""
        problem = self.sense.of_weights(self.policy.largest_weight())
        if problem is None and not evaluated and self.latest is not None:
            problem = self.sense.of_chosen(self.learner.chosen_again(self.latest))
        if problem:
            self.stop_by_figures(steps_done, problem)

    def stop_by_figures(self, steps_done: int, problem: str, pairs: str = "") -> NoReturn:
        """Stops the run, whose figures make no sense. pairs: how to look at the step's pairs."""
        raise Nonsense(f"step {steps_done}: {problem}; nothing more is saved; {remedy(self.options)}{pairs}")


def _rest_of_step(first: Dealt, upcoming: Iterator[Dealt]) -> Iterator[Dealt]:
    """This rank's micro-batches of one step, of which `first` has been taken."""
    yield first
    while not first.last:
        first = next(upcoming)
        yield first
