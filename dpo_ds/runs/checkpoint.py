"""Saves and loads a run's checkpoints: DeepSpeed's files, each rank's random state, checkpoint.json.

A checkpoint is written under another name and renamed once every rank has written its part. So a folder with a
checkpoint's name is always complete.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from dpo_ds import __version__
from dpo_ds.config import Options
from dpo_ds.engine.engine import Engine
from dpo_ds.files import follow_umask, write_whole
from dpo_ds.losses.compared import Running
from dpo_ds.ranks import collectives, world
from dpo_ds.runs.folders import describe


class Kept(Protocol):
    """What a checkpoint holds beside the policy: a reference."""

    def save(self, folder: Path) -> None:
        """Writes it into the checkpoint's folder, by all ranks together."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""


def save(engine: Engine, reference: Kept, folder: Path, step: int, options: Options, running: Running) -> Path:
    """Writes checkpoints/step-NNNNNN of the run, by all ranks together. An existing one is kept.

    running: what the losses remember.
    """
    final = folder / "checkpoints" / f"step-{step:06d}"
    if (final / "checkpoint.json").is_file():
        return final
    here = world.from_environment()
    partial = final.with_suffix(".partial")
    if here.speaks:
        shutil.rmtree(partial, ignore_errors=True)  # left by an earlier start that was killed while it saved
        partial.mkdir(parents=True)
    collectives.wait_for_all()
    engine.save(partial)
    reference.save(partial)
    random = partial / f"random-{here.rank}.safetensors"
    save_file(_random_state(), random)
    follow_umask(random)
    collectives.wait_for_all()
    if here.speaks:
        facts = {
            "step": step,
            "ranks": here.size,
            "stage": engine.stage,
            "dpo_ds": __version__,
            "torch": torch.__version__,
            "options": vars(options),
            "losses": asdict(running),
        }
        write_whole(partial / "checkpoint.json", json.dumps(facts, indent=1))
        os.replace(partial, final)
    collectives.wait_for_all()
    return final


def load(engine: Engine, reference: Kept, checkpoint: Path) -> tuple[int, Running]:
    """Restores weights, optimizer, schedule, a moving reference and random state. Returns the number of steps done, and
    what the losses remember."""
    rank = world.from_environment().rank
    engine.load(checkpoint, rank)
    reference.load(checkpoint)
    _set_random_state(load_file(checkpoint / f"random-{rank}.safetensors"))
    facts = describe(checkpoint)
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
