"""What a step learns from its pairs: their log-probabilities, the losses, the gradients, and the sums of the metrics.

Losses that read the whole step need the logps of all its pairs before the first backward. With one micro-batch on each
rank, they are gathered between forward and backward. With several, a first pass over them without gradients gets the
logps, and a second one learns: a step costs a third more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dpo_ds.data.pairs import PairSet
from dpo_ds.data.steps import MicroBatch, deal
from dpo_ds.engine.engine import Engine
from dpo_ds.losses.compared import Compared, Facts, Running
from dpo_ds.losses.lengths import length_desensitised
from dpo_ds.losses.metrics import names_of, preference_metrics
from dpo_ds.losses.objective import Judged, Objective
from dpo_ds.ranks import collectives, world
from dpo_ds.references.kinds import Reference
from dpo_ds.reports.figures import rank_correlation
from dpo_ds.runs.prepare import Run
from dpo_ds.scoring.packed import PackedBatch, move, pack, shared_tokens
from dpo_ds.scoring.scorer import Scored

LEAST_CORRELATED = 30  # held-out pairs: a correlation of fewer says little


@dataclass(frozen=True)
class Step:
    """The pairs of one step, of all ranks."""

    number: int  # from 0
    pairs: np.ndarray  # int64 [S], ascending: their places in the set
    weight: float  # the sum of their weights
    mean_length: float  # of their chosen answers, weighted


@dataclass(frozen=True)
class Dealt:
    """A micro-batch of one step, packed and on the device."""

    step: Step
    micro_batch: MicroBatch
    batch: PackedBatch
    facts: Facts  # of its pairs, on the device; the weights are 0 in a micro-batch without effect
    last: bool  # of its step


@dataclass(frozen=True)
class Sums:
    """Weighted sums over this rank's pairs of a step, on the device."""

    metrics: torch.Tensor  # [k] in the order of Learner.metrics
    equal_loss: torch.Tensor  # [] the loss that the pairs would have with the policy equal to the reference
    square_slopes: torch.Tensor  # [] sum over the pairs' answers of (d of the sum of losses / d logps)^2


