"""Steps whose loss or gradients are not finite: written down with the tokens of their pairs, for dpo_ds.replay."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_ds.config import Options
from dpo_ds.data.pairs import PairSet, named_rows
from dpo_ds.errors import UserError, one_line, reason_of
from dpo_ds.files import write_whole
from dpo_ds.ranks import world
from dpo_ds.runs.folders import checkpoints
from dpo_ds.runs.prepare import Run

FOLDER = "bad_steps"


@dataclass(frozen=True)
class BadPair:
    """A pair of a bad step, as token ids. scored: which tokens of the answers are learned, or None for all."""

    id: str
    source: int  # from 0: which of the run's data sets
    row: int
    prompt: list[int]
    answers: list[list[int]]  # chosen, rejected
    scored: list[list[bool]] | None


@dataclass(frozen=True)
class BadStep:
    step: int  # from 1
    loss: str  # as a text: JSON has neither NaN nor infinity
    grad_norm: str
    checkpoint: str | None  # the newest that the run had then; None: the model's own weights
    options: Options
    pairs: list[BadPair]


def noted(run: Run, step: int, loss: float, grad_norm: float, pairs: np.ndarray) -> str:
    """Writes the step's file, on rank 0. Returns the end of a message: the rows of its pairs, and the command that
    shows more. A full disk must not take the message away."""
    said = f"; its pairs are of {named_rows(run.train_pairs, pairs)}"
    if not world.from_environment().speaks:
        return said
    try:
        return f"{said}; to see them: python -m dpo_ds.replay {write(run, step, loss, grad_norm, pairs)}"
    except OSError as error:
        return f"{said} ({run.folder / FOLDER} cannot be written: {reason_of(error)})"


def write(run: Run, step: int, loss: float, grad_norm: float, pairs: np.ndarray) -> Path:
    """Writes the step's file into the run's folder. pairs: places in the training set. Returns the file."""
    found = checkpoints(run.folder)
    content = {
        "step": step,
        "loss": str(loss),
        "grad_norm": str(grad_norm),
        "checkpoint": str(found[-1]) if found else None,
        "options": vars(run.options),
        "pairs": [vars(_pair(run.train_pairs, int(i))) for i in pairs],
    }
    file = run.folder / FOLDER / f"step-{step:06d}.json"
    file.parent.mkdir(exist_ok=True)
    write_whole(file, json.dumps(content))
    return file


def _pair(pairs: PairSet, i: int) -> BadPair:
    prompt, *answers = pairs.pair(i)
    masks = [pairs.scored_of(int(answer)) for answer in pairs.pairs[i]]
    scored = None if masks[0] is None else [mask.tolist() for mask in masks if mask is not None]
    of_answers = [answer.tolist() for answer in answers]
    return BadPair(pairs.pair_id(i), int(pairs.sources[i]), int(pairs.rows[i]), prompt.tolist(), of_answers, scored)


def read(file: Path) -> BadStep:
    """Reads what `write` wrote. Raises UserError for any other file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        pairs = [BadPair(**pair) for pair in content.pop("pairs")]
        return BadStep(**content | {"pairs": pairs, "options": Options(**content["options"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is no file of a bad step ({one_line(error)}): name one of a run's folder {FOLDER}"
        ) from None
