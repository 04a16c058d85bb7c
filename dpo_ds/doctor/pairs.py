"""What the pairs and the reference's log-probabilities show before training.

The ranges are wide: ordinary sets lie well within them. The comments beside them give what was measured, with GPT-2's
tokenizer and --max_length 1024, on HH harmless (2,303 pairs) and AlpacaEval (3,184 pairs), and on the embedded sample.
"""

from bisect import bisect_right
from collections import defaultdict

import numpy as np

from dpo_ds.data.pairs import PairSet
from dpo_ds.doctor.check import BY_LENGTH, Check, report
from dpo_ds.runs.prepare import Run
from dpo_ds.scoring.sweep import Places

MOST_CONTRADICTING = 0.01  # HH, AlpacaEval and the sample: none
MOST_REPEATED = 0.05  # HH and the sample: none; AlpacaEval: 0.001
MOST_BY_LENGTH = 0.9  # the longer answer is chosen: HH 0.44, AlpacaEval 0.87, the sample 0.50
MOST_CUT = 0.25  # AlpacaEval: 0.04; with --max_length 512, 0.53
MOST_NO_LONGER_DIFFERENT = 0.01
EQUAL_START = 100  # tokens
MOST_WITH_EQUAL_START = 0.05  # none in the three sets; 99 in 100 of their pairs have 15 equal tokens or fewer
MOST_LEAKED = 0.01  # none in the three sets
TELLING = 16  # tokens of both answers together: "Yes" and "No" answer many prompts
MOST_RIGHT, LEAST_RIGHT = 0.95, 0.1  # pairs that the reference's log-probabilities per token rank right
# Nats per token. GPT-2's smallest model, not trained on any of them, has 3.6 to 4.3 on WikiText-103, PTB and 1BW:
# the perplexities 37.5, 65.9 and 75.2 of Radford et al. 2019, table 3. A guess among 50,257 tokens has 10.8.
LEAST_PROBABLE = -5.0
MOST_APART = 1.0  # nats per token between the means of both sides

MOST_PAIRS = 50_000  # whose beginnings are compared: of a larger set, so many at even distances


def examine(run: Run, logps: np.ndarray | None) -> list[Check]:
    """Says what the run's pairs show before the first step. Returns these findings. logps: as reference tables hold
    them; None: not known."""
    return report(checks_of(run, logps))


def checks_of(run: Run, logps: np.ndarray | None) -> list[Check]:
    """All checks, healthy or not."""
    train, max_length = run.train_pairs, run.options.max_length
    assert max_length is not None
    checks = check_tokens(train, run.eval_pairs, run.dropped_pairs, max_length)
    if logps is None:
        return checks
    if run.options.ld_alpha is not None:  # then a table has a value for each learned token
        logps = np.add.reduceat(logps, Places.of_set(train, per_token=True).starts)
    return checks + check_reference(train, logps)


def check_tokens(train: PairSet, held_out: PairSet, dropped: int, max_length: int) -> list[Check]:
    """What the tokens show. dropped: the pairs that truncation made equal."""
    return [
        *_doubles(train),
        _by_length(train),
        _cut(train, max_length),
        _no_longer_different(train, dropped, max_length),
        _equal_starts(train),
        *_leaks(train, held_out),
    ]


def check_reference(pairs: PairSet, logps: np.ndarray) -> list[Check]:
    """What the reference's log-probabilities show. logps: float32 [A], of the answers; NaN: not scored."""
    per_token = (logps / pairs.learned_lengths)[pairs.pairs]
    per_token = per_token[np.isfinite(per_token).all(axis=1)].astype(np.float64)
    if not len(per_token):
        return []
    right = float(((np.sign(per_token[:, 0] - per_token[:, 1]) + 1) / 2).mean())
    chosen, rejected = per_token.mean(axis=0).tolist()
    improbable = min((chosen, "chosen"), (rejected, "rejected"))
    return [
        Check(
            "reference_accuracy",
            f"the reference finds the chosen answer more probable per token in {right:.1%} of the pairs",
            right,
            "little is left to learn if it ranks nearly all of them right, and chosen and rejected may have been "
            "swapped if it ranks nearly none: look at them with python -m dpo_ds.data",
            LEAST_RIGHT,
            MOST_RIGHT,
        ),
        Check(
            "improbable_answers",
            f"the reference gives {improbable[1]} answers {improbable[0]:.2f} nats a token",
            improbable[0],
            "text so improbable is far from what the model writes: check the chat template with python -m dpo_ds.data, "
            "take another --model, or train it on the chosen answers first (--loss sft --reference none)",
            least=LEAST_PROBABLE,
        ),
        Check(
            "sides_apart",
            f"under the reference, chosen and rejected answers are {abs(chosen - rejected):.2f} nats a token apart "
            f"({chosen:.2f} and {rejected:.2f})",
            abs(chosen - rejected),
            "two different writers are told apart by their style: take answers of one model for both sides, or "
            "train it on the chosen answers first (--loss sft --reference none)",
            most=MOST_APART,
        ),
    ]


