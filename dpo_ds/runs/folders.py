"""The run's folder: which run it belongs to, its checkpoints, and where to resume.

options.yaml     the options that the run uses; --config reads them back
run.json         the run's identity: another run is refused, the same run resumes
metrics.jsonl    a line per step and per evaluation (reports/record.py)
curves.png       the same as curves (reports/curves.py)
trackers.json, tensorboard/, wandb/   with --report_to (reports/trackers.py)
checkpoints/step-000100/   written by runs/checkpoint.py
    checkpoint.json        step, ranks, ZeRO stage, versions, options
    random-0.safetensors   one per rank: its random state
    reference-0.safetensors   of a reference that moves: its fp32 weights, under ZeRO-3 each rank's own
    deepspeed/             DeepSpeed's own files (engine/resume.py writes them, engine/shards.py reads tensors)
evaluation.jsonl, generations.md, merged/   the held-out log-probabilities, answers, the exported model
summary.json     written at the very end
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.config import NOT_IDENTITY, Options, to_yaml
from dpo_ds.errors import UserError, files_of, one_line
from dpo_ds.files import write_whole
from dpo_ds.ranks import collectives, world

FILES = "files"  # the key of the hashes in run.json


@dataclass(frozen=True)
class Found:
    resume_from: Path | None
    finished: bool


def identity(
    options: Options, train_digest: str, eval_digest: str, date: str, files: dict[str, dict[str, str]]
) -> dict:
    """The options, data and weights that two starts of the same run must share.

    date: see `started`. files: the hashes of the files that each option names, {option: {file: sha256}}.
    """
    values = {key: value for key, value in vars(options).items() if key not in NOT_IDENTITY}
    return {**values, "train_digest": train_digest, "eval_digest": eval_digest, "date": date, FILES: files}


def read_record(folder: Path) -> dict:
    """run.json of a run's folder: the options that decide what the run computes, its data and its files."""
    return _read(folder / "run.json")


def started(folder: Path) -> str | None:
    """The date, ISO, on which the folder's run was first started (chat templates may print it); None without a run."""
    record = folder / "run.json"
    return _read(record).get("date") if record.is_file() else None


def check_folder(folder: Path, options: Options) -> None:
    """Raises UserError if the folder belongs to no run, or if it holds a run and --resume never was given."""
    with files_of("--output_dir", folder):
        if not folder.exists():
            return
        if folder.is_dir() and not any(folder.iterdir()):
            return
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not (folder / "run.json").is_file():
        raise UserError(f"--output_dir {folder} holds files of something else: name an empty or new folder")
    if options.resume == "never":
        raise UserError(f"--output_dir {folder} holds a run, and --resume never was given: name another folder")


def open_folder(folder: Path, options: Options, this_run: dict, ranks: int) -> Found:
    """Claims the folder for this run, or finds where this run stopped. Raises UserError if another run owns it."""
    record = folder / "run.json"
    if record.is_file():
        _require_same(folder, _read(record), this_run)
    resume_from = None
    if options.resume not in ("auto", "never"):
        resume_from = Path(options.resume)
        if not (resume_from / "checkpoint.json").is_file():
            raise UserError(f"--resume {options.resume} is no checkpoint: name a folder checkpoints/step-… of a run")
    elif complete := checkpoints(folder):
        resume_from = complete[-1]
    if resume_from is not None:
        wrote = describe(resume_from)["ranks"]
        if wrote != ranks:
            raise UserError(f"{resume_from} was written by {wrote} ranks and this run has {ranks}: start {wrote} ranks")
    finished = (folder / "summary.json").is_file()
    collectives.wait_for_all()  # every rank must have looked before rank 0 writes
    if world.from_environment().speaks:
        with files_of("--output_dir", folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(this_run, indent=1))
            write_whole(folder / "options.yaml", to_yaml(options))
    return Found(resume_from, finished)


def _read(path: Path) -> dict:
    """Reads a JSON object that a run wrote. Raises UserError if the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): name another folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no JSON object): name another folder")
    return found


def _require_same(folder: Path, recorded: dict, this_run: dict) -> None:
    different = [
        f"{key} is {_shown(recorded.get(key))} there and {_shown(this_run[key])} here"
        for key in this_run
        if key != FILES and recorded.get(key) != this_run[key]
    ]
    if different:
        raise UserError(
            f"--output_dir {folder} holds another run ({'; '.join(different)}): name another folder, or make the "
            "options agree to go on with that run"
        )
    _require_same_files(folder, recorded.get(FILES), this_run[FILES])


def _require_same_files(folder: Path, before: dict | None, now: dict[str, dict[str, str]]) -> None:
    for option, hashes in now.items():
        old = before.get(option, {}) if before is not None else {}
        changed = sorted(name for name in {*old, *hashes} if old.get(name) != hashes.get(name))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"--output_dir {folder} holds a run that began with other files of {option}: {changed[0]}{more} "
                "changed since, so it would go on from one model and compare with another: put the old files back, or "
                "name another folder to begin again"
            )


def _shown(value) -> str:
    return "not given" if value is None else str(value)


def checkpoints(folder: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted(
        path.parent for path in folder.glob("checkpoints/step-*/checkpoint.json") if ".partial" not in str(path)
    )


def describe(checkpoint: Path) -> dict:
    """The content of checkpoint.json: step, ranks, ZeRO stage, versions, options."""
    return _read(checkpoint / "checkpoint.json")
