"""Damage to all that a run writes: named, moved aside and replaced; never trained on, never executed, never deleted.

Each case damages a copy of a finished run. All of them start in one launch, and must end with that run's weights.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import launching
import pytest
import tiny
import torch
from checkpoints import seal_again
from safetensors.torch import load_file

from dpo_ds.config import parse_options
from dpo_ds.runs import folders
from dpo_ds.runs.lock import Lock

STEPS, SAVE = 6, 2
STAGES = {1: 0, 2: 3}  # by the number of ranks


def rank_file(checkpoint: Path, rank: int = 0) -> Path:
    """A rank's part of the weights and of Adam's state."""
    return checkpoint / f"state-{rank}.safetensors"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(checkpoint: Path, **facts) -> None:
    file = checkpoint / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def edit_seed(file: Path) -> None:
    """Changes a digit of the seed: what is left is as good as any to read."""
    text = re.sub(r"(\bseed\W+4)2", r"\g<1>3", file.read_text())
    assert text != file.read_text()
    file.write_text(text)


def swap(one: Path, other: Path) -> None:
    third = one.with_name("third")
    one.rename(third), other.rename(one), third.rename(other)


def foreign(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.parents[2] / "other" / "checkpoints" / checkpoint.name, checkpoint)


# name: (what is done to the newest checkpoint, the reason that is said, with how many ranks)
DAMAGE = {
    "flipped": (lambda c: flip(rank_file(c)), "does not match its checksum", (1, 2)),
    "random-flipped": (lambda c: flip(c / "random-0.safetensors"), "does not match its checksum", (1,)),
    "cut": (lambda c: os.truncate(rank_file(c), 1000), "has 1,000 bytes instead of", (1, 2)),
    "emptied": (lambda c: os.truncate(rank_file(c), 0), "has 0 bytes instead of", (1,)),
    "deleted": (lambda c: rank_file(c).unlink(), "is missing", (1, 2)),
    "older": (
        lambda c: shutil.copy(rank_file(c.with_name("step-000002")), rank_file(c)),
        "does not match its checksum",
        (1, 2),
    ),
    "swapped": (lambda c: swap(rank_file(c, 0), rank_file(c, 1)), "state-0.safetensors has ", (2,)),
    "copied": (lambda c: shutil.copy(rank_file(c, 0), rank_file(c, 1)), "state-1.safetensors has ", (2,)),
    "step-edited": (lambda c: edit(c, step=4), "checkpoint.json does not match its own checksum", (1, 2)),
    "json-deleted": (lambda c: (c / "checkpoint.json").unlink(), "checkpoint.json is damaged (missing)", (1, 2)),
    "json-cut": (lambda c: os.truncate(c / "checkpoint.json", 50), "checkpoint.json is damaged (", (1,)),
    "foreign": (foreign, "it belongs to another run", (1, 2)),
    "renamed": (
        lambda c: (shutil.rmtree(c), shutil.copytree(c.with_name("step-000004"), c)),
        "checkpoint.json is of step 4",
        (1,),
    ),
}
MERGED = {
    "merged-deleted": (lambda m: shutil.rmtree(m), "merged is missing"),
    "merged-flipped": (
        lambda m: flip(m / "model.safetensors"),
        "merged model.safetensors does not match its checksum",
    ),
    "merged-without-a-file": (lambda m: (m / "config.json").unlink(), "merged config.json is missing"),
}
CASES = [(name, ranks) for name, (_, _, counts) in DAMAGE.items() for ranks in counts]
# name: a learning rate
ABSURD = {"absurd": "1", "more-absurd": "1e9"}
BOTH = pytest.mark.parametrize("ranks", STAGES)


class Evil:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


def argv(place: Path, name: str, *more: str) -> list[str]:
    return [
        f"--model={place / 'llama'}", "--dataset=sample", f"--ds_config={place / 'config.json'}",
        f"--output_dir={place / name}", f"--cache_dir={place / 'cache'}", f"--max_steps={STEPS}",
        f"--save_every={SAVE}", "--eval_every=10", "--global_batch_pairs=4", "--eval_pairs=4", "--max_length=96",
        "--learning_rate=1e-3", "--generations=0", *more,
    ]  # fmt: skip


def copied(place: Path, name: str, finished: bool = False) -> Path:
    """A copy of the finished run; by default as it was just before its export. Returns its newest checkpoint."""
    shutil.copytree(place / "base", place / name)
    if not finished:
        shutil.rmtree(place / name / "merged")
        (place / name / "summary.json").unlink()
    return place / name / "checkpoints" / f"step-{STEPS:06d}"


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def as_an_old_version(checkpoint: Path) -> None:
    """As a version of dpo_ds before the manifest wrote it."""
    file = checkpoint / "checkpoint.json"
    new = ("files", "checksum", "run", "counts", "identity")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in new}))


def infect(checkpoint: Path, made: Path) -> None:
    """Puts a pickle that runs a command in the place of each rank's file, and makes the manifest agree."""
    for file in checkpoint.glob("*.safetensors"):
        torch.save({"evil": Evil(made)}, file)
    seal_again(checkpoint)


