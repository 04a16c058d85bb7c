"""The policy on held-out pairs: its log-probabilities as a file, and answers before and after training."""

import json
from pathlib import Path

import numpy as np

from dpo_ds.data.pairs import PairSet
from dpo_ds.files import write_whole
from dpo_ds.ranks import console
from dpo_ds.reports.answers import Answers, text_of

SHOWN = 240  # characters of a prompt or an answer on the terminal


def write_logps(file: Path, pairs: PairSet, policy: np.ndarray, reference: np.ndarray | None) -> None:
    """Writes a JSON line for each pair: its row in the data and its logps. policy and reference: [answers]."""
    policy = policy[pairs.pairs]
    reference = None if reference is None else reference[pairs.pairs]
    lines = []
    for n in range(len(pairs)):
        facts = {
            "pair": pairs.pair_id(n),
            "row": int(pairs.rows[n]),
            "chosen": float(policy[n, 0]),
            "rejected": float(policy[n, 1]),
        }
        if reference is not None:
            facts |= {"reference_chosen": float(reference[n, 0]), "reference_rejected": float(reference[n, 1])}
        lines.append(json.dumps(facts) + "\n")
    write_whole(file, "".join(lines))


def show_generations(
    file: Path, answers: Answers, prompts: list[list[int]], before: Path, after: Path, adapter: Path | None = None
) -> None:
    """Answers a few held-out prompts with the model `before` training, with the adapter that it began from, and with
    the merged one `after`. Prints both answers and writes them to `file` as Markdown. Loads one model after the
    other."""
    (old_answers,), (new_answers,) = answers.of(before, prompts, adapter), answers.of(after, prompts)
    text = ["# Before and after", ""]
    for prompt, old, new in zip(prompts, old_answers, new_answers, strict=True):
        shown = text_of(answers.tokenizer, prompt).strip()
        text += [f"**Prompt** {shown}", "", f"**Before** {old}", "", f"**After** {new}", "", "---", ""]
        console.say(f"prompt: {_end_of(shown)}\n  before: {old[:SHOWN]}\n  after:  {new[:SHOWN]}")
    write_whole(file, "\n".join(text))


def _end_of(prompt: str) -> str:
    """The end of a prompt, for the terminal; generations.md has the whole prompt."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN else f"… {line[-SHOWN:]}"
