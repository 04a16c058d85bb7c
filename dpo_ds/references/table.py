"""The table of the reference's log-probabilities: computed once and reused by every run that needs the same ones.

A table is float32, with a value for each answer, or for each learned token in a run of LD-DPO. Its key is made of what
decides its values: the hashes of the weights' files, the answers' and their prompts' token ids, the precision, and
--max_length where the model's rotary frequencies depend on it. It is filled chunk by chunk, so a killed scoring resumes
at the next chunk.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from dpo_ds.config import Planned
from dpo_ds.data.pairs import PairSet
from dpo_ds.engine.build import reference_engine
from dpo_ds.engine.engine import Engine
from dpo_ds.errors import files_of
from dpo_ds.files import sha256_of, write_whole
from dpo_ds.ranks import console, world
from dpo_ds.ranks.collectives import array_from_rank_0
from dpo_ds.runs.loadable import Loadable
from dpo_ds.runs.prepare import Run
from dpo_ds.scoring.packed import PackedBatch
from dpo_ds.scoring.rotary import depends_on_length
from dpo_ds.scoring.sweep import Places, Score, score_set

FORMAT = 2


class Table:
    """A reference table on disk, which only rank 0 opens. Rows are NaN until they are scored.

    While a table is being filled, it has no manifest, and rows that are not NaN are valid. Otherwise the manifest's
    hash must match, or the table is computed again.
    """

    def __init__(self, cache: Path, facts: dict, rows: int):
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = cache / "reference" / self.key[:32]
        self.facts, self.rows = facts, rows
        self.path, self.manifest = self.folder / "logps.npy", self.folder / "table.json"
        with files_of("--cache_dir", cache):
            self.folder.mkdir(parents=True, exist_ok=True)
        # The run that fills the table holds this lock. Another run that needs the table waits and then uses it.
        self.lock = FileLock(self.folder / "lock")

    def read(self) -> np.ndarray:
        """The rows, float32 [rows]; all NaN if there is no valid table."""
        if self.path.is_file():
            try:
                logps = np.load(self.path)
                whole = logps.shape == (self.rows,)
                if self.manifest.is_file():
                    whole &= json.loads(self.manifest.read_text())["sha256"] == sha256_of(self.path)
            except (ValueError, EOFError, KeyError, TypeError):  # the array or the manifest is damaged
                whole = False
            if whole:
                return logps
            console.say(f"the reference table {self.folder} does not match its hash and is computed again")
            self.path.unlink()
        self.manifest.unlink(missing_ok=True)
        return np.full(self.rows, np.nan, dtype=np.float32)

    def open_to_fill(self) -> np.memmap:
        """The rows, writable."""
        if not self.path.is_file():
            fresh = self.path.with_suffix(".tmp.npy")
            np.save(fresh, self.read())
            fresh.rename(self.path)
        self.manifest.unlink(missing_ok=True)
        return np.load(self.path, mmap_mode="r+")

    def close(self) -> None:
        scored = int(np.isfinite(np.load(self.path)).sum())
        facts = {**self.facts, "rows": self.rows, "scored": scored, "sha256": sha256_of(self.path)}
        write_whole(self.manifest, json.dumps(facts, indent=1))


@dataclass(frozen=True)
class Wanted:
    """The answers of a set that are to be scored."""

    title: str  # what the progress bar says
    pairs: PairSet
    needed: np.ndarray  # bool [answers]

    @classmethod
    def all_of(cls, title: str, pairs: PairSet) -> "Wanted":
        return cls(title, pairs, np.ones(len(pairs.answers), dtype=bool))


def reference_tables(run: Run, everything: bool = False) -> list[np.ndarray]:
    """The reference's logps of the training and of the held-out answers, float32 [n] each, on every rank.

    Scores the answers that no earlier run has scored. Of the training answers these are the ones in the schedule (the
    others stay NaN), or all of them with `everything`. On return, the engine is closed and its memory free.
    """
    pairs = np.arange(len(run.train_pairs)) if everything else np.flatnonzero(run.schedule.visited())
    return _of_reference(run, [_training(run, pairs), Wanted.all_of("reference: held-out pairs", run.eval_pairs)])


def sample_table(run: Run, pairs: np.ndarray) -> np.ndarray:
    """The same for these training pairs alone, and for what earlier runs have scored: float32 [n], NaN elsewhere."""
    return _of_reference(run, [_training(run, pairs)])[0]


def _training(run: Run, pairs: np.ndarray) -> Wanted:
    needed = np.isin(np.arange(len(run.train_pairs.answers)), run.train_pairs.pairs[pairs])
    return Wanted("reference: training pairs", run.train_pairs, needed)


def _of_reference(run: Run, sets: list[Wanted]) -> list[np.ndarray]:
    return tables(run.reference, run.options, "the reference", sets)


def tables(model: Loadable, options: Planned, what: str, sets: list[Wanted]) -> list[np.ndarray]:
    """A frozen model's logps of the answers of each set, float32 [n] each, on every rank; NaN for those that are not
    needed. Scores the answers that no earlier command has scored.

    what: the model's role, for messages. On return, the engine is closed and its memory free.
    """
    engine: list[Engine] = []  # built when the first pair must be scored

    def score(batch: PackedBatch) -> torch.Tensor:
        if not engine:
            with console.working(f"loading {what}"):
                engine.append(engine_of(model, options))
        return engine[0].score(batch)

    results = [_table(model, options, score, wanted) for wanted in sets]
    if engine:
        engine[0].close()
    return results


def engine_of(model: Loadable, options: Planned) -> Engine:
    """The engine of a frozen model."""
    return reference_engine(model.weights, model.ds_config, options, model.attention, model.adapter)


def facts_of(model: Loadable, options: Planned) -> dict:
    """What decides a frozen model's logps of a tokenised answer."""
    return {
        "weights": model.hashes,
        "precision": options.precision,
        **({"values": "tokens"} if options.ld_alpha is not None else {}),
        **({"max_length": options.max_length} if depends_on_length(model.model.config) else {}),
    }


def _table(model: Loadable, options: Planned, score: Score, wanted: Wanted) -> np.ndarray:
    title, pairs, needed = wanted.title, wanted.pairs, wanted.needed
    if len(pairs) == 0:
        return np.zeros(0, dtype=np.float32)
    table = None
    per_token = options.ld_alpha is not None
    places = Places.of_set(pairs, per_token)
    with contextlib.ExitStack() as held:
        if world.from_environment().speaks:
            facts = {"format": FORMAT, **facts_of(model, options), "answers": pairs.answers_digest}
            table = Table(Path(options.cache_dir).expanduser(), facts, places.total)
            held.enter_context(table.lock)
        logps = array_from_rank_0(table.read() if table else np.empty(places.total, dtype=np.float32))
        left = np.flatnonzero(needed & np.isnan(logps[places.starts]))
        if len(left) == 0:
            console.say(f"{title}: all {needed.sum()} answers found in the table")
            return logps
        console.say(f"{title}: {len(left)} of {needed.sum()} answers to score")
        rows = table.open_to_fill() if table else None

        def keep(answers: np.ndarray, scored: np.ndarray) -> None:
            if rows is not None:
                rows[places.of(answers)] = scored
                rows.flush()

        limit = options.micro_batch_tokens
        logps[places.of(left)] = score_set(score, pairs, left, limit, title, per_token, keep)
        if table:
            table.close()
    return logps