class Learner:
    """Learns the run's pairs. `running` is what the losses remember of the steps so far."""

    def __init__(self, run: Run, policy: Engine, reference: Reference):
        self.run, self.policy, self.reference = run, policy, reference
        self.here = world.from_environment()
        self.ranks, self.limit = self.here.size, run.options.micro_batch_tokens
        self.objective = Objective(run.options)
        self.running = Running()
        self.ld_alpha = run.options.ld_alpha
        self.router_coefficient = float(run.options.router_aux_loss_coef)
        self.compares = run.options.reference != "none"
        self.pair_metrics = names_of(self.objective.names, self.compares)
        self.metrics = [*self.pair_metrics, *(["aux_loss"] if self.router_coefficient > 0 else [])]
        longest = int(run.train_pairs.group_limits.max())
        # A ranking whose answers are in several micro-batches is judged with the whole step.
        self.whole_steps = {"step": True, "group": longest > self.limit, "pair": False}[self.objective.scope]

    def micro_batches(self, first_step: int) -> Iterator[tuple[Step, MicroBatch, bool]]:
        """Yields this rank's micro-batches from `first_step` on, each with its step and whether it is the last."""
        pairs = self.run.train_pairs
        for number in range(first_step, self.run.schedule.steps):
            indices = np.sort(self.run.schedule.step(number))
            step = Step(number, indices, *_weight_and_length(pairs, indices))
            own = deal(pairs.parts(indices, self.limit), self.ranks, self.limit)[self.here.rank]
            for place, micro_batch in enumerate(own):
                yield step, micro_batch, place == len(own) - 1

    def pack(self, dealt: tuple[Step, MicroBatch, bool]) -> Dealt:
        """Packs a micro-batch and moves it to the device."""
        step, micro_batch, last = dealt
        pairs, device = self.run.train_pairs, self.policy.device
        batch = pack([pairs.group(part) for part in micro_batch.parts], shared=self.ld_alpha is not None).to(device)
        facts = facts_of(pairs, np.array(micro_batch.pairs), device, micro_batch.weight)
        return Dealt(step, micro_batch, batch, facts, last)

    def warm_up(self, number: int) -> None:
        """Runs one forward and backward without effect on the weights. ZeRO-3 records its prefetch order on the first
        pass; if that pass had no backward (an evaluation), no later step would prefetch. A lack of memory also
        shows here."""
        with self._random_state_kept():
            found = self.policy(self.pack(next(self.micro_batches(number))).batch)
            graphs = [values for values in (found.answers, found.tokens, found.balance) if values is not None]
            self.policy.backward(0.0 * torch.cat([values.view(-1) for values in graphs]).sum(), last=False)

    def chosen_again(self, dealt: Dealt) -> float:
        """The mean log-probability of a token of all ranks' chosen answers in these micro-batches, with the weights as
        they are now. All ranks call it together."""
        scored = self.policy.score(dealt.batch)
        self.policy.release_gathered()
        policy = self._of_pairs(Scored(scored, scored), dealt.batch)
        weights = dealt.facts.weights
        per_token = policy[:, 0] / dealt.facts.lengths[:, 0]
        total, count = collectives.sum_over_ranks(torch.stack([(weights * per_token).sum(), weights.sum()])).tolist()
        return total / count

    def learn(self, own: Sequence[Dealt] | Iterator[Dealt], learned: Callable[[PackedBatch], None]) -> Sums:
        """Adds the gradients of this rank's micro-batches of one step. `learned` is called after each backward.

        Losses that read the whole step remember it: see `running`.
        """
        sums = []
        if self.whole_steps:
            sums = list(self._learn_together(list(own), learned))
        else:
            for dealt in own:
                reference = self._reference(dealt)
                scored = self.policy(dealt.batch)
                x = self._compared(dealt, scored, reference)
                judged, equal = self._judge(x, _certainty(scored, dealt.batch), dealt.step)
                sums.append(self._backward(dealt, scored, x, judged, equal))
                learned(dealt.batch)
        return Sums(*(torch.stack(column).sum(0) for column in zip(*sums, strict=True)))

    def _learn_together(self, own: list[Dealt], learned: Callable[[PackedBatch], None]) -> Iterator[tuple]:
        """The same for losses that read the whole step: all ranks' logps come first."""
        references = [self._reference(dealt) for dealt in own]
        scored = [self.policy(own[0].batch)] if len(own) == 1 else []
        with self._random_state_kept():
            seen = scored or [self.policy.preview(dealt.batch) for dealt in own]
        compared = [self._compared(*found) for found in zip(own, seen, references, strict=True)]
        certainties = [_certainty(found, dealt.batch) for found, dealt in zip(seen, own, strict=True)]
        step = own[0].step
        whole, certainty = self._gather(step, own, compared, certainties)
        judged, equal = self._judge(whole, certainty, step)
        for number, (dealt, x) in enumerate(zip(own, compared, strict=True)):
            places = torch.from_numpy(np.searchsorted(step.pairs, dealt.micro_batch.pairs)).to(self.policy.device)
            weight = dealt.micro_batch.weight
            found = scored[number] if scored else self.policy(dealt.batch)
            equals = None if equal is None else equal.of(places, weight)
            yield self._backward(dealt, found, x, judged.of(places, weight), equals)
            learned(dealt.batch)
        self.running = self.objective.after(whole)

    def _judge(self, x: Compared, certainty: torch.Tensor | None, step: Step) -> tuple[Judged, Judged | None]:
        """The pairs' losses; in the first step also those with the policy equal to the reference."""
        equal = self.objective.judge(replace(x, policy=x.reference), certainty) if step.number == 0 else None
        return self.objective.judge(x, certainty), equal

    def _backward(
        self, dealt: Dealt, scored: Scored, x: Compared, judged: Judged, equal: Judged | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds the gradients of a micro-batch. Returns the fields of its Sums."""
        total = (judged.slopes * self._of_pairs(scored, dealt.batch)).sum()
        if scored.balance is not None:
            total = total + self.router_coefficient * (x.weights * scored.balance).sum()
        # DeepSpeed averages gradients over ranks; multiplied by their number, the average is the sum over all pairs.
        self.policy.backward(total * self.ranks / dealt.step.weight, dealt.last)
        rows = self._metrics(x, judged)
        if scored.balance is not None:
            rows = torch.cat([rows, scored.balance.detach()[:, None]], dim=1)
        nothing = torch.zeros((), device=rows.device)
        return (
            (x.weights[:, None] * rows).sum(0),
            nothing if equal is None else (x.weights * equal.losses).sum(),
            # Some losses have a kink where the policy equals the reference. Rounding puts pairs on both of its sides.
            nothing if equal is None else torch.maximum(equal.slopes.square(), judged.slopes.square()).sum(),
        )

    def _metrics(self, x: Compared, judged: Judged) -> torch.Tensor:
        return preference_metrics(x, judged, self.objective.rewards(x), self.compares)

    def _gather(
        self,
        step: Step,
        own: list[Dealt],
        compared: list[Compared],
        certainties: list[torch.Tensor | None],
    ) -> tuple[Compared, torch.Tensor | None]:
        """All the step's pairs, on every rank, in the order of step.pairs. One collective."""
        device = self.policy.device
        gathered = torch.zeros(len(step.pairs), 5, device=device)
        for dealt, x, certainty in zip(own, compared, certainties, strict=True):
            if dealt.micro_batch.weight:
                places = torch.from_numpy(np.searchsorted(step.pairs, dealt.micro_batch.pairs)).to(device)
                factor = torch.ones(len(places), device=device) if certainty is None else certainty
                gathered[places] = torch.cat([x.policy, x.reference, factor[:, None]], dim=1)
        gathered = collectives.sum_over_ranks(gathered)
        facts = facts_of(self.run.train_pairs, step.pairs, device)
        whole = self._with_logps(facts, gathered[:, :2], gathered[:, 2:4], step.mean_length)
        return whole, None if certainties[0] is None else gathered[:, 4]

    def _compared(self, dealt: Dealt, scored: Scored, reference: torch.Tensor) -> Compared:
        policy = self._of_pairs(scored, dealt.batch).detach()
        return self._with_logps(dealt.facts, policy, reference, dealt.step.mean_length)

    def _with_logps(self, facts: Facts, policy: torch.Tensor, reference: torch.Tensor, mean_length: float) -> Compared:
        return Compared(
            **vars(facts), policy=policy, reference=reference, mean_length=mean_length, running=self.running
        )

    def _reference(self, dealt: Dealt) -> torch.Tensor:
        """The reference's logps [B, 2]. Called before the policy's forward, which backward must follow under ZeRO-3."""
        logps = self.reference.logps(dealt.micro_batch, dealt.batch)
        return self._of_pairs(Scored(logps, logps), dealt.batch)

    def _of_pairs(self, scored: Scored, batch: PackedBatch) -> torch.Tensor:
        """The logps of each pair's answers, [B, 2]."""
        if self.ld_alpha is None:
            return scored.answers[batch.pairs]
        assert scored.tokens is not None, "the engines of a run of LD-DPO return tokens"
        places = batch.token_answers, batch.answers, batch.shared, batch.pairs
        return length_desensitised(scored.tokens, *places, self.ld_alpha)

    def _random_state_kept(self):
        return torch.random.fork_rng(devices=[self.policy.device] if self.policy.device.type == "cuda" else [])

    def held_out(self, policy: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
        """The metrics of the held-out pairs, from logps as `reference.held_out_logps` gives them."""
        pairs = self.run.eval_pairs
        everything = np.arange(len(pairs))
        sides = [self._held_out_pairs(torch.from_numpy(logps)) for logps in (policy, reference)]
        weight, mean_length = _weight_and_length(pairs, everything)
        x = self._with_logps(facts_of(pairs, everything, torch.device("cpu")), sides[0], sides[1], mean_length)
        rows = self._metrics(x, self.objective.judge(x)).double()
        means = ((x.weights[:, None] * rows).sum(0) / weight).tolist()
        margins = rows[:, self.pair_metrics.index("rewards/margins")].numpy()
        longer = (x.lengths[:, 0] - x.lengths[:, 1]).double().numpy()
        correlation = rank_correlation(margins, longer, pairs.weights) if len(pairs) >= LEAST_CORRELATED else None
        return {**dict(zip(self.pair_metrics, means, strict=True)), "length_correlation": correlation}

    def _held_out_pairs(self, logps: torch.Tensor) -> torch.Tensor:
        pairs = self.run.eval_pairs
        places = torch.from_numpy(pairs.pairs.astype(np.int64))
        if self.ld_alpha is None:
            return logps[places]
        lengths = pairs.learned_lengths
        of_token = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        shared = torch.from_numpy(shared_tokens(lengths, pairs.pairs))
        return length_desensitised(logps, of_token, len(lengths), shared, places, self.ld_alpha)


def facts_of(pairs: PairSet, indices: np.ndarray, device: torch.device, weight: float = 1.0) -> Facts:
    """What the data says about these pairs; their weights times `weight`."""
    answers = pairs.pairs[indices]
    facts = Facts(
        lengths=torch.from_numpy(pairs.learned_lengths[answers]),
        answers=torch.from_numpy(answers),
        rankings=torch.from_numpy((pairs.sources[indices] << 40) + pairs.rows[indices]),  # a row is one ranking
        margins=torch.from_numpy(pairs.margins[indices]),
        weights=torch.from_numpy(weight * pairs.weights[indices]),
    )
    return Facts(**{name: move(fact, device) for name, fact in vars(facts).items()})


def _weight_and_length(pairs: PairSet, indices: np.ndarray) -> tuple[float, float]:
    """The sum of the pairs' weights, and the weighted mean length of their chosen answers."""
    weights = pairs.weights[indices].astype(np.float64)
    lengths = pairs.learned_lengths[pairs.pairs[indices, 0]]
    return float(weights.sum()), float((weights * lengths).sum() / weights.sum())


def _certainty(scored: Scored, batch: PackedBatch) -> torch.Tensor | None:
    """WPO's factor of each pair, [B]: the product of its answers'."""
    return None if scored.certainty is None else scored.certainty[batch.pairs].prod(1)
