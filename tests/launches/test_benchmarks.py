"""What the GPU scripts do, on what a CPU has: the same code at tiny shapes. (`SMALL=1 bash benchmarks/gpu_run.sh first`
runs all of them.)"""

import json
import sys

import launching
import pytest

BENCHMARKS = launching.ROOT / "benchmarks"


def measured(script: str, out, *words: str) -> dict:
    file = out / "found.json"
    command = [sys.executable, BENCHMARKS / f"{script}.py", "--small", "--output", file, *words]
    launching.execute([*map(str, command)], env=launching.environment())
    return json.loads(file.read_text())


def test_twins_and_the_head_are_checked_against_plain_forwards(tmp_path):
    models = ["gpt2", "mistralai/Mixtral-8x7B-Instruct-v0.1"]  # all twelve: test_models.py
    facts = measured("gpu_check", tmp_path, "--models", *models)
    for name in models:
        kinds = [(row["kernel"], row.get("dtype")) for row in facts["checks"] if row["model"] == name]
        assert kinds == [("sdpa", "torch.float32"), ("sdpa", "torch.bfloat16"), ("broken layout", None)], name
    assert all(row["passed"] for row in facts["checks"]) and facts["checks"][0]["model"] == "head"
    assert {row["kernel"] for row in facts["attention"]} == {"sdpa", "gather alone"}
    assert all(row["ms"] > 0 for row in facts["attention"] + facts["head"])
    assert facts["machine"]["torch"]


def test_the_bench_runs_and_says_what_failed(tmp_path):
    facts = measured("gpu_bench", tmp_path, "--sets", "hh", "long")
    (layers,) = facts["layers of 70B"]
    one, three = layers["measured"]["1 layers"], layers["measured"]["3 layers"]
    assert min(*one.values(), *three.values()) > 0
    # No more than the arithmetic: at this shape a layer takes less than the clock's noise on a busy machine.
    for part, of in (("layer", "step"), ("layer forward", "forward")):
        assert layers[part] == pytest.approx((three[of] - one[of]) / 2)
    rows = facts["against TRL"]
    assert [row["lengths"] for row in rows] == ["hh", "long"]
    for row in rows:
        assert row["ours"]["pairs/s"] > 0 and row["ours"]["losses"][0] == pytest.approx(0.693147, abs=1e-5)
        assert "pairs/s" in row["trl"] or "trl" in row["trl"]["failed"], "not installed with the tests"


def test_a_failure_costs_one_figure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import work

    results = work.Results(tmp_path / "found.json")
    results.attempt("rows", {"n": 1}, lambda: {"ms": 1 / 0})
    results.attempt("rows", {"n": 2}, lambda: {"ms": 2})
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows == [{"n": 1, "passed": False, "error": "ZeroDivisionError: division by zero"}, {"n": 2, "ms": 2}]


def test_the_prediction_for_eight_gpus_is_its_arithmetic():
    sys.path.insert(0, str(BENCHMARKS))
    from gpu_bench import predict

    # 70.55e9 parameters, a micro-batch of 8 pairs of 1,024 tokens at half of an H100's peak, recomputed: 8 FLOPs a
    # parameter and token in all, a quarter of them in the forward.
    whole = 8 * 70.55e9 * 8192 / (0.5 * 989e12)
    found = {
        "pairs": 8,
        "tokens": 8192,
        "layer": whole / 80,
        "rest": 0,
        "layer forward": whole / 4 / 80,
        "rest forward": 0,
    }
    told = predict(found, 989e12, 312e12)
    assert told["compute"] == pytest.approx(whole * 989 / 312)
    assert told["micro-batches a GPU"] == 2 and told["optimizer"] == pytest.approx(8.466 + 1.764, rel=1e-3)
    assert told["seconds a step"] == pytest.approx(2 * 1.25 * told["compute"] + told["optimizer"], rel=1e-6)
    slow_link = predict({**found, "layer": 0, "layer forward": 0}, 989e12, 312e12)
    assert slow_link["seconds a step"] == pytest.approx(2 * 4 / 3 * told["gathers"] + told["optimizer"])


def test_a_run_that_is_killed_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    """Two of the kills of benchmarks/kills.py, which runs 200; and it notices a result that differs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import kills

    name = "LoRA with dropout, 1 rank"
    *_, found = kills.harness(tmp_path / "kills", 2, seed=5, names=[name])
    assert (found["kills"], found["equal"]) == (2, found["runs"]), found
    assert any(done["code"] != 0 for run in found["log"] for done in run["disturbances"]), "nothing was disturbed"
    monkeypatch.setattr(kills.Run, "lines", lambda run: [{"step": 1, "loss": float(len(run.folder.parent.name))}])
    a, b = (kills.Run(tmp_path / "kills", name, folder, None) for folder in ("a", "other"))
    assert kills.difference(a, b) == "metrics.jsonl differs"
