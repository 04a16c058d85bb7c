"""Engines: memory that really comes back, bf16's first step at stage 0, the largest weight of padded partitions."""

import json
import subprocess
import sys

import launching
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

PROBE = """
import json, sys, numpy as np, torch
from memory import resident
from pathlib import Path
from dpo_ds.engine import join
join.join()
from dpo_ds.config import parse_options
from dpo_ds.engine.build import policy_engine
from dpo_ds.engine.build import reference_engine
from dpo_ds.data.pairs import Group
from dpo_ds.scoring.packed import pack
from dpo_ds.models.find import find_model
from dpo_ds.engine.tiers import fill_tier

folder, stage, precision = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tier = folder / f"stage{stage}.json"
tier.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
options = parse_options(
    ["--model", str(folder), "--precision", precision, "--warmup_ratio", "0", "--learning_rate", "1e-3"]
)
config = fill_tier(str(tier), options, find_model(str(folder)), ranks=1, on_gpu=False)
generator = np.random.default_rng(0)
batch = pack([Group.of_pair(*(generator.integers(0, 900, n).astype(np.int32) for n in (17, 7, 12)))])
sizes = []

def reference():
    engine = reference_engine(folder, config, options, "sdpa")
    engine.score(batch)
    return engine

def policy():
    engine = policy_engine(folder, config, options, "sdpa", total_steps=10)
    logps = engine(batch).answers
    before = {n: p.detach().float().clone() for n, p in engine.model.named_parameters() if p.dim() > 1}
    engine.backward((logps[0] - logps[1]), True)
    engine.step()
    if stage == 0:
        moved = {n: (p.detach().float() - before[n]).abs() for n, p in engine.model.named_parameters() if n in before}
        global update
        update = torch.cat([m[m > 0].flatten() for m in moved.values()]).median().item()
    return engine

update = None
for build in (reference, reference, policy, reference):
    before = resident()
    engine = build()
    during = resident()
    engine.close()
    del engine
    sizes.append([size / 1e6 for size in (before, during, resident())])
print("RESULT", json.dumps([sizes, update, "torch._inductor.compile_fx" in sys.modules]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """51 M parameters: 204 MB of fp32 weights, far above the noise of an interpreter's memory."""
    folder = tmp_path_factory.mktemp("engines")
    config = LlamaConfig(
        vocab_size=1024, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (3, "fp32")])
def test_a_closed_engine_gives_its_memory_back(folder, stage, precision):
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, folder, str(stage), precision],
        # One heap: with one for every thread, the C library keeps a changing part of what has been freed for later use.
        env={**launching.environment(), "MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True,
        timeout=launching.HANGS,
    )  # fmt: skip
    assert probe.returncode == 0, probe.stderr[-3000:]
    (line,) = [line for line in probe.stdout.splitlines() if line.startswith("RESULT")]
    sizes, update, compiler = json.loads(line.removeprefix("RESULT "))
    weights = 100 if precision == "bf16" else 200
    assert not compiler, "Muon, which nobody uses, has imported torch's compiler"
    for before, during, after in sizes[1:]:  # the first one also pays for what stays: code, thread pools
        assert during - before > 0.5 * weights, "the engine held its weights"
        assert after - before < 0.15 * (during - before), f"{after - before:.0f} MB stayed of {during - before:.0f}"
    if stage == 0:
        # Adam's first update is the learning rate, whatever the gradient: a state that has already counted a step
        # (as DeepSpeed leaves it) would make it 0.74e-3.
        assert update == pytest.approx(1e-3, rel=0.1)


PADDED = """
import json, sys, torch
from pathlib import Path
from dpo_ds.engine import join
join.join()
from dpo_ds.config import parse_options
from dpo_ds.engine.build import reference_engine
from dpo_ds.engine.tiers import fill_tier
from dpo_ds.models.find import find_model

torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that nobody has written with NaN
folder = Path(sys.argv[1])
tier = folder / "stage3.json"
options = parse_options(["--model", str(folder), "--precision", "fp32", "--learning_rate", "1e-3"])
config = fill_tier(str(tier), options, find_model(str(folder)), ranks=2, on_gpu=False)
engine = reference_engine(folder, config, options, "sdpa")
padded = [n for n, p in engine.model.named_parameters() if p.ds_tensor.isnan().any()]
print("RESULT", json.dumps([engine.largest_weight(), padded]), flush=True)
"""


def test_the_largest_weight_is_a_weight(tmp_path):
    """ZeRO-3 leaves the end of the last rank's partition unwritten where a parameter's size is odd."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=33, head_dim=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "stage3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (tmp_path / "padded.py").write_text(PADDED)
    out = launching.run(2, tmp_path / "padded.py", tmp_path).stdout
    found = [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT")]
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    assert [each[0] for each in found] == [largest, largest]
    assert sum(len(each[1]) for each in found) == 3, "the last rank's part of every norm is padded"
