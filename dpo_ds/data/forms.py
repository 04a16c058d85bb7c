"""Shim until the forms are merged."""
from dataclasses import dataclass, field

from dpo_ds.data import rows
from dpo_ds.data.comparison import Answer, Comparison, LeftOut, Preference


@dataclass(frozen=True)
class Reading:
    columns: dict = field(default_factory=dict)
    pairs: str = "best_worst"
    min_margin: float = 0.0
    markers: object = None


def read_row(fields, reading):
    try:
        if not isinstance(fields, dict):
            raise rows._LeftOut(rows.WRONG_TYPE)
        pair = rows.normalise(fields)
    except rows._LeftOut as e:
        raise LeftOut(str(e)) from None
    answers = [Answer([{"role": "assistant", "content": pair[k].strip()}], pair[k]) for k in ("chosen", "rejected")]
    return Comparison(pair["messages"], answers, [Preference(0, 1)], pair["text"])
