"""The run's folder: which run it belongs to, its checkpoints, and where to resume.

options.yaml     the options that the run uses; --config reads them back
run.json         the run's identity (runs/identity.py, identity_file.py): another run is refused, the same run resumes
metrics.jsonl    a line per step and per evaluation (reports/record.py)
curves.png       the same as curves (reports/curves.py)
trackers.json, tensorboard/, wandb/   with --report_to (reports/trackers.py)
checkpoints/step-000100/   written by runs/checkpoint.py; no other name is a checkpoint's
    checkpoint.json        step, ranks, ZeRO stage, versions, options, the run's identity; the manifest: every other
                           file's size and checksum (runs/manifest.py)
    metrics.jsonl.gz       a copy, for the case that the run's own is damaged
    random-0.safetensors   one per rank: its random state
    state-0.safetensors    one per rank: its part of the fp32 weights and of Adam's state (engine/state.py)
    reference-0.safetensors   of a reference that moves: its fp32 weights, under ZeRO-3 each rank's own
checkpoints/step-000100.partial, .damaged   half of a save; a damaged checkpoint whose place a new one took
evaluation.jsonl, generations.md, merged/   the held-out log-probabilities, answers, the exported model
merged.json      the manifest of merged/
running.lock, running.json   held by a process that trains here, and which one (runs/lock.py)
stopped.json     the run's own figures have stopped it (runs/stopped.py); stopped/ has the files of such a run
summary.json     written at the very end
"""

import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpo_ds import checksums
from dpo_ds.config import FIELDS, Options, to_yaml, with_checksum
from dpo_ds.errors import UserError, files_of
from dpo_ds.files import in_words, move_aside, read_object, write_whole
from dpo_ds.ranks import collectives, console
from dpo_ds.runs import identity_file, manifest, shared, stopped
from dpo_ds.runs.identity import FILES, PARENT, allowed_changes, hash_of, require_same
from dpo_ds.runs.lock import LEFT_EARLY, Lock

NEEDED = ("step", "ranks", "stage", "options", "losses", "counts", "run", "identity", FILES)  # in checkpoint.json
MERGED = "merged.json"  # the manifest of merged/
CHECKPOINT = re.compile(r"step-(\d{6,})")  # a checkpoint's name


@dataclass(frozen=True)
class Found:
    """Where a run goes on."""

    resume_from: Path | None  # None: from the beginning
    finished: bool
    damaged: tuple[Path, ...] = ()  # the run's checkpoints after it, which cannot be used
    lock: Lock | None = None  # on the run's folder, held by rank 0; None without a claim
    run: dict = field(default_factory=dict)  # the run's identity


def read_record(folder: Path) -> dict:
    """run.json of a run's folder: the options that decide what the run computes, its data and its files."""
    return identity_file.read(folder, checkpoints(folder))


def options_of(record: object, what: str) -> Options:
    """A run's options, from what it recorded. Options that this version does not know are left out."""
    values = record if isinstance(record, dict) else {}
    if not values.get("model"):
        raise UserError(f"{what}: its record does not name a model: copy it again")
    return Options(**{name: value for name, value in values.items() if name in FIELDS})


def started(folder: Path) -> str | None:
    """The date, ISO, on which the folder's run was first started (chat templates may print it); None without a run."""
    own = checkpoints(folder)
    return identity_file.read(folder, own, speak=False).get("date") if identity_file.is_there(folder, own) else None


def check_folder(folder: Path, options: Options) -> None:
    """Raises UserError if the folder belongs to no run, is in use, or holds a run and --resume never was given."""
    with files_of("--output_dir", folder):
        if not folder.exists():
            return
        if folder.is_dir() and all(_left_early(path.name) for path in folder.iterdir()):
            return
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not identity_file.is_there(folder, checkpoints(folder)):
        raise UserError(f"--output_dir {folder} holds files of something else: name an empty or new folder")
    if options.resume == "never":
        raise UserError(f"--output_dir {folder} holds a run, and --resume never was given: name another folder")
    collectives.on_rank_0(Lock(folder).require_free)


