"""The run's folder: whose it is, its checkpoints, where to go on.

    options.yaml     what the run uses; feed it back with --config
    run.json         the run's identity: another run is refused, its own goes on
    metrics.jsonl    a line per step and per evaluation
    checkpoints/step-000100/   DeepSpeed's files, each rank's random state, checkpoint.json
    summary.json     written at the very end

A checkpoint is written under another name and renamed when every rank has written its part, so whatever carries a
checkpoint's name is whole.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dpo_ds import __version__, world
from dpo_ds.config import NOT_IDENTITY, Options, to_yaml
from dpo_ds.shards import optimizer_state

DEEPSPEED_TAG = "deepspeed"


@dataclass(frozen=True)
class Found:
    resume_from: Path | None
    finished: bool


def identity(options: Options, train_digest: str, eval_digest: str) -> dict:
    """What two starts of one run have in common."""
    values = {key: value for key, value in vars(options).items() if key not in NOT_IDENTITY}
    return {**values, "train_digest": train_digest, "eval_digest": eval_digest}


def check_folder(folder: Path, options: Options) -> None:
    """Raises ValueError if the folder is not a run's, or one that is not to go on."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; name a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / "run.json").is_file():
        raise ValueError(f"--output_dir {folder} holds files of something else: name an empty or new folder")
    if options.resume == "never":
        raise ValueError(f"--output_dir {folder} holds a run, and --resume never was given: name another folder")


def open_folder(folder: Path, options: Options, mine: dict, ranks: int) -> Found:
    """Makes the folder this run's, or finds where it stopped. Raises ValueError if it is another run's."""
    record = folder / "run.json"
    if record.is_file():
        _require_same(folder, json.loads(record.read_text()), mine)
    resume_from = None
    if options.resume not in ("auto", "never"):
        resume_from = Path(options.resume)
        if not (resume_from / "checkpoint.json").is_file():
            raise ValueError(f"--resume {options.resume} is no checkpoint: name a folder checkpoints/step-… of a run")
    elif complete := checkpoints(folder):
        resume_from = complete[-1]
    if resume_from is not None:
        wrote = describe(resume_from)["ranks"]
        if wrote != ranks:
            raise ValueError(
                f"{resume_from} was written by {wrote} ranks and this run has {ranks}: start {wrote} ranks"
            )
    finished = (folder / "summary.json").is_file()
    world.wait_for_all()  # every rank has looked before rank 0 writes
    if world.from_environment().speaks:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(mine, indent=1))
        write_whole(folder / "options.yaml", to_yaml(options))
    return Found(resume_from, finished)


def _require_same(folder: Path, theirs: dict, mine: dict) -> None:
    different = [
        f"{key} is {_shown(theirs.get(key))} there and {_shown(mine[key])} here"
        for key in mine
        if theirs.get(key) != mine[key]
    ]
    if different:
        raise ValueError(
            f"--output_dir {folder} holds another run ({'; '.join(different)}): name another folder, or make the "
            "options agree to go on with that run"
        )


def _shown(value) -> str:
    return "not given" if value is None else str(value)


def checkpoints(folder: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    return sorted(
        path.parent for path in folder.glob("checkpoints/step-*/checkpoint.json") if ".partial" not in str(path)
    )


def describe(checkpoint: Path) -> dict:
    """checkpoint.json: step, ranks, stage, precision, options, versions."""
    return json.loads((checkpoint / "checkpoint.json").read_text())


def save(engine, folder: Path, step: int, options: Options) -> Path:
    """Writes checkpoints/step-NNNNNN of the run, by all ranks together; one that is there already is kept."""
    final = folder / "checkpoints" / f"step-{step:06d}"
    if (final / "checkpoint.json").is_file():
        return final
    here = world.from_environment()
    partial = final.with_suffix(".partial")
    if here.speaks:
        shutil.rmtree(partial, ignore_errors=True)  # of an earlier start that was killed while it saved
        partial.mkdir(parents=True)
    world.wait_for_all()
    engine.deepspeed.save_checkpoint(str(partial), tag=DEEPSPEED_TAG, save_latest=False)
    save_file(_random_state(), partial / f"random-{here.rank}.safetensors")
    world.wait_for_all()
    if here.speaks:
        facts = {
            "step": step,
            "ranks": here.size,
            "stage": engine.deepspeed.zero_optimization_stage(),
            "dpo_ds": __version__,
            "torch": torch.__version__,
            "options": vars(options),
        }
        write_whole(partial / "checkpoint.json", json.dumps(facts, indent=1))
        os.replace(partial, final)
    world.wait_for_all()
    return final


def load(engine, checkpoint: Path) -> int:
    """Puts the engine where it was: weights, optimizer, schedule, random state. Returns the steps done."""
    rank = world.from_environment().rank
    if engine.deepspeed.zero_nvme_offload_optimizer():
        _expect_swapped_state(engine.deepspeed.optimizer, checkpoint / DEEPSPEED_TAG, rank)
    engine.deepspeed.load_checkpoint(str(checkpoint), tag=DEEPSPEED_TAG)
    _count_as_before(engine.deepspeed.basic_optimizer)
    _set_random_state(load_file(checkpoint / f"random-{rank}.safetensors"))
    return describe(checkpoint)["step"]


def _count_as_before(adam) -> None:
    """DeepSpeed's CPUAdam multiplies beta into beta^n at every step, and computes a power where it starts at another:
    the last bit differs at half of the steps. Empty updates take it through the steps that were done."""
    if not hasattr(adam, "ds_opt_adam"):
        return
    done = max((state["step"] for state in adam.state.values() if "step" in state), default=0)
    group = adam.param_groups[0]
    lr, betas, *rest = (group[key] for key in ("lr", "betas", "eps", "weight_decay", "bias_correction"))
    for step in range(1, done + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, lr, *betas, *rest, *(torch.empty(0) for _ in range(4)))


def _expect_swapped_state(optimizer, folder: Path, rank: int) -> None:
    """With the optimizer on NVMe, DeepSpeed's load only copies swap files back. Adam's moments among them would not be
    read, its step count and the groups' learning rates would start again, and groups too small for a swap file (1 MiB)
    would keep the weights of the model's start: this puts all that in place, before the copying."""
    saved = optimizer_state(folder, rank)["optimizer_state_dict"]
    optimizer._set_fp32_optimizer_param_groups()
    optimizer.optimizer.load_state_dict(saved["optimizer_state_dict"])
    optimizer._clear_fp32_optimizer_param_groups()
    for number, (group, weights) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, saved["fp32_flat_groups"], strict=True)
    ):
        if not optimizer._swappable_optimizer_subgroup(number):
            group.data.copy_(weights.data)
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            # Never touched, so never in memory: the swapper takes on what has a group's size, and then its file.
            state = torch.empty(optimizer.fp16_partitioned_groups_flat_numel[number], dtype=group.dtype)
            optimizer.optimizer.state[group][key] = state
        optimizer.optimizer_swapper._get_param_swap_info(group).release_memory()


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
