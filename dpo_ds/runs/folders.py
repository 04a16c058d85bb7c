"""The run's folder: which run it belongs to, its checkpoints, and where to resume.

options.yaml     the options that the run uses; --config reads them back
run.json         the run's identity: another run is refused, the same run resumes (runs/identity_file.py)
metrics.jsonl    a line per step and per evaluation (reports/record.py)
curves.png       the same as curves (reports/curves.py)
trackers.json, tensorboard/, wandb/   with --report_to (reports/trackers.py)
checkpoints/step-000100/   written by runs/checkpoint.py; no other name is a checkpoint's
    checkpoint.json        step, ranks, ZeRO stage, versions, options, the run's hash; the manifest: every other file's
                           size and checksum (runs/manifest.py)
    run.json, metrics.jsonl.gz   copies, for the case that the run's own are damaged
    random-0.safetensors   one per rank: its random state
    reference-0.safetensors   of a reference that moves: its fp32 weights, under ZeRO-3 each rank's own
    deepspeed/             DeepSpeed's own files (engine/resume.py writes them, engine/shards.py reads tensors)
checkpoints/step-000100.partial, .damaged   half of a save; a damaged checkpoint whose place a new one took
evaluation.jsonl, generations.md, merged/   the held-out log-probabilities, answers, the exported model
merged.json      the manifest of merged/
running.lock, running.json   held by a process that trains here, and which one (runs/lock.py)
stopped.json     the run's own figures have stopped it (runs/stopped.py); stopped/ has the files of such a run
summary.json     written at the very end
"""

import hashlib
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_ds import checksums
from dpo_ds.config import NOT_IDENTITY, Options, to_yaml, with_checksum
from dpo_ds.errors import UserError, files_of, one_line
from dpo_ds.files import in_words, move_aside, write_whole
from dpo_ds.ranks import collectives, console
from dpo_ds.runs import identity_file, manifest, stopped
from dpo_ds.runs.lock import LEFT_EARLY, Lock

FILES = "files"  # the key of the hashes in run.json, and of a checkpoint's manifest in checkpoint.json
MERGED = "merged.json"  # the manifest of merged/
CHECKPOINT = re.compile(r"step-(\d{6,})")  # a checkpoint's name


@dataclass(frozen=True)
class Found:
    """Where a run goes on."""

    resume_from: Path | None  # None: from the beginning
    finished: bool
    damaged: tuple[Path, ...] = ()  # the run's checkpoints after it, which cannot be used
    lock: Lock | None = None  # on the run's folder, held by rank 0; None without a claim


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
    return identity_file.read(folder, checkpoints(folder))


def hash_of(identity: dict) -> str:
    """What names a run in its checkpoints: the hash of what `identity` returned."""
    given = {key: value for key, value in identity.items() if value is not None}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:32]


def started(folder: Path) -> str | None:
    """The date, ISO, on which the folder's run was first started (chat templates may print it); None without a run."""
    own = checkpoints(folder)
    return identity_file.read(folder, own, speak=False).get("date") if identity_file.is_there(folder, own) else None


def check_folder(folder: Path, options: Options) -> None:
    """Raises UserError if the folder belongs to no run, is in use, or holds a run and --resume never was given."""
    with files_of("--output_dir", folder):
        if not folder.exists():
            return
        if folder.is_dir() and all(path.name in LEFT_EARLY for path in folder.iterdir()):
            return
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not identity_file.is_there(folder, checkpoints(folder)):
        raise UserError(f"--output_dir {folder} holds files of something else: name an empty or new folder")
    if options.resume == "never":
        raise UserError(f"--output_dir {folder} holds a run, and --resume never was given: name another folder")
    collectives.on_rank_0(Lock(folder).require_free)


def open_folder(folder: Path, options: Options, this_run: dict, ranks: int) -> Found:
    """Claims the folder for this run, and finds where this run stopped. All ranks call it together.

    Raises UserError if another run owns the folder, another process uses it, or no checkpoint can be used.
    """
    again = False
    if identity_file.is_there(folder, checkpoints(folder)):
        again = _begins_again(folder, read_record(folder), this_run)
    found = Found(None, False) if again else _where_to_go_on(folder, options, hash_of(this_run), ranks)
    lock = Lock(folder)
    collectives.wait_for_all()  # every rank must have looked before rank 0 writes
    collectives.on_rank_0(lambda: _claim(folder, lock, options, this_run, found.damaged, again))
    return replace(found, lock=lock)


def _begins_again(folder: Path, recorded: dict, this_run: dict) -> bool:
    """Whether this run takes the place of another one, which its own figures have stopped. Raises UserError if the
    folder's run is another one that they have not."""
    try:
        _require_same(folder, recorded, this_run)
    except UserError:
        if not stopped.is_stopped(folder):
            raise
        return True
    return False