class Launch:
    """All cases of one number of ranks, and what the launch printed."""

    def __init__(self, place: Path, ranks: int):
        self.place, self.ranks = place, ranks
        tiny.make("llama", place / "llama")
        (place / "config.json").write_text(json.dumps({"zero_optimization": {"stage": STAGES[ranks]}}))
        first = [{"argv": argv(place, "base")}, {"argv": argv(place, "other", "--seed=7")}]
        launching.run_scenarios(ranks, first, place / "first.json")
        self.damaged: dict[str, dict[str, str]] = {}
        scenarios = [*self._damaged(), *self._named(), *self._merged(), *self._records(), *self._failing()]
        scenarios += self._absurd()
        self.output = launching.run_scenarios(ranks, scenarios, place / "second.json")

    def _damaged(self):
        for name, (harm, _, counts) in DAMAGE.items():
            if self.ranks in counts:
                checkpoint = copied(self.place, name)
                harm(checkpoint)
                self.damaged[name] = digests(checkpoint)
                yield {"argv": argv(self.place, name)}

    def _named(self):
        checkpoint = copied(self.place, "run.partial")
        yield {"argv": argv(self.place, "run.partial")}
        checkpoint = copied(self.place, "backup")
        checkpoint.rename(checkpoint.with_suffix(".bak"))
        yield {"argv": argv(self.place, "backup")}
        as_an_old_version(copied(self.place, "old"))
        yield {"argv": argv(self.place, "old")}

    def _merged(self):
        copied(self.place, "finished", finished=True)
        yield {"argv": argv(self.place, "finished")}
        for name, (harm, _) in MERGED.items():
            copied(self.place, name, finished=True)
            harm(self.place / name / "merged")
            yield {"argv": argv(self.place, name)}

    def _records(self):
        """All records of a run, and all that it finds in the cache. Its checkpoint is whole."""
        folder = copied(self.place, "records").parents[1]
        edit_seed(folder / "run.json")
        edit_seed(folder / "options.yaml")
        flip(folder / "metrics.jsonl")
        cache = shutil.copytree(self.place / "cache", self.place / "damaged-cache")
        for file in (*cache.glob("reference/*/logps.npy"), *cache.rglob("answers.npy")):
            flip(file)
        yield {"argv": argv(self.place, "records", f"--cache_dir={cache}")}
        folder = copied(self.place, "gone").parents[1]
        for name in ("run.json", "options.yaml", "metrics.jsonl"):
            (folder / name).unlink()
        yield {"argv": argv(self.place, "gone")}
        folder = copied(self.place, "full-record").parents[1]
        shutil.rmtree(folder / "checkpoints")
        # From step 3 to step 5, rank 0 can write no file. The checkpoint of step 4 cannot be written either.
        yield {"argv": argv(self.place, "full-record"), "file_limit": [0, 3, 5, 0]}

    def _absurd(self):
        for name, rate in ABSURD.items():
            yield {"argv": argv(self.place, name, f"--learning_rate={rate}", "--warmup_ratio=0"), "fails": True}
            yield {"argv": argv(self.place, name)}

    def _failing(self):
        limit = [self.ranks - 1, 3, 5, 30_000]  # the last rank's checkpoint of step 4 cannot be written
        yield {"argv": argv(self.place, "kept", "--keep_last=1"), "file_limit": limit}
        stopped = argv(self.place, "stopped", "--on_save_error=stop")
        yield {"argv": stopped, "file_limit": limit, "fails": True}
        yield {"argv": stopped}
        unsaved = argv(self.place, "unsaved", "--export=none")
        yield {"argv": unsaved, "file_limit": [0, 5, 9, 30_000], "fails": True}
        for checkpoint in copied(self.place, "hopeless").parent.iterdir():
            flip(rank_file(checkpoint))
        yield {"argv": argv(self.place, "hopeless"), "fails": True}
        hopeless = self.place / "hopeless" / "checkpoints" / "step-000004"
        yield {"argv": argv(self.place, "elsewhere", f"--resume={hopeless}"), "fails": True}
        infect(copied(self.place, "evil"), self.place / "made")
        yield {"argv": argv(self.place, "evil"), "fails": True}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    made: dict[int, Launch] = {}

    def launch(ranks: int) -> Launch:
        if ranks not in made:
            made[ranks] = Launch(tmp_path_factory.mktemp(f"damage-{ranks}"), ranks)
        return made[ranks]

    return launch


