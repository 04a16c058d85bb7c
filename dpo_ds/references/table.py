"""The table of the reference's log-probabilities: computed once and reused by every run that needs the same ones.

A table is float32, with a value for each answer, or for each learned token in a run of LD-DPO. Its key is made of what
decides its values: the hashes of the weights' files, the answers' and their prompts' token ids, the precision, and
--max_length where the model's rotary frequencies depend on it. It is filled chunk by chunk, so a killed scoring resumes
at the next chunk.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from dpo_ds.checksums import is_sealed, of_bytes, sealed
from dpo_ds.config import Planned
from dpo_ds.data.pairs import PairSet
from dpo_ds.engine.build import reference_engine
from dpo_ds.engine.engine import Engine
from dpo_ds.errors import files_of
from dpo_ds.files import sha256_of, write_whole
from dpo_ds.ranks import console, world
from dpo_ds.ranks.collectives import array_from_rank_0, one_after_another
from dpo_ds.runs.loadable import Loadable
from dpo_ds.runs.prepare import Run
from dpo_ds.scoring.rotary import depends_on_length
from dpo_ds.scoring.sweep import Places, Score, score_set

FORMAT = 3


class Table:
    """A reference table on disk, which only rank 0 opens. Rows are NaN until they are scored.

    A whole table has a manifest with its facts and its hash. While it is being filled, it has a journal instead: a line
    for each chunk of rows, with their checksum. Rows that no line vouches for are scored again.
    """

    def __init__(self, cache: Path, facts: dict, rows: int):
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = cache / "reference" / self.key[:32]
        self.facts, self.rows = facts, rows
        self.path, self.manifest = self.folder / "logps.npy", self.folder / "table.json"
        self.journal = self.folder / "rows.jsonl"
        with files_of("--cache_dir", cache):
            self.folder.mkdir(parents=True, exist_ok=True)
        # The run that fills the table holds this lock. Another run that needs the table waits and then uses it.
        self.lock = FileLock(self.folder / "lock")

    def read(self) -> np.ndarray:
        """The rows, float32 [rows]; NaN where there is no valid one. What is damaged is named and removed."""
        problem, logps = self._read() if self.path.is_file() else ("", self._empty())
        if problem is not None:
            if problem:
                console.say(f"the reference table {self.folder} {problem} and is computed again")
            with files_of("--cache_dir", self.folder):
                for file in (self.path, self.manifest, self.journal):
                    file.unlink(missing_ok=True)
        return logps

    def _read(self) -> tuple[str | None, np.ndarray]:
        """What is wrong with the table as a whole, and its rows."""
        try:
            logps = np.load(self.path)
        except Exception:  # numpy reads the file's head as Python's text, whose errors are of many kinds
            return "does not match its hash", self._empty()
        if logps.shape != (self.rows,) or logps.dtype != np.float32:
            return "does not match its hash", self._empty()
        if self.manifest.is_file():
            problem = self._contradiction()
            return problem, logps if problem is None else self._empty()
        valid, damaged = self._vouched_for(logps)
        left = np.where(valid, logps, np.float32(np.nan))
        if not valid.any():
            return "has no rows that can be verified", left
        if damaged:
            console.say(f"{damaged} rows of the reference table {self.folder} are damaged: they are computed again")
        return None, left

    def _empty(self) -> np.ndarray:
        return np.full(self.rows, np.nan, dtype=np.float32)

    def _contradiction(self) -> str | None:
        """What is wrong with a table that has a manifest."""
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            if not is_sealed(manifest) or manifest["sha256"] != sha256_of(self.path):
                return "does not match its hash"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "does not match its hash"
        if any(manifest.get(name) != fact for name, fact in self.facts.items()):
            return "is of other weights or answers"
        return None

    def _vouched_for(self, logps: np.ndarray) -> tuple[np.ndarray, int]:
        """Which rows of a table that is not finished are as they were written, and how many are not."""
        valid, damaged = np.zeros(self.rows, dtype=bool), 0
        for text in self.journal.read_bytes().splitlines() if self.journal.is_file() else ():
            try:
                line = json.loads(text)
                if not is_sealed(line):
                    continue
            except (ValueError, AttributeError):  # cut off by a kill, or damaged
                continue
            places = np.concatenate([np.arange(start, end) for start, end in line["rows"]])
            whole = line["xxh3_128"] == of_bytes(logps[places].tobytes())
            valid[places] |= whole
            damaged += 0 if whole else len(places)
        return valid, damaged

    def open_to_fill(self, known: np.ndarray) -> np.memmap:
        """The rows, writable. known: those that `read` has returned. Raises UserError if the disk has no room."""
        with files_of("--cache_dir", self.folder):
            fresh = self.path.with_suffix(".tmp.npy")
            np.save(fresh, known)
            self.journal.unlink(missing_ok=True)
            self.manifest.unlink(missing_ok=True)
            fresh.replace(self.path)
            if len(places := np.flatnonzero(np.isfinite(known))):
                self._vouch(places, known[places])
        return np.load(self.path, mmap_mode="r+")

    def write(self, rows: np.memmap, places: np.ndarray, values: np.ndarray) -> None:
        """Writes a chunk. Raises UserError if the disk has no room."""
        rows[places] = values
        with files_of("--cache_dir", self.folder):
            rows.flush()
            self._vouch(places, values)

    def _vouch(self, places: np.ndarray, values: np.ndarray) -> None:
        ends = np.flatnonzero(np.diff(places) != 1)  # of ranges
        starts, stops = places[np.r_[0, ends + 1]], places[np.r_[ends, len(places) - 1]] + 1
        digest = of_bytes(values.astype(np.float32).tobytes())
        line = sealed({"rows": np.stack([starts, stops], axis=1).tolist(), "xxh3_128": digest})
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """The table is filled as far as it was asked for."""
        with files_of("--cache_dir", self.folder):
            scored = int(np.isfinite(np.load(self.path)).sum())
            facts = {**self.facts, "rows": self.rows, "scored": scored, "sha256": sha256_of(self.path)}
            write_whole(self.manifest, json.dumps(sealed(facts), indent=1))
            self.journal.unlink()


@dataclass(frozen=True)
class Wanted:
    """The answers of a set that are to be scored."""

    title: str  # what the progress bar says
    pairs: PairSet
    needed: np.ndarray  # bool [answers]

    @classmethod
    def all_of(cls, title: str, pairs: PairSet) -> "Wanted":
        return cls(title, pairs, np.ones(len(pairs.answers), dtype=bool))


def reference_tables(run: Run, everything: bool = False, score: Score | None = None) -> list[np.ndarray]:
    """The reference's logps of the training and of the held-out answers, float32 [n] each, on every rank.

    Scores the answers that no earlier run has scored. Of the training answers these are the ones in the schedule (the
    others stay NaN), or all of them with `everything`. score: of an engine that has the reference's weights; None: one
    is built if it is needed, and is closed and its memory free on return.
    """
    pairs = np.arange(len(run.train_pairs)) if everything else np.flatnonzero(run.schedule.visited())
    sets = [_training(run, pairs), Wanted.all_of("reference: held-out pairs", run.eval_pairs)]
    if score is None:
        return _of_reference(run, sets)
    return [_table(run.reference, run.options, lambda: score, wanted) for wanted in sets]


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

    @functools.cache
    def engine() -> Engine:
        with console.working(f"loading {what}"):
            return engine_of(model, options)

    results = [_table(model, options, lambda: engine().score, wanted) for wanted in sets]
    if engine.cache_info().currsize:
        engine().close()
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


def _table(model: Loadable, options: Planned, scorer: Callable[[], Score], wanted: Wanted) -> np.ndarray:
    """One set's logps. scorer: gives the model's `score`. It is called if some answer must be scored."""
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
            with console.working(f"waiting for the run that fills the reference table {table.folder}"):
                held.enter_context(table.lock)
        logps = array_from_rank_0(table.read() if table else np.empty(places.total, dtype=np.float32))
        left = np.flatnonzero(needed & np.isnan(logps[places.starts]))
        if len(left) == 0:
            console.say(f"{title}: all {needed.sum()} answers found in the table")
            return logps
        console.say(f"{title}: {len(left)} of {needed.sum()} answers to score")
        filled: list[np.memmap] = []
        one_after_another(lambda: filled.append(table.open_to_fill(logps)) if table else None)

        def keep(answers: np.ndarray, scored: np.ndarray) -> None:
            if table is not None:
                table.write(filled[0], places.of(answers), scored)

        limit = options.scoring_tokens
        logps[places.of(left)] = score_set(scorer(), pairs, left, limit, title, per_token, keep)
        one_after_another(lambda: table.close() if table else None)
    return logps