def _claim(folder: Path, lock: Lock, options: Options, this_run: dict, damaged: tuple[Path, ...], again: bool) -> None:
    with files_of("--output_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        for path in damaged:
            console.say(f"{path} is now called {move_aside(path).name}")
        if again:
            aside = stopped.put_aside(folder)
            console.say(f"the run in {folder} was stopped by its own figures: its files are now in {aside}")
        identity_file.write(folder, this_run)
        write_whole(folder / "options.yaml", with_checksum(to_yaml(options)))
        stopped.go_on(folder)


def _where_to_go_on(folder: Path, options: Options, run: str, ranks: int) -> Found:
    if collectives.on_rank_0((folder / "summary.json").is_file):
        missing = merged_damage(folder, run) if options.export == "merged" else None
        if missing is None:
            return Found(None, finished=True)
        console.say(f"this run is finished, but {folder / 'merged'} {missing}: it is exported again")
    damaged: list[Path] = []
    if options.resume not in ("auto", "never"):
        resume_from: Path | None = Path(options.resume)
        if reason := damage(Path(options.resume), run=None):
            raise UserError(
                f"--resume {options.resume} is no checkpoint that can be used ({reason}): name a folder "
                "checkpoints/step-… of a run"
            )
    else:
        resume_from, damaged = newest_whole(folder, run)
    if resume_from is not None:
        wrote = describe(resume_from)["ranks"]
        if wrote != ranks:
            raise UserError(f"{resume_from} was written by {wrote} ranks and this run has {ranks}: start {wrote} ranks")
    return Found(resume_from, False, tuple(damaged))


def _read(path: Path) -> dict:
    """Reads a JSON object that a run wrote. Raises UserError if the file is damaged."""
    try:
        return _object(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): name another folder") from None


def _object(path: Path) -> dict:
    """Reads a JSON object. Raises ValueError, with the reason, if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(one_line(error)) from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
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


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the run's checkpoint of a step is."""
    return folder / "checkpoints" / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The folders with a checkpoint's name, oldest first, damaged ones included."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if _step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: _step_of(path) or 0)


def half_saved(folder: Path) -> list[Path]:
    """What a start leaves behind that is killed while it saves or removes a checkpoint."""
    found = (folder / "checkpoints").glob("step-*.partial")
    return [path for path in found if CHECKPOINT.fullmatch(path.name.removesuffix(".partial"))]


def newest_whole(folder: Path, run: str) -> tuple[Path | None, list[Path]]:
    """The run's newest checkpoint that is whole, and those after it, which are not. All ranks call it together.

    run: the run's hash. Raises UserError if there are checkpoints and none is whole.
    """
    damaged: list[Path] = []
    reason = None
    for checkpoint in reversed(collectives.on_rank_0(lambda: checkpoints(folder))):
        problem = damage(checkpoint, run)
        if problem is None:
            return checkpoint, damaged
        console.say(f"{checkpoint} cannot be used: {problem}")
        reason = reason or problem
        damaged.append(checkpoint)
    if damaged:
        raise UserError(
            f"no checkpoint in {folder / 'checkpoints'} can be used ({damaged[0].name}: {reason}): put a whole one "
            "back, or move that folder away to start this run from the beginning"
        )
    return None, []


def damage(checkpoint: Path, run: str | None) -> str | None:
    """Why a checkpoint cannot be used; None if it is whole. All ranks call it together, and each reads its share.

    run: the hash of the run that it must belong to; None: any.
    """
    began, problem = time.monotonic(), None
    files: checksums.Files | None = {}
    try:
        facts = _object(checkpoint / "checkpoint.json")
        problem, files = _contradiction(checkpoint, facts, run), facts.get(FILES)
    except ValueError as error:
        problem = f"its checkpoint.json is damaged ({error})"
    with console.working(f"verifying {checkpoint}"):
        if problem is None and files is not None:
            problem = manifest.difference(checkpoint, files)
        problem = collectives.first(problem)
    if problem is None and files is None:
        console.say(f"{checkpoint} is of an older version of dpo_ds, without checksums: it cannot be verified")
    elif problem is None and files:
        size = in_words(manifest.size_of(files))
        console.say(f"{checkpoint} is whole: {size} verified in {time.monotonic() - began:.1f} s")
    return problem


def merged_damage(folder: Path, run: str) -> str | None:
    """What is wrong with the run's exported model; None if nothing is. All ranks call it together.

    run: the run's hash.
    """
    missing, files = collectives.on_rank_0(lambda: _merged_files(folder, run))
    if missing is None and files:
        missing = manifest.difference(folder / "merged", files)
    return collectives.first(missing)


def _merged_files(folder: Path, run: str) -> tuple[str | None, checksums.Files]:
    """What is wrong with merged/ at first sight, and the files to compare: all but the model card, which people edit.
    A run of an older version has no merged.json."""
    if not (folder / "merged").is_dir():
        return "is missing", {}
    try:
        if not (folder / MERGED).exists():
            console.say(f"{folder / 'merged'} has no {MERGED}: it cannot be verified")
            return None, {}
        record = _object(folder / MERGED)
    except ValueError as error:
        return f"cannot be checked, because {MERGED} is damaged ({error})", {}
    if not checksums.is_sealed(record):
        return f"cannot be checked, because {MERGED} does not match its own checksum", {}
    if record.get("run", run) != run:
        return "is another run's", {}
    return None, {name: facts for name, facts in record[FILES].items() if name != "README.md"}


def _contradiction(checkpoint: Path, facts: dict, run: str | None) -> str | None:
    """What is wrong with the content of a checkpoint.json; None if nothing is."""
    if FILES in facts and not checksums.is_sealed(facts):
        return "checkpoint.json does not match its own checksum"
    for key in ("step", "ranks", "stage", "options", "losses"):
        if key not in facts:
            return f"checkpoint.json has no {key}"
    if not isinstance(facts.get(FILES, {}), dict):
        return "checkpoint.json's list of files cannot be read"
    if _step_of(checkpoint) not in (None, facts["step"]):
        return f"checkpoint.json is of step {facts['step']}"
    if run is not None and facts.get("run", run) != run:
        return "it belongs to another run"
    return None


def _step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for other names."""
    name = CHECKPOINT.fullmatch(checkpoint.name)
    return int(name[1]) if name else None


def describe(checkpoint: Path) -> dict:
    """The content of checkpoint.json: step, ranks, ZeRO stage, versions, options, the run's hash, the manifest."""
    return _read(checkpoint / "checkpoint.json")
