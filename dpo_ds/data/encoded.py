"""A comparison as token ids, and which of its pairs and answers are left after truncation."""

from dataclasses import dataclass, field, replace

from dpo_ds.data.comparison import Comparison, Preference

# Kinds in the report, of rows that are left out.
NO_ROOM = "no room for a response token within --max_length"
EQUAL_NOW = "the responses are equal once cut"
EQUAL_TOKENS = "the responses are the same tokens"


Gap = tuple[int, int]  # a place, and how many tokens stood there


@dataclass
class Encoded:
    """A comparison as token ids. All answers continue the same prompt."""

    prompt: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    scored: list[list[bool] | None] = field(default_factory=list)  # per answer: which tokens are learned; None: all
    pairs: list[Preference] = field(default_factory=list)  # those that still differ; numbers of `answers`
    left_out: str = ""  # kind for the report; "": the row is used
    changed: list[str] = field(default_factory=list)  # kinds for the report
    cut_prompt: int = 0  # tokens
    cut_answers: list[int] = field(default_factory=list)  # tokens
    gaps: list[Gap] = field(default_factory=list)  # where in `prompt` its cut tokens stood: two places at most


def without_unused_answers(comparison: Comparison) -> Comparison:
    """Without answers that no pair uses. A comparison without pairs keeps all."""
    used, pairs = _renumbered(comparison.pairs)
    if not used or len(used) == len(comparison.answers):
        return comparison
    return replace(comparison, answers=[comparison.answers[n] for n in used], pairs=pairs)


def _renumbered(pairs: list[Preference]) -> tuple[list[int], list[Preference]]:
    """The answers that pairs use, in order, and the pairs with numbers among those."""
    used = sorted({n for pair in pairs for n in (pair.chosen, pair.rejected)})
    at = {n: place for place, n in enumerate(used)}
    return used, [replace(pair, chosen=at[pair.chosen], rejected=at[pair.rejected]) for pair in pairs]


def with_pairs_that_differ(cut: Encoded) -> Encoded:
    """Without pairs whose answers are equal or hold nothing to learn, and without the answers that only they use."""
    learned = [
        bool(answer) and (mask is None or any(mask)) for answer, mask in zip(cut.answers, cut.scored, strict=True)
    ]
    both = [pair for pair in cut.pairs if learned[pair.chosen] and learned[pair.rejected]]
    kept = [pair for pair in both if cut.answers[pair.chosen] != cut.answers[pair.rejected]]
    if len(kept) == len(cut.pairs) and (kept or all(learned)):
        return cut
    if not kept:
        kind = (EQUAL_NOW if any(cut.cut_answers) else EQUAL_TOKENS) if both else NO_ROOM
        return Encoded(left_out=kind, changed=cut.changed, cut_prompt=cut.cut_prompt, cut_answers=cut.cut_answers)
    used, pairs = _renumbered(kept)
    return replace(
        cut,
        answers=[cut.answers[n] for n in used],
        scored=[cut.scored[n] for n in used],
        cut_answers=[cut.cut_answers[n] for n in used],
        pairs=pairs,
    )
