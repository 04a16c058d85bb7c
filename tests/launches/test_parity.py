"""Losses that TRL has too, where TRL is installed (the extra `bench`): benchmarks/parity_trl.py, in a reduced form."""

import importlib.util
import json
import sys

import launching
import pytest

CASES = ("sigmoid", "ipo", "aot", "sum")  # of a pair, of means over tokens, of the whole step, and two losses

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install .[bench]")


def test_losses_and_gradients_are_those_of_trl(tmp_path):
    """Full and LoRA, five steps each."""
    file = tmp_path / "found.json"
    script = launching.ROOT / "benchmarks" / "parity_trl.py"
    path = f"{launching.ROOT}:{':'.join(sys.path[1:])}"
    command = [sys.executable, str(script), *CASES, "--output", str(file)]
    launching.execute(command, env={**launching.environment(), "PYTHONPATH": path})
    runs = json.loads(file.read_text())["runs"]
    assert len(runs) == 2 * len(CASES)
    for name, found in runs.items():
        assert found["loss off by"] < 2e-5 and found["gradient norm off by"] < 2e-5, name
        assert len(set(found["losses"])) == 5, name
