"""The reference's log-probabilities as a table, made once and used again by every run that asks for the same.

    python -m dpo_ds.score --model gpt2 --dataset pairs.jsonl        (the options of dpo_ds.train)

A table is float32 [pairs, 2] (chosen, rejected), kept under a key made of what decides its values: the hashes of the
weights' files, the pairs' token ids, the precision. It fills up chunk by chunk; a killed scoring goes on from there.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from dpo_ds import models, world
from dpo_ds.ahead import ahead
from dpo_ds.checkpoint import write_whole
from dpo_ds.config import parse_options
from dpo_ds.data.pairs import PairSet
from dpo_ds.data.steps import deal
from dpo_ds.engines import Engine, reference_engine
from dpo_ds.prepare import Run, prepare
from dpo_ds.scoring.packed import pack

FORMAT = 1
# Pairs scored between two writes to disk, for each rank: what a kill can cost.
CHUNK = 256


def score_pairs(score, pairs: PairSet, indices: np.ndarray, micro_batch_tokens: int) -> np.ndarray:
    """logps float32 [len(indices), 2], on every rank. `score` maps a packed batch to logps [B, 2]."""
    here = world.from_environment()
    place = {int(i): n for n, i in enumerate(indices)}
    logps = torch.zeros(len(indices), 2)
    mine = deal(indices, pairs.packed_lengths, here.size, micro_batch_tokens)[here.rank]
    batches = ahead(lambda micro_batch: pack([pairs.pair(i) for i in micro_batch.indices]), mine)
    scored = [score(batch) for batch in batches]  # on the device: nothing waits for it before the last is under way
    for micro_batch, rows in zip(mine, scored, strict=True):
        if micro_batch.weight:
            logps[[place[i] for i in micro_batch.indices]] = rows.cpu()
    return world.sum_over_ranks(logps.to(_collective_device())).cpu().numpy()


def _collective_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def score_all(score, pairs: PairSet, indices: np.ndarray, micro_batch_tokens: int, title: str, keep=None) -> np.ndarray:
    """Like score_pairs, in chunks with a progress bar; `keep(indices, logps)` is called for each chunk.

    Raises RunStopped if a log-probability is not finite, naming the pairs.
    """
    here = world.from_environment()
    step = CHUNK * here.size
    chunks = [indices[i : i + step] for i in range(0, len(indices), step)]
    scored = []
    with tqdm(total=len(indices), desc=title, unit="pair", disable=None if here.speaks else True, leave=False) as bar:
        for chunk in chunks:
            logps = score_pairs(score, pairs, chunk, micro_batch_tokens)
            finite = np.isfinite(logps).all(axis=1)
            if not finite.all():
                bad = ", ".join(pairs.pair_id(i) for i in chunk[~finite][:5])
                raise world.RunStopped(
                    f"{title}: the log-probabilities of {(~finite).sum()} pairs are not finite: {bad}"
                )
            if keep is not None:
                keep(chunk, logps)
            scored.append(logps)
            bar.update(len(chunk))
    return np.concatenate(scored) if scored else np.zeros((0, 2), dtype=np.float32)


class Table:
    """A reference table on disk, as rank 0 sees it: rows are NaN until they are scored.

    While it is being filled it has no manifest, and its rows speak for themselves; at rest the manifest's hash must
    agree, or the table is made anew.
    """

    def __init__(self, cache: Path, facts: dict, rows: int):
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = cache / "reference" / self.key[:32]
        self.facts, self.rows = facts, rows
        self.path, self.manifest = self.folder / "logps.npy", self.folder / "table.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        # Held by the run that fills the table; another run that wants the same one waits and then uses it.
        self.lock = FileLock(self.folder / "lock")

    def read(self) -> np.ndarray:
        """float32 [rows, 2]"""
        if self.path.is_file():
            try:
                logps = np.load(self.path)
                whole = logps.shape == (self.rows, 2)
                if self.manifest.is_file():
                    whole &= json.loads(self.manifest.read_text())["sha256"] == _sha256(self.path)
            except (ValueError, EOFError, KeyError, TypeError):  # neither an array nor a manifest
                whole = False
            if whole:
                return logps
            world.say(f"the reference table {self.folder} does not match its hash and is made anew")
            self.path.unlink()
        self.manifest.unlink(missing_ok=True)
        return np.full((self.rows, 2), np.nan, dtype=np.float32)

    def open_to_fill(self) -> np.ndarray:
        """A memory map of the rows."""
        if not self.path.is_file():
            fresh = self.path.with_suffix(".tmp.npy")
            np.save(fresh, self.read())
            fresh.rename(self.path)
        self.manifest.unlink(missing_ok=True)
        return np.load(self.path, mmap_mode="r+")

    def close(self) -> None:
        scored = int(np.isfinite(np.load(self.path)).all(axis=1).sum())
        facts = {**self.facts, "rows": self.rows, "scored": scored, "sha256": _sha256(self.path)}
        write_whole(self.manifest, json.dumps(facts, indent=1))


def _sha256(path: Path) -> str:
    """Of a file's content. The hub's cache names large files by just that hash, so there it need not be read."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    with open(real, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def reference_tables(run: Run, everything: bool = False) -> list[np.ndarray]:
    """The reference's logps of the training and of the evaluation pairs, float32 [pairs, 2] each, on every rank.

    Scores what no earlier run has, and of the training pairs only those that the schedule comes to, unless
    `everything` is asked for (the others stay NaN). The engine is gone, its memory released, on return.
    """
    weights = _weights_facts(run) if world.from_environment().speaks else None
    needed = np.ones(len(run.train_pairs), dtype=bool) if everything else run.schedule.visited()
    sets = [
        ("reference: training pairs", run.train_pairs, needed),
        ("reference: held-out pairs", run.eval_pairs, np.ones(len(run.eval_pairs), dtype=bool)),
    ]
    engine: list[Engine] = []  # built when the first pair wants scoring

    def score(batch):
        if not engine:
            engine.append(reference_engine(run.weights, run.ds_config, run.options, run.attention))
        return engine[0].score(batch)

    results = [_reference_table(run, weights, score, *one) for one in sets]
    if engine:
        engine[0].close()
    return results


