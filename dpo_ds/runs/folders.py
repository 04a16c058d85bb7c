"""The run's folder: whose it is, its checkpoints, where to go on.

options.yaml     what the run uses; feed it back with --config
run.json         the run's identity: another run is refused, its own goes on
metrics.jsonl    a line per step and per evaluation
checkpoints/step-000100/   DeepSpeed's files, each rank's random state, checkpoint.json
summary.json     written at the very end
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.config import NOT_IDENTITY, Options, to_yaml
from dpo_ds.errors import UserError, files_of, one_line
from dpo_ds.files import write_whole
from dpo_ds.ranks import collectives, world


@dataclass(frozen=True)
class Found:
    resume_from: Path | None
    finished: bool


def identity(options: Options, train_digest: str, eval_digest: str) -> dict:
    """What two starts of one run have in common."""
    values = {key: value for key, value in vars(options).items() if key not in NOT_IDENTITY}
    return {**values, "train_digest": train_digest, "eval_digest": eval_digest}


def check_folder(folder: Path, options: Options) -> None:
    """Raises UserError if the folder is not a run's, or one that is not to go on."""
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


def open_folder(folder: Path, options: Options, mine: dict, ranks: int) -> Found:
    """Makes the folder this run's, or finds where it stopped. Raises UserError if it is another run's."""
    record = folder / "run.json"
    if record.is_file():
        _require_same(folder, _read(record), mine)
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
    collectives.wait_for_all()  # every rank has looked before rank 0 writes
    if world.from_environment().speaks:
        with files_of("--output_dir", folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(mine, indent=1))
            write_whole(folder / "options.yaml", to_yaml(options))
    return Found(resume_from, finished)


def _read(path: Path) -> dict:
    """A JSON object that a run wrote. Raises UserError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): name another folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no JSON object): name another folder")
    return found


def _require_same(folder: Path, theirs: dict, mine: dict) -> None:
    different = [
        f"{key} is {_shown(theirs.get(key))} there and {_shown(mine[key])} here"
        for key in mine
        if theirs.get(key) != mine[key]
    ]
    if different:
        raise UserError(
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
    return _read(checkpoint / "checkpoint.json")
