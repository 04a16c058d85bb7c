"""Saves and loads a run's checkpoints: the engine's state, each rank's random state, checkpoint.json.

A checkpoint is written under another name, measured and synced to the disk by all ranks, and renamed at the end. So a
folder with a checkpoint's name was whole once, and its manifest tells whether it still is.
"""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from dpo_ds import __version__, checksums
from dpo_ds.checksums import Files
from dpo_ds.engine.engine import Engine
from dpo_ds.errors import SaveFailed
from dpo_ds.files import follow_umask, in_words, move_aside, saving, sync_folders, write_whole
from dpo_ds.losses.compared import Running
from dpo_ds.ranks import console, world
from dpo_ds.ranks.collectives import on_rank_0, together
from dpo_ds.reports.record import Record
from dpo_ds.runs import folders, identity_file, manifest
from dpo_ds.runs.prepare import Run


class Kept(Protocol):
    """What a checkpoint holds beside the policy: a reference."""

    def save(self, folder: Path) -> Files:
        """Writes this rank's part into the checkpoint's folder. Returns its files' sizes and checksums."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""


def save(run: Run, engine: Engine, reference: Kept, step: int, running: Running) -> Path:
    """Writes checkpoints/step-NNNNNN of the run, by all ranks together. A whole one of this run is kept.

    running: what the losses remember. Raises SaveFailed, on every rank, if a rank could not write its part; earlier
    checkpoints are as they were.
    """
    final, began = folders.checkpoint_folder(run.folder, step), time.monotonic()
    damage = None
    if on_rank_0(final.exists):
        damage = folders.damage(final, run.hash)
        if damage is None:
            return final
    partial = final.with_name(final.name + ".partial")
    try:
        on_rank_0(lambda: _make_place(final, partial, engine.checkpoint_bytes))
        written = together(lambda: _write(final, partial, engine, reference))
        on_rank_0(lambda: _copy_record(run.folder, final, partial))
        known = {name: facts for files in written for name, facts in files.items()}
        files = manifest.measure(partial, final, known)
        facts = {
            "step": step,
            "ranks": world.from_environment().size,
            "stage": engine.stage,
            "run": run.hash,
            identity_file.COPY: run.identity,
            "dpo_ds": __version__,
            "torch": torch.__version__,
            "options": vars(run.options),
            "counts": engine.counts,
            "losses": asdict(running),
            folders.FILES: files,
        }
        on_rank_0(lambda: _complete(final, partial, facts, damage))
    except SaveFailed:
        if world.from_environment().speaks:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    size = in_words(manifest.size_of(files))
    console.say(f"checkpoint {final}: {size} saved in {time.monotonic() - began:.1f} s")
    if world.from_environment().speaks and run.options.keep_last is not None:
        _remove_older(run, step, run.options.keep_last)
    return final


def _remove_older(run: Run, step: int, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, counted back from that of `step`, and the best."""
    found = folders.checkpoints(run.folder)
    older = found[: found.index(folders.checkpoint_folder(run.folder, step)) + 1]
    best = None
    if run.options.keep_best is not None:
        best = best_checkpoint(run.folder, run.options.keep_best)
        known = f"{best} is the best" if best is not None else "none has a finite value, so none is the best"
        console.say(f"checkpoints: {known} by {run.options.keep_best}")
    for path in older[:-keep]:
        if path == best:
            continue
        try:
            # A kill within the removal must not leave half of a checkpoint under its name.
            shutil.rmtree(path.rename(path.with_name(path.name + ".partial")))
        except OSError as error:
            console.say(f"{path} could not be removed: {error.strerror}")


def best_checkpoint(folder: Path, metric: str) -> Path | None:
    """The run's checkpoint with the best value of a held-out metric at its step, the newest of equals; None if none was
    evaluated."""
    values = {line["step"]: line[metric] for line in Record(folder).lines() if line.get(metric) is not None}
    sign = -1 if metric.endswith("loss") else 1
    known = [path for path in folders.checkpoints(folder) if folders.step_of(path) in values]
    return max(known, key=lambda path: (sign * values[folders.step_of(path)], folders.step_of(path)), default=None)


def _make_place(final: Path, partial: Path, size: int) -> None:
    """Makes the folder to write in. size: about how many bytes will be written."""
    with saving(final):
        for left in folders.half_saved(final.parent.parent):  # by an earlier start that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    if free < size:
        raise SaveFailed(f"{final} was not saved: it takes about {in_words(size)}, and {in_words(free)} are free there")


def _write(final: Path, partial: Path, engine: Engine, reference: Kept) -> Files:
    """Writes this rank's files. Returns the sizes and checksums of those that are measured already."""
    with saving(final):
        random = partial / f"random-{world.from_environment().rank}.safetensors"
        save_file(_random_state(), random)
        follow_umask(random)
        return engine.save(partial) | reference.save(partial)


def _copy_record(folder: Path, final: Path, partial: Path) -> None:
    """Copies metrics.jsonl: a run that goes on needs it whole."""
    with saving(final):
        Record(folder).copy_to(partial)


def _complete(final: Path, partial: Path, facts: dict, damage: str | None) -> None:
    """Writes the manifest and gives the checkpoint its name. damage: why one with this name cannot be used."""
    with saving(final):
        write_whole(partial / identity_file.CHECKPOINT, json.dumps(checksums.sealed(facts), indent=1))
        sync_folders(partial)
        if final.exists():
            console.say(f"{final} cannot be used ({damage}): it is now called {move_aside(final).name}")
        os.replace(partial, final)
        sync_folders(final.parent)


def load(engine: Engine, reference: Kept, checkpoint: Path, optimizer: bool = True) -> tuple[int, Running]:
    """Restores weights, schedule, a moving reference and random state, and Adam's state unless `optimizer` is false.
    Returns the number of steps done, and what the losses remember.

    The checkpoint may be of another number of ranks, and of another ZeRO stage.
    """
    here, facts = world.from_environment(), folders.describe(checkpoint)
    engine.load(checkpoint, facts["counts"], optimizer)
    reference.load(checkpoint)
    if facts["ranks"] == here.size:
        _set_random_state(load_file(checkpoint / f"random-{here.rank}.safetensors"))
    else:
        console.say(f"{checkpoint} is of {facts['ranks']} ranks and goes on with {here.size}")
        torch.manual_seed(torch.initial_seed() + facts["step"])  # not the dropout of the first steps again
    return facts["step"], Running(**facts["losses"])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
