"""The ranks of a run: work in a process of its own, and whose cores are whose."""

import json
import os
import signal
import sys

import launching
import pytest

from dpo_ds import world


def test_a_childs_result_comes_back_and_what_it_imported_does_not():
    def work():
        import colorsys

        return os.getpid(), colorsys.__name__

    sys.modules.pop("colorsys", None)
    child, found = world.in_a_child("work", work)
    assert child != os.getpid() and found == "colorsys" and "colorsys" not in sys.modules


def test_what_a_child_refuses_is_refused_here():
    def work():
        raise FileNotFoundError("no such\nfile: there")

    with pytest.raises(ValueError, match="no such file: there; name a place that can be read and written"):
        world.in_a_child("work", work)


@pytest.mark.parametrize(
    ("end", "code"), [(lambda: os.kill(os.getpid(), signal.SIGKILL), "-9"), (lambda: 1 / 0, "1")], ids=["killed", "bug"]
)
def test_a_child_that_ends_otherwise_stops_the_run(end, code, capfd):
    with pytest.raises(world.RunStopped, match=f"work: its process ended with exit code {code} "):
        world.in_a_child("work", end)
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (code == "1")


PROBE = """
import json, os, sys, torch
from pathlib import Path
from dpo_ds import world
if "bound" in sys.argv:  # as `deepspeed --bind_cores_to_rank` does
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"])]})
here = world.join()
found = {"own": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
found["child"] = world.in_a_child("look", lambda: sorted(os.sched_getaffinity(0)))
Path(__file__).with_name(f"{here.rank}.json").write_text(json.dumps(found))
world.leave()
"""


def cores_of(place, ranks: int, *words: str) -> list[dict]:
    script = place / "probe.py"
    script.write_text(PROBE)
    launching.run(ranks, script, *words)
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_ranks_take_cores_of_their_own_and_a_child_has_them_all(tmp_path):
    everything = sorted(os.sched_getaffinity(0))
    first, second = cores_of(tmp_path, 2)
    half = len(everything) // 2
    assert (first["own"], second["own"]) == (everything[:half], everything[half : 2 * half])
    assert [r["threads"] for r in (first, second)] == [half, half]
    assert [r["child"] for r in (first, second)] == [everything, everything]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_what_a_launcher_has_bound_stays(tmp_path):
    everything = sorted(os.sched_getaffinity(0))
    found = cores_of(tmp_path, 2, "bound")
    assert [r["own"] for r in found] == [[everything[0]], [everything[1]]]
    assert [r["threads"] for r in found] == [1, 1]


def test_a_rank_alone_keeps_every_core(tmp_path):
    everything = sorted(os.sched_getaffinity(0))
    (found,) = cores_of(tmp_path, 1)
    assert found == {"own": everything, "threads": len(everything), "child": everything}
