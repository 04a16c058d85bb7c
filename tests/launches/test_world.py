"""The ranks of a run: work in a process of its own, and whose cores are whose."""

import json
import os

import launching
import pytest

PROBE = """
import json, os, sys, torch
from pathlib import Path
from dpo_ds.engine import join
from dpo_ds.ranks import console, process
if "bound" in sys.argv:  # as `deepspeed --bind_cores_to_rank` does
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"])]})
here = join.join()
found = {"own": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
found["child"] = process.in_a_child("look", lambda: sorted(os.sched_getaffinity(0)), here.all_cores)
Path(__file__).with_name(f"{here.rank}.json").write_text(json.dumps(found))
console.leave()
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