def _weights_facts(run: Run) -> dict:
    """What the reference is: the hashes of its files."""
    return {file.name: _sha256(file) for file in [run.weights / "config.json", *models.weight_files(run.weights)]}


def _reference_table(
    run: Run, weights: dict | None, score, title: str, pairs: PairSet, needed: np.ndarray
) -> np.ndarray:
    if len(pairs) == 0:
        return np.zeros((0, 2), dtype=np.float32)
    table = None
    with contextlib.ExitStack() as held:
        if world.from_environment().speaks:
            facts = {"format": FORMAT, "weights": weights, "pairs": pairs.digest, "precision": run.options.precision}
            table = Table(Path(run.options.cache_dir).expanduser(), facts, len(pairs))
            held.enter_context(table.lock)
        logps = _from_rank_0(table.read() if table else np.empty((len(pairs), 2), dtype=np.float32))
        left = np.flatnonzero(needed & np.isnan(logps).any(axis=1))
        if len(left) == 0:
            world.say(f"{title}: all {needed.sum()} found in the table")
            return logps
        world.say(f"{title}: {len(left)} of {needed.sum()} to score")
        rows = table.open_to_fill() if table else None

        def keep(indices: np.ndarray, scored: np.ndarray) -> None:
            if rows is not None:
                rows[indices] = scored
                rows.flush()

        logps[left] = score_all(score, pairs, left, run.options.micro_batch_tokens, title, keep)
        if table:
            table.close()
    return logps


def _from_rank_0(array: np.ndarray) -> np.ndarray:
    if world.from_environment().size == 1:
        return array
    tensor = torch.from_numpy(array).to(_collective_device())
    torch.distributed.broadcast(tensor, 0)
    return tensor.cpu().numpy()


def main(argv: list[str]) -> None:
    with world.user_errors():
        options = parse_options(argv, "score")
        run = prepare(options, world.join().size)
    reference_tables(run, everything=True)


if __name__ == "__main__":
    world.run_main(main)
