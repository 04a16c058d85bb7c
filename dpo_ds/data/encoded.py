"""A comparison as token ids, and which of its pairs and answers are left after truncation."""

from dataclasses import dataclass, field, replace

from dpo_ds.data.comparison import Preference, renumbered

# Kinds in the report, of rows that are left out.
NO_ROOM = "no room for a token of an answer within --max_length"
EQUAL_NOW = "the answers are equal once cut"
EQUAL_TOKENS = "the answers are the same tokens"

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
    unused: list[str] = field(default_factory=list)  # for the report: keys of messages that are not shown to the model
    cut_prompt: int = 0  # tokens
    cut_answers: list[int] = field(default_factory=list)  # tokens
    gaps: list[Gap] = field(default_factory=list)  # where in `prompt` its cut tokens stood: two places at most


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
        return Encoded(
            left_out=kind,
            changed=cut.changed,
            unused=cut.unused,
            cut_prompt=cut.cut_prompt,
            cut_answers=cut.cut_answers,
        )
    used, pairs = renumbered(kept)
    return replace(
        cut,
        answers=[cut.answers[n] for n in used],
        scored=[cut.scored[n] for n in used],
        cut_answers=[cut.cut_answers[n] for n in used],
        pairs=pairs,
    )