def _left_early(name: str) -> bool:
    """Whether a start that was killed before it claimed its folder may have left a file with this name."""
    return name in LEFT_EARLY or name.startswith(shared.MARK)


def open_folder(folder: Path, options: Options, this_run: dict, steps: int) -> Found:
    """Claims the folder for this run, and finds where this run stopped. All ranks call it together.

    steps: of the run's schedule. Raises UserError if another run owns the folder, another process uses it, or no
    checkpoint can be used.
    """
    began = identity_file.is_there(folder, checkpoints(folder))
    given = None if options.resume in ("auto", "never") else Path(options.resume)
    if given is not None:
        _require_usable(given)
        if not is_own(folder, given):
            this_run = _with_parent(this_run, given, options.resume_optimizer)
    again = began and _begins_again(folder, read_record(folder), this_run)
    if given is not None and (again or not began):
        if is_own(folder, given):
            raise UserError(
                f"--resume {given} is of the run that stopped in {folder}: name a new --output_dir to begin from it "
                "with other options"
            )
        _say_changes(given, this_run)
    found = Found(given, False) if again else _where_to_go_on(folder, options, this_run, given)
    if found.resume_from is not None and (done := describe(found.resume_from)["step"]) > steps:
        raise UserError(
            f"{found.resume_from} is of step {done}, but this run has {steps}: raise --max_steps or --epochs, or take "
            "an earlier checkpoint"
        )
    lock = Lock(folder)
    collectives.wait_for_all()  # every rank must have looked before rank 0 writes
    collectives.on_rank_0(lambda: _claim(folder, lock, options, this_run, found.damaged, again))
    return replace(found, lock=lock, run=this_run)


def _require_usable(checkpoint: Path) -> None:
    if reason := damage(checkpoint, run=None):
        raise unusable("--resume", checkpoint, reason)


def unusable(option: str, checkpoint: Path, reason: str) -> UserError:
    """The UserError for a checkpoint that the user named with `option`."""
    damaged = (checkpoint / identity_file.CHECKPOINT).is_file()
    remedy = "take another one of its run" if damaged else "name a folder checkpoints/step-… of a run"
    return UserError(f"{option} {checkpoint} is no checkpoint that can be used ({reason}): {remedy}")


def _with_parent(this_run: dict, checkpoint: Path, optimizer: bool) -> dict:
    """The identity of a run that begins from another run's checkpoint."""
    facts = describe(checkpoint)
    return this_run | {PARENT: {"run": facts["run"], "step": facts["step"], "optimizer": optimizer}}


def _say_changes(checkpoint: Path, this_run: dict) -> None:
    """Says what a run that begins from another run's checkpoint changes. Raises UserError if it may not."""
    for change in allowed_changes(checkpoint, describe(checkpoint)["identity"], this_run):
        console.say(f"--resume {checkpoint}: {change}")
    console.say(f"--resume {checkpoint}: Adam's state is {'kept' if this_run[PARENT]['optimizer'] else 'not kept'}")


def _begins_again(folder: Path, recorded: dict, this_run: dict) -> bool:
    """Whether this run takes the place of another one, which its own figures have stopped. Raises UserError if the
    folder's run is another one that they have not."""
    try:
        require_same(folder, recorded, this_run)
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


def _where_to_go_on(folder: Path, options: Options, this_run: dict, given: Path | None) -> Found:
    """given: the checkpoint of --resume. A run that began from another run's goes on from its own, once it has one."""
    if collectives.on_rank_0((folder / "summary.json").is_file):
        missing = merged_damage(folder, hash_of(this_run)) if options.export == "merged" else None
        if missing is None:
            return Found(None, finished=True)
        console.say(f"this run is finished, but {folder / 'merged'} {missing}: it is exported again")
    if given is not None and this_run.get(PARENT) is None:
        return Found(given, finished=False)
    own, damaged = newest_whole(folder, hash_of(this_run))
    return Found(own or given, False, tuple(damaged))


