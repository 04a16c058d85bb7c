"""The reference's log-probabilities as a table, made once and used again by every run that asks for the same.

    python -m dpo_ds.score --model gpt2 --dataset pairs.jsonl        (the options of dpo_ds.train)

A table is float32 [pairs, 2] (chosen, rejected), kept under a key made of what decides its values: the hashes of the
weights' files, the pairs' token ids, the precision. It fills up chunk by chunk; a killed scoring goes on from there.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from dpo_ds import models, world
from dpo_ds.checkpoint import write_whole
from dpo_ds.config import parse_options
from dpo_ds.data.steps import deal
from dpo_ds.data.tokens import PairSet
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
    for micro_batch in deal(indices, pairs.packed_lengths, here.size, micro_batch_tokens)[here.rank]:
        scored = score(pack([pairs.pair(i) for i in micro_batch.indices])).cpu()
        if micro_batch.weight:
            logps[[place[i] for i in micro_batch.indices]] = scored
    return world.sum_over_ranks(logps.to(_collective_device())).cpu().numpy()


def _collective_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def score_all(score, pairs: PairSet, micro_batch_tokens: int, title: str, done: np.ndarray | None = None, keep=None):
    """Like score_pairs for a whole set, in chunks, with a progress bar. `done` [pairs] bool: rows not to score again;
    `keep(indices, logps)` is called for each chunk. Returns float32 [pairs, 2], NaN where done."""
    here = world.from_environment()
    table = np.full((len(pairs), 2), np.nan, dtype=np.float32)
    left = np.arange(len(pairs)) if done is None else np.flatnonzero(~done)
    step = CHUNK * here.size
    chunks = [left[i : i + step] for i in range(0, len(left), step)]
    with tqdm(total=len(left), desc=title, unit="pair", disable=not here.speaks, leave=False) as bar:
        for indices in chunks:
            table[indices] = score_pairs(score, pairs, indices, micro_batch_tokens)
            if not np.isfinite(table[indices]).all():
                bad = [pairs.pair_id(i) for i in indices if not np.isfinite(table[i]).all()]
                raise world.RunStopped(f"{title}: log-probabilities of pairs {', '.join(bad[:5])} are not finite")
            if keep is not None:
                keep(indices, table[indices])
            bar.update(len(indices))
    return table


class Table:
    """A reference table on rank 0's disk, whole or half done."""

    def __init__(self, cache: Path, facts: dict, rows: int):
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = cache / "reference" / self.key[:32]
        self.facts, self.rows = facts, rows

    @property
    def lock(self) -> FileLock:
        """Held by the run that fills the table; another run that wants the same one waits and then uses it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "lock")

    def read(self) -> np.ndarray:
        """float32 [rows, 2]; NaN where nothing has been scored yet. A table that was whole is checked by its hash."""
        path, manifest = self.folder / "logps.npy", self.folder / "table.json"
        if not path.is_file():
            return np.full((self.rows, 2), np.nan, dtype=np.float32)
        logps = np.load(path)
        if manifest.is_file() and json.loads(manifest.read_text())["sha256"] != _sha256(path):
            world.say(f"reference table {self.folder} does not match its hash and is made again")
            manifest.unlink()
            path.unlink()
            return self.read()
        assert logps.shape == (self.rows, 2), "the key holds the pairs' digest"
        return logps

    def writer(self):
        """A memory map to fill. Rows stay NaN until they are scored."""
        path = self.folder / "logps.npy"
        if not path.is_file():
            fresh = path.with_suffix(".tmp.npy")
            np.save(fresh, self.read())
            fresh.rename(path)
        return np.load(path, mmap_mode="r+")

    def finish(self) -> None:
        facts = {**self.facts, "rows": self.rows, "sha256": _sha256(self.folder / "logps.npy")}
        write_whole(self.folder / "table.json", json.dumps(facts, indent=1))


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


def reference_tables(run: Run) -> list[np.ndarray]:
    """The reference's logps of the training and of the evaluation pairs, float32 [pairs, 2] each, on every rank.

    Scores what no earlier run has scored, with an engine that is gone, and its memory released, on return.
    """
    here = world.from_environment()
    weights = None
    if here.speaks:
        files = [run.weights / "config.json", *models.weight_files(run.weights)]
        weights = {file.name: _sha256(file) for file in files}
    engine: Engine | None = None
    results = []
    for title, pairs in (("reference: training pairs", run.train_pairs), ("reference: held-out pairs", run.eval_pairs)):
        if len(pairs) == 0:
            results.append(np.zeros((0, 2), dtype=np.float32))
            continue
        table, lock = None, None
        if here.speaks:
            facts = {"format": FORMAT, "weights": weights, "pairs": pairs.digest, "precision": run.options.precision}
            table = Table(Path(run.options.cache_dir).expanduser(), facts, len(pairs))
            lock = table.lock
            lock.acquire()
        try:
            logps = _from_rank_0(table.read() if table else np.empty((len(pairs), 2), dtype=np.float32))
            done = np.isfinite(logps).all(axis=1)
            if done.all():
                world.say(f"{title}: all {len(pairs)} found in the table")
            else:
                world.say(f"{title}: {len(pairs) - done.sum()} of {len(pairs)} to score")
                engine = engine or reference_engine(run.weights, run.ds_config, run.options)
                file = table.writer() if table else None

                def keep(indices, rows, file=file):
                    if file is not None:
                        file[indices] = rows
                        file.flush()

                scored = score_all(engine.score, pairs, run.options.micro_batch_tokens, title, done, keep)
                logps = np.where(done[:, None], logps, scored)
                if table:
                    table.finish()
        finally:
            if lock is not None:
                lock.release()
        results.append(logps)
    if engine is not None:
        engine.close()
    return results


def _from_rank_0(array: np.ndarray) -> np.ndarray:
    if world.from_environment().size == 1:
        return array
    tensor = torch.from_numpy(array).to(_collective_device())
    torch.distributed.broadcast(tensor, 0)
    return tensor.cpu().numpy()


def main(argv: list[str]) -> None:
    with world.user_errors():
        options = parse_options(argv)
        run = prepare(options, world.join().size)
    reference_tables(run)


if __name__ == "__main__":
    world.run_main(main)