def _doubles(pairs: PairSet) -> list[Check]:
    """Pairs that are in the set twice, and pairs that say the opposite of another one."""
    number = np.unique(_words(pairs.answer_ids), axis=0, return_inverse=True)[1].reshape(-1)
    count = int(number.max(initial=0)) + 1
    chosen, rejected = number[pairs.pairs].T
    keys = chosen * count + rejected
    repeated = len(keys) - len(np.unique(keys))
    contradicting = int(np.isin(keys, rejected * count + chosen).sum())
    return [
        Check(
            "contradicting_pairs",
            f"{contradicting} of {len(pairs)} pairs contradict one another: the same answers, the other way round",
            contradicting / len(pairs),
            "judges disagree, or chosen and rejected are swapped in a part of the rows: --label_smoothing 0.1 or "
            "--loss robust allow for wrong verdicts",
            most=MOST_CONTRADICTING,
        ),
        Check(
            "repeated_pairs",
            f"{repeated} of {len(pairs)} pairs are repetitions of others",
            repeated / len(pairs),
            "rows may have been joined twice: remove them, or they count more than the others",
            most=MOST_REPEATED,
        ),
    ]


def _by_length(pairs: PairSet) -> Check:
    chosen, rejected = pairs.learned_lengths[pairs.pairs].T
    longer = float(((np.sign(chosen - rejected) + 1) / 2).mean())
    return Check(
        "length_decides",
        f"the longer answer is the chosen one in {longer:.1%} of the pairs",
        longer,
        BY_LENGTH,
        1 - MOST_BY_LENGTH,
        MOST_BY_LENGTH,
    )


def _cut(pairs: PairSet, max_length: int) -> Check:
    share = float((pairs.answer_cuts[pairs.pairs] > 0).any(axis=1).mean())
    return Check(
        "cut_answers",
        f"an answer is cut in {share:.1%} of the pairs",
        share,
        f"what tells the two apart may be in the rest: raise --max_length (now {max_length})",
        most=MOST_CUT,
    )


def _no_longer_different(pairs: PairSet, dropped: int, max_length: int) -> Check:
    return Check(
        "cut_to_equal",
        f"{dropped} pairs were dropped because their answers are equal once cut",
        dropped / (len(pairs) + dropped),
        f"raise --max_length (now {max_length})",
        most=MOST_NO_LONGER_DIFFERENT,
    )


def _equal_starts(pairs: PairSet) -> Check:
    sample = spread(len(pairs), MOST_PAIRS).tolist()
    share = sum(_equal_tokens(*pairs.pair(i)[1:]) >= EQUAL_START for i in sample) / len(sample)
    return Check(
        "equal_beginnings",
        f"in {share:.1%} of the pairs, both answers begin with the same {EQUAL_START} tokens or more",
        share,
        "an earlier part of the dialogue may be taken for the answer (see python -m dpo_ds.data, --columns); if the "
        "answers are alike, chosen ones tend to become less likely: --loss dpop or --sft_weight 0.2 hold them up",
        most=MOST_WITH_EQUAL_START,
    )


def _leaks(train: PairSet, held_out: PairSet) -> list[Check]:
    """Held-out pairs that training shows all the same: as another prompt's answers, or in a dialogue that goes on."""
    if not len(held_out):
        return []
    triples = [held_out.pair(i) for i in range(len(held_out))]
    numbers: dict[bytes, list[int]] = defaultdict(list)
    for n, (_, chosen, rejected) in enumerate(triples):
        if len(chosen) + len(rejected) >= TELLING:
            numbers[_bytes(chosen, rejected)].append(n)
    leaked = {n for i in range(len(train)) for n in numbers.get(_bytes(*train.pair(i)[1:]), [])}
    dialogues = _Beginnings([_bytes(prompt, chosen) for prompt, chosen, _ in triples])
    leaked.update(n for group in range(len(train.prompts)) for n in dialogues.of(_bytes(train.prompt(group))))
    count = len(leaked)
    return [
        Check(
            "leaked_pairs",
            f"{count} of {len(held_out)} held-out pairs are also shown in training, as the answers to another prompt "
            "or as the beginning of a longer dialogue",
            count / len(held_out),
            "held-out figures are better than they should be: split the data by conversation, with --eval_dataset",
            most=MOST_LEAKED,
        )
    ]


class _Beginnings:
    """Byte strings, of which `of` finds those that another string begins with."""

    def __init__(self, strings: list[bytes]):
        self.order = sorted(range(len(strings)), key=lambda n: strings[n])
        self.strings = [strings[n] for n in self.order]
        # Sorted, the strings that begin like one of them come before it. The nearest such one; -1: none.
        self.parent: list[int] = []
        for n, string in enumerate(self.strings):
            at = n - 1
            while at >= 0 and not string.startswith(self.strings[at]):
                at = self.parent[at]
            self.parent.append(at)

    def of(self, string: bytes) -> list[int]:
        """The numbers of the strings that it begins with."""
        at = bisect_right(self.strings, string) - 1
        found = []
        while at >= 0:
            if string.startswith(self.strings[at]):
                found.append(self.order[at])
            at = self.parent[at]
        return found


def spread(count: int, most: int) -> np.ndarray:
    """int64: at most so many places of `count`, at even distances."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _equal_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens are equal from the start."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _words(ids: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(ids).view(np.uint64)


def _bytes(*parts: np.ndarray) -> bytes:
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