def assert_as_base(place: Path, name: str) -> None:
    """The run ended bit for bit where the undisturbed one did, and its record has the same lines."""
    base, ended = (load_file(place / run / "merged" / "model.safetensors") for run in ("base", name))
    assert all(torch.equal(ended[key], tensor) for key, tensor in base.items()) and base.keys() == ended.keys()
    assert launching.untimed(place / "base") == launching.untimed(place / name)


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(name, ranks, launches):
    launch = launches(ranks)
    checkpoint = launch.place / name / "checkpoints" / f"step-{STEPS:06d}"
    said = [line for line in launch.output.splitlines() if f"{checkpoint} cannot be used: " in line]
    assert len(said) == 1 and DAMAGE[name][1] in said[0], said
    assert f"{checkpoint.with_name('step-000004')} is whole: " in launch.output
    assert digests(checkpoint.with_name(f"{checkpoint.name}.damaged")) == launch.damaged[name]
    assert folders.damage(checkpoint, None) is None, "the step's checkpoint was saved again"
    assert_as_base(launch.place, name)


@BOTH
def test_only_the_runs_own_names_are_checkpoints(ranks, launches):
    launch = launches(ranks)
    assert f"from {launch.place}/run.partial/checkpoints/step-000006 ->" in launch.output
    assert f"from {launch.place}/backup/checkpoints/step-000004 ->" in launch.output
    assert (launch.place / "backup" / "checkpoints" / "step-000006.bak").is_dir()
    for name in ("run.partial", "backup"):
        assert_as_base(launch.place, name)


@BOTH
def test_a_checkpoint_of_another_version_is_named_and_kept(ranks, launches):
    launch = launches(ranks)
    old = launch.place / "old" / "checkpoints" / "step-000006"
    assert f"{old} cannot be used: checkpoint.json has no counts: another version of dpo_ds wrote it" in launch.output
    assert old.with_name("step-000006.damaged").is_dir()
    assert_as_base(launch.place, "old")


@BOTH
def test_a_finished_run_exports_again_what_is_missing_or_damaged(ranks, launches):
    launch = launches(ranks)
    assert f"this run is finished in {launch.place / 'finished'}: nothing to do" in launch.output
    for name, (_, reason) in MERGED.items():
        assert f"this run is finished, but {launch.place / name}/{reason}: it is exported again" in launch.output
        assert_as_base(launch.place, name)
        # The doctor's figures are of all the answers that any run has scored by now.
        before, after = (json.loads((launch.place / run / "summary.json").read_text()) for run in ("base", name))
        assert before | {"findings": None} == after | {"findings": None}
        assert (launch.place / name / "merged.damaged").exists() == (name != "merged-deleted")