def _read(path: Path) -> dict:
    """Reads a JSON object that a run wrote. Raises UserError if the file is damaged."""
    try:
        return read_object(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): name another folder") from None


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the run's checkpoint of a step is."""
    return folder / "checkpoints" / f"step-{step:06d}"


def is_own(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint lies in this run's folder."""
    return checkpoint.parent.resolve() == (folder / "checkpoints").resolve()


def checkpoints(folder: Path) -> list[Path]:
    """The folders with a checkpoint's name, oldest first, damaged ones included."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0)


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
    files: checksums.Files = {}
    try:
        facts = read_object(checkpoint / identity_file.CHECKPOINT)
        problem, files = _contradiction(checkpoint, facts, run), facts.get(FILES, {})
    except ValueError as error:
        problem = f"its checkpoint.json is damaged ({error})"
    with console.working(f"verifying {checkpoint}"):
        if problem is None:
            problem = manifest.difference(checkpoint, files)
        problem = collectives.first(problem)
    if problem is None:
        size = in_words(manifest.size_of(files))
        console.say(f"{checkpoint} is whole: {size} verified in {time.monotonic() - began:.1f} s")
    return problem


def is_merged(folder: Path) -> bool:
    """Whether a model's folder is what a run has exported."""
    return folder.resolve().name == "merged" and (folder.resolve().parent / "run.json").is_file()


def merged_damage(folder: Path, run: str | None) -> str | None:
    """What is wrong with the run's exported model; None if nothing is. All ranks call it together.

    run: the run's hash, if it is known.
    """
    missing, files = collectives.on_rank_0(lambda: _merged_files(folder, run))
    if missing is None and files:
        missing = manifest.difference(folder / "merged", files)
    return collectives.first(missing)


def _merged_files(folder: Path, run: str | None) -> tuple[str | None, checksums.Files]:
    """What is wrong with merged/ at first sight, and the files to compare: all but the model card, which people edit.
    A run of an older version has no merged.json."""
    if not (folder / "merged").is_dir():
        return "is missing", {}
    try:
        if not (folder / MERGED).exists():
            console.say(f"{folder / 'merged'} has no {MERGED}: it cannot be verified")
            return None, {}
        record = read_object(folder / MERGED)
    except ValueError as error:
        return f"cannot be checked, because {MERGED} is damaged ({error})", {}
    if not checksums.is_sealed(record):
        return f"cannot be checked, because {MERGED} does not match its own checksum", {}
    if run is not None and record.get("run", run) != run:
        return "is another run's", {}
    return None, {name: facts for name, facts in record[FILES].items() if name != "README.md"}


def _contradiction(checkpoint: Path, facts: dict, run: str | None) -> str | None:
    """What is wrong with the content of a checkpoint.json; None if nothing is."""
    if FILES in facts and not checksums.is_sealed(facts):  # an old version had no list of files
        return "checkpoint.json does not match its own checksum"
    if missing := [key for key in NEEDED if key not in facts]:
        return f"checkpoint.json has no {missing[0]}: another version of dpo_ds wrote it"
    if not isinstance(facts[FILES], dict):
        return "checkpoint.json's list of files cannot be read"
    if step_of(checkpoint) not in (None, facts["step"]):
        return f"checkpoint.json is of step {facts['step']}"
    if run is not None and facts.get("run", run) != run:
        return "it belongs to another run"
    return None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for other names."""
    name = CHECKPOINT.fullmatch(checkpoint.name)
    return int(name[1]) if name else None


def describe(checkpoint: Path) -> dict:
    """The content of checkpoint.json: step, ranks, ZeRO stage, versions, options, the run's hash, the manifest."""
    return _read(checkpoint / identity_file.CHECKPOINT)
