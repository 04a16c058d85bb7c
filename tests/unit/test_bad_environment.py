"""An environment in which a run cannot start: one line with the remedy, exit code 2, nothing written.

All cases run in one process that imports the libraries once (tests/tools/refusals.py).
"""

import json
import os
import shlex

import launching
import pytest
import tiny

from dpo_ds.ranks import world

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {**ALONE, "WORLD_SIZE": "2"}


def cases(place, port: int) -> dict[str, tuple[dict, str]]:
    """Each case, and words of its line. `place` is a folder whose name a shell must quote."""
    quoted = {name: shlex.quote(str(place / name)) for name in ("cache", "full", "shared")}
    sealed = "mount --bind {0} {0} && mount -o remount,ro,bind {0}"
    tiny_disk = f"mount -t tmpfs -o size={{0}} tmpfs {quoted['full']}"
    full = f"{tiny_disk.format('4k')} && head -c 4096 /dev/zero > {quoted['full']}/x"
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks |= {"LOCAL_WORLD_SIZE": "1"}
    shared = [f"--output_dir={place}/shared/run"]
    return {
        "RANK alone": ({"environment": {"RANK": "1"}}, "RANK is set in the environment, but WORLD_SIZE is not: start"),
        "WORLD_SIZE alone": ({"environment": {"WORLD_SIZE": "2"}}, "WORLD_SIZE is set in the environment, but RANK"),
        "RANK above WORLD_SIZE": ({"environment": {**TWO, "RANK": "5"}}, "RANK is 5, but must be below WORLD_SIZE"),
        "RANK in letters": ({"environment": {**TWO, "RANK": "zero"}}, "RANK is 'zero', but must be a whole number"),
        "a negative RANK": ({"environment": {**TWO, "RANK": "-1"}}, "RANK is '-1', but must be a whole number from 0"),
        "RANK empty": ({"environment": {**TWO, "RANK": ""}}, "RANK is '', but must be a whole number"),
        "WORLD_SIZE in letters": ({"environment": {**TWO, "WORLD_SIZE": "two"}}, "WORLD_SIZE is 'two'"),
        "WORLD_SIZE 0": ({"environment": {**TWO, "WORLD_SIZE": "0"}}, "WORLD_SIZE is '0', but must be a whole number"),
        "LOCAL_RANK in letters": ({"environment": {**TWO, "LOCAL_RANK": "x"}}, "LOCAL_RANK is 'x'"),
        "LOCAL_RANK above": ({"environment": {**TWO, "LOCAL_RANK": "2"}}, "LOCAL_RANK is 2, but must be below"),
        "LOCAL_WORLD_SIZE in letters": ({"environment": {**TWO, "LOCAL_WORLD_SIZE": "x"}}, "LOCAL_WORLD_SIZE is 'x'"),
        "LOCAL_WORLD_SIZE that does not divide": (
            {"environment": {**TWO, "LOCAL_WORLD_SIZE": "3"}}, "LOCAL_WORLD_SIZE is 3, but must divide"),
        "MASTER_PORT in letters": ({"environment": {**ALONE, "MASTER_PORT": "ssh"}}, "MASTER_PORT is 'ssh'"),
        "MASTER_PORT too high": ({"environment": {**ALONE, "MASTER_PORT": "70000"}}, "must be at most 65535"),
        "no MASTER_PORT": ({"environment": {**TWO, "MASTER_PORT": None}}, "MASTER_PORT does not say where rank 0"),
        "no MASTER_ADDR": ({"environment": {**TWO, "MASTER_ADDR": None}}, "MASTER_ADDR does not say where rank 0 is"),
        "MASTER_ADDR that nobody knows": (
            {"environment": {**TWO, "MASTER_ADDR": "nowhere.invalid"}}, "MASTER_ADDR is nowhere.invalid, which"),
        "MASTER_PORT that is taken": (
            {"environment": {**TWO, "MASTER_PORT": str(port)}, "port": port}, "is in use on"),
        "no ninja": ({"environment": {"PATH": "/nowhere"}}, "with ninja, which is not on PATH: run pip install ninja"),
        "no compiler": (
            {"environment": {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": f"{place}/new ops"}},
            "with /nowhere/c++, which is not installed: install g++"),
        "a compiler that fails": (
            {"environment": {"CXX": "/bin/false", "TORCH_EXTENSIONS_DIR": f"{place}/other ops"}},
            "cannot be compiled here with /bin/false"),
        "an ASCII locale": (
            {"locale": "ascii", "argv": ["--model=Modèle/日本"]}, r"--model Mod\xe8le/\u65e5\u672c is not a local"),
        "a limit of memory": (
            {"memory": 2**28, "argv": ["--model=gpt2", "--micro_batch_tokens=1000000"]}, "of host memory are missing"),
        "no TORCH_EXTENSIONS_DIR": ({"environment": {"TORCH_EXTENSIONS_DIR": "/proc/ops"}}, "TORCH_EXTENSIONS_DIR"),
        "ops that are built, but sealed": (
            {"mounts": [sealed.format(shlex.quote(os.environ["TORCH_EXTENSIONS_DIR"]))]},
            "cannot be written to: name a place that can be read and written"),
        "a cache that is warm, but sealed": (
            {"mounts": [sealed.format(quoted["cache"])]}, "cannot be written to; name a place that can be read"),
        "no space for the run": ({"mounts": [full], "argv": [f"--output_dir={place}/full/run"]},
                                 "No space left on device"),
        "no space for the cache": (
            {"mounts": [tiny_disk.format("16k")], "argv": [f"--cache_dir={place}/full/cache"]},
            "No space left on device"),
        "no space for the rows": (
            {"mounts": [tiny_disk.format("8k")], "argv": [f"--cache_dir={place}/new cache"],
             "environment": {"TMPDIR": f"{place}/full"}},
            "for the rows (No space left on device): set TMPDIR to a larger folder"),
        "a small /dev/shm": ({"mounts": ["mount -t tmpfs -o size=1m tmpfs /dev/shm"]},
                             "/dev/shm has 1.05 MB left, and 1 rank(s) need 69.2 MB there: make it larger"),
        "a folder that is not shared": (
            {"ranks": [
                {"environment": {**ranks, "RANK": "0"}, "argv": shared},
                {"environment": {**ranks, "RANK": "1"}, "argv": shared,
                 "mounts": [f"mount -t tmpfs tmpfs {quoted['shared']}"]},
            ]}, "than on rank 0's host: name one on a file system that all nodes share"),
    }  # fmt: skip


NAMES = list(cases(launching.ROOT, 0))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("it's bad")
    tiny.make("llama", place / "llama")
    for name in ("cache", "full", "shared"):
        (place / name).mkdir()
    port = launching.free_port()
    options = {"model": place / "llama", "dataset": "sample", "cache_dir": place / "cache"}
    options |= {"output_dir": place / "run", "max_length": 64, "precision": "fp32"}
    usual = [f"--{name}={value}" for name, value in options.items()]
    everything: dict = {"warm up": usual}
    for name, (case, _) in cases(place, port).items():
        if case.get("mounts") and os.geteuid() != 0:
            continue
        for each in case.get("ranks", [case]):
            each["argv"] = [*usual, *each.get("argv", [])]
        everything[name] = case
    (place / "cases.json").write_text(json.dumps(everything))
    launching.run(1, launching.TOOLS / "refusals.py", place / "cases.json", place / "results.json")
    return place, json.loads((place / "results.json").read_text())


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_an_environment_is_refused_in_one_line(name, results):
    place, found = results
    _, words = cases(place, 0)[name]
    if name not in found:
        pytest.skip("only root may mount")
    result = found[name]
    assert result["codes"] == [2] * len(result["codes"]), result
    line = next(line for line in result["said"][0].splitlines() if line.startswith("dpo_ds: error:"))
    assert result["said"][0].count("dpo_ds: error:") == 1 and "Traceback" not in result["said"][0], result
    assert words in line, line
    assert not (place / "run").exists() and not list((place / "shared").iterdir()), "nothing is written"


def test_a_launchers_variables_are_read(monkeypatch):
    for variable, value in {**TWO, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    assert world.from_environment() == world.World(1, 1, 2)