@BOTH
def test_a_runs_records_and_its_cache_are_named_and_made_again(ranks, launches):
    launch = launches(ranks)
    folder, cache = launch.place / "records", launch.place / "damaged-cache"
    checkpoint = folder / "checkpoints" / "step-000006"
    for said in (
        f"{folder}/run.json is damaged (it does not match its own checksum): the copy in {checkpoint} is taken",
        f"{folder}/metrics.jsonl is damaged (",
        f": its lines are taken from {checkpoint}",
        f"the tokenised pairs in {cache}/",
        f"the reference table {cache}/reference/",
    ):
        assert said in launch.output
    gone = launch.place / "gone"
    assert f"{gone}/run.json is damaged (missing): the copy in" in launch.output
    assert f"{gone}/metrics.jsonl is damaged (" in launch.output
    for name in ("records", "gone"):
        assert_as_base(launch.place, name)
        assert parse_options(["--config", str(launch.place / name / "options.yaml")]).seed == 42


@BOTH
def test_a_record_that_cannot_be_written_ends_no_run_and_loses_no_line(ranks, launches):
    launch = launches(ranks)
    file = launch.place / "full-record" / "metrics.jsonl"
    assert f"{file} cannot be written: File too large; the run goes on" in launch.output
    assert f"{file} is written again; 3 lines had waited" in launch.output
    assert_as_base(launch.place, "full-record")


@BOTH
@pytest.mark.parametrize("name", ABSURD)
def test_figures_without_sense_stop_a_run_before_it_saves_and_the_remedy_works(name, ranks, launches):
    launch = launches(ranks)
    folder = launch.place / name
    (said,) = [line for line in launch.output.splitlines() if "Nonsense: " in line and f"{folder}/stopped" in line]
    assert "nothing more is saved; lower --learning_rate" in said
    assert not (folder / "stopped" / "checkpoints").exists() and not (folder / "stopped" / "merged").exists()
    assert f"the run in {folder} was stopped by its own figures: its files are now in {folder}/stopped" in launch.output
    assert_as_base(launch.place, name)


@BOTH
def test_a_save_that_fails_leaves_the_others_and_training_goes_on(ranks, launches):
    launch = launches(ranks)
    kept = launch.place / "kept"
    assert f"{kept / 'checkpoints' / 'step-000004'} was not saved: " in launch.output
    assert "training goes on, and the next checkpoint is tried when it is due" in launch.output
    assert [path.name for path in (kept / "checkpoints").iterdir()] == ["step-000006"], "--keep_last 1"
    assert_as_base(launch.place, "kept")


@BOTH
def test_a_save_that_fails_stops_the_run_if_it_is_to(ranks, launches):
    launch = launches(ranks)
    stopped = launch.place / "stopped" / "checkpoints"
    lines = [line for line in launch.output.splitlines() if "SaveFailed: " in line]
    assert len(lines) == 2 and f"{stopped / 'step-000004'} was not saved: " in lines[0]
    assert f"from {stopped / 'step-000002'} ->" in launch.output
    assert_as_base(launch.place, "stopped")
    unsaved = launch.place / "unsaved"
    assert f"{unsaved}/checkpoints/step-000006 was not saved: " in lines[1], "nothing else would keep the weights"
    assert not (unsaved / "summary.json").exists()


@BOTH
def test_nothing_is_begun_again_in_silence(ranks, launches):
    launch = launches(ranks)
    place = launch.place / "hopeless" / "checkpoints"
    assert f"UserError: no checkpoint in {place} can be used (step-000006: " in launch.output
    assert sorted(path.name for path in place.iterdir()) == ["step-000002", "step-000004", "step-000006"]
    unusable = f"UserError: --resume {place}/step-000004 is no checkpoint that can be used (state-0.safetensors "
    assert unusable in launch.output
    assert not (launch.place / "elsewhere").exists()


@BOTH
def test_a_pickle_that_runs_code_is_refused_and_not_executed(ranks, launches):
    launch = launches(ranks)
    refused = [line for line in launch.output.splitlines() if "UserError: " in line and "is damaged" in line]
    assert len(refused) == 1, refused
    assert not (launch.place / "made").exists()
    with open(rank_file(launch.place / "evil" / "checkpoints" / "step-000006"), "rb") as infected:
        torch.load(infected, weights_only=False)
    assert (launch.place / "made").exists(), "the pickle does nothing: the test shows nothing"


def test_the_export_command_refuses_a_damaged_checkpoint(launches):
    place = launches(1).place
    checkpoint = place / "hopeless" / "checkpoints" / "step-000004"
    done = launching.run(1, "-m", "dpo_ds.export", f"--checkpoint={checkpoint}", f"--output_dir={place / 'exported'}",
                         check=False)  # fmt: skip
    assert done.returncode == 2 and f"--checkpoint {checkpoint} is no checkpoint that can be used (" in done.stdout
    assert not (place / "exported").exists()


@pytest.fixture
def disk(tmp_path):
    """Returns a function that makes a file system of so many bytes."""
    mounted = []

    def make(size: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode != 0:
            pytest.skip("no file system can be mounted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_noticed_before_a_save_and_within_it(disk, launches):
    """The run's checkpoints are on a small disk. There is room for none more, or for a little less than one."""
    place, scenarios = launches(1).place, []
    size = sum(file.stat().st_size for file in (place / "base/checkpoints/step-000002").rglob("*"))
    for name, free in (("full", 100_000), ("nearly-full", size - 55_000)):
        checkpoints = copied(place, name).parent
        small = disk(size + 40_000 + free) / "checkpoints"
        shutil.copytree(checkpoints / "step-000002", small / "step-000002")
        shutil.rmtree(checkpoints)
        checkpoints.symlink_to(small)
        scenarios.append({"argv": argv(place, name)})
    output = launching.run_scenarios(1, scenarios, place / "disks.json")
    for name, reason in (("full", "was not saved: it takes about 1.6"), ("nearly-full", "No space left on device")):
        said = [line for line in output.splitlines() if f"{place / name}/checkpoints/step-" in line and reason in line]
        assert len(said) == 2, output[-5000:]
        assert [path.name for path in (place / name / "checkpoints").iterdir()] == ["step-000002"]
        assert_as_base(place, name)


# KiB on the disk: room for nothing, half of the claim, the claim, all but a second checkpoint and the export.
RUNS = (0, 8, 16, 2_000)
CACHES = (0, 100)  # likewise: nothing; some files


def test_a_full_disk_at_any_instant_is_named_and_the_same_command_recovers(disk, launches):
    place = launches(1).place
    full = {f"run-of-{size}": disk(1024 * max(size, 4)) for size in RUNS}
    full |= {f"cache-of-{size}": disk(1024 * max(size, 4)) for size in CACHES}
    (full["run-of-0"] / "filler").write_bytes(bytes(4096))
    (full["cache-of-0"] / "filler").write_bytes(bytes(4096))
    scenarios = []
    for name, small in full.items():
        output, cache = (small / "run", place / "cache") if "run" in name else (place / name, small / "cache")
        more = f"--output_dir={output}", f"--cache_dir={cache}", "--keep_last=1"
        scenarios.append({"argv": argv(place, name, *more)})
    output = launching.run_scenarios(1, [{**s, "fails": True} for s in scenarios], place / "small.json")
    for name, small in full.items():
        said = [line for line in output.splitlines() if f"{small}/" in line and "; free some space there" in line]
        assert len(said) == 1 and "No space left on device" in said[0], (name, output[-5000:])
        assert said[0].startswith(("dpo_ds: UserError: ", "dpo_ds: RunStopped: "))
        subprocess.run(["mount", "-o", "remount,size=64M", small], check=True)
    launching.run_scenarios(1, scenarios, place / "larger.json")
    for name, small in full.items():
        if "run" in name:
            (place / name).symlink_to(small / "run")
        assert_as_base(place, name)


def test_the_second_start_of_a_run_is_refused(launches):
    place = launches(1).place
    words = ["-m", "dpo_ds.train", *argv(place, "twice", "--max_steps=100000")]
    seen: list[subprocess.CompletedProcess] = []
    process = subprocess.Popen(launching.command(1, *words), env=launching.environment(), stdout=subprocess.DEVNULL)
    try:
        while not (place / "twice" / "metrics.jsonl").is_file():
            assert process.poll() is None
            time.sleep(0.1)
        seen.append(launching.run(1, *words, check=False))
    finally:
        process.kill()
        process.wait()
    owner = json.loads((place / "twice" / "running.json").read_text())
    assert owner["process"] == process.pid and seen[0].returncode == 2
    assert f"is in use by process {process.pid} on {owner['host']} since {owner['since']}" in seen[0].stdout
    Lock(place / "twice").require_free()  # a killed process holds nothing
