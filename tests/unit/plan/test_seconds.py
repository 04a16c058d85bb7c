"""How long a run takes by its plan: each part against arithmetic by hand, and what the choice makes of it."""

import dataclasses
import json
import re

import pytest
import torch
from transformers import MixtralConfig

from dpo_ds.config import parse_options
from dpo_ds.engine.tiers import load_tier
from dpo_ds.errors import UserError
from dpo_ds.models.find import known_model
from dpo_ds.plan import seconds, speeds
from dpo_ds.plan.activations import Counter, LiveBytes
from dpo_ds.plan.choose import GAIN, choose
from dpo_ds.plan.machine import GIB, Machine
from dpo_ds.plan.plan import Plan
from dpo_ds.plan.refuse import described
from dpo_ds.reports.progress import Progress
from dpo_ds.scoring.head import LogitBudget

LLAMA_70B, LLAMA_8B = "meta-llama/Meta-Llama-3-70B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"


def planned(*words: str, **speed: float) -> Plan:
    """The plan of these options; `speed` changes the machine's."""
    options = parse_options([*words, "--gpus", "8", "--host_memory", "1000"])
    machine = Machine.of(options)
    assert machine.speeds is not None
    changed = dataclasses.replace(machine.speeds, **speed)
    return choose(options, dataclasses.replace(machine, speeds=changed))


def found(*words: str, **speed: float) -> seconds.Estimate:
    estimate = seconds.estimate(planned(*words, **speed))
    assert estimate is not None
    return estimate


def test_a_steps_products_and_update_by_hand():
    """32 pairs of 1,023 tokens: six FLOPs for each token and weight of the body, two more for what is recomputed."""
    estimate = found("--model", LLAMA_70B, "--machine", "a100-80")
    step, tokens = estimate.step(), 4 * 1023
    embeddings = 2 * 128256 * 8192
    body = (estimate.model.parameters - embeddings) * 6 * tokens
    reached = speeds.PRODUCTS * 312e12
    # The head's products, for responses alone, and attention come on top.
    assert 1.005 < step.products * reached / body < 1.03
    head = 128256 * 8192 * 2 * 0.75 * tokens  # of responses, three quarters of the pairs
    assert step.recomputed * reached == pytest.approx(body / 3 + head, rel=0.02)
    adam = estimate.model.parameters * 30 / (speeds.HOST_MEMORY * 409.6e9)
    assert step.optimizer == pytest.approx(adam, rel=1e-3)
    assert step.seconds == sum(dataclasses.astuple(step))


def test_bytes_of_a_layer_are_those_that_its_operations_move():
    device = torch.device("meta")
    a, b = (torch.empty(64, 32, device=device) for _ in range(2))
    with LiveBytes([a, b]) as live:
        a + b
        assert live.moved == 3 * a.nbytes
        a.view(32, 64).t()
        a @ b.t()  # counted as FLOPs
        assert live.moved == 3 * a.nbytes
        a.mul_(2)
        assert live.moved == 5 * a.nbytes


def test_a_layer_of_8b_is_as_others_have_measured_it():
    """shared/notes/gpu.md: norms, activation function, rotation and sums of a layer take 12.4 ms for 16k tokens on an
    H100 without recomputation, 37% to 40% of its peak are reached with it, and 49% to 53% without."""
    model = known_model(LLAMA_8B, False)
    options = parse_options(["--model", LLAMA_8B])
    counter = Counter(model.config, options, torch.bfloat16, experts=False)
    kept, again = (counter.count(16384, 1024, recompute, LogitBudget.on(80 * GIB)) for recompute in (False, True))
    h100 = speeds.named("h100")
    assert kept.moved / h100.gpu_memory == pytest.approx(12.4e-3, rel=0.1)
    layer = 6 * 16384 * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336))
    for moved, factor, low, high in ((kept.moved, 1, 0.49, 0.53), (again.moved, 4 / 3, 0.365, 0.4)):
        taken = factor * layer / h100.products + moved / h100.gpu_memory
        assert low < layer / taken / 989e12 < high


def test_a_slow_link_is_waited_for():
    words = ("--model", LLAMA_70B, "--machine", "a100-80")
    fast, slow = found(*words).step(), found(*words, between_gpus=1e9).step()
    assert fast.waiting == 0 and slow.waiting > 200
    gathered = 3 * 2 * 70.55e9 + 2 * 70.55e9  # forward, recomputation, backward; the gradients
    assert slow.waiting + slow.products + slow.recomputed + slow.element_wise == pytest.approx(
        gathered * 7 / 8 / 1e9, rel=1e-2
    )
    one = found(*words, host_memory=1e9).step()
    assert one.optimizer > 100 * fast.optimizer and one.products == fast.products


def test_smaller_micro_batches_that_recompute_less_are_taken_where_they_are_faster():
    words = ("--model", LLAMA_70B, "--machine", "h100", "--lora")
    chosen = planned(*words)
    (reason,) = chosen.reasons
    assert "fit as well, but recompute" in reason and reason in chosen.as_markdown()
    tokens, layers = re.search(r"of (\d+) tokens fit as well, but recompute (\d+) layers", reason).groups()
    largest = planned(*words, "--micro_batch_tokens", tokens, "--recomputed_layers", layers)
    assert chosen.fits and largest.fits and chosen.options.micro_batch_tokens < int(tokens)
    assert chosen.options.recomputed_layers < int(layers)
    assert seconds.of_step(largest) > GAIN * seconds.of_step(chosen)
    # Where weights arrive slowly, each micro-batch costs a gather.
    slow = planned(*words, between_gpus=1e9)
    assert slow.options.micro_batch_tokens > chosen.options.micro_batch_tokens


def test_tiers_that_do_not_fit_are_named():
    chosen = planned("--model", LLAMA_70B, "--machine", "a100-80")
    assert any("zero3_standard would need" in reason and "of GPU memory" in reason for reason in chosen.reasons)


def test_cost_hours_and_parts():
    text = described(planned("--model", LLAMA_70B, "--machine", "a100-80", "--price_per_gpu_hour", "2.5"))
    line = text.splitlines()[-1]
    estimate = found("--model", LLAMA_70B, "--machine", "a100-80")
    parts = estimate.run(seconds.SHOWN_PAIRS)
    hours = 8 * sum(parts.values()) / 3600
    assert f"{hours:,.3g} GPU-hours, {2.5 * hours:,.2f} at 2.5 each" in line and "313 steps" in line
    assert parts["training"] == 313 * estimate.step().seconds
    assert parts["checkpoints"] == estimate.checkpoint, "the last one, in any case"
    assert parts["evaluations"] == pytest.approx(12 * 500 / 32 * estimate.reference, rel=0.1)
    short = found("--model", LLAMA_70B, "--machine", "a100-80", "--max_steps", "10")
    assert short.run(10_000)["the reference"] == 10 * short.reference and "320 pairs, 10 steps" in seconds.of_pairs(
        short, 10_000
    )
    passes = estimate.step().seconds - estimate.step().optimizer
    assert parts["the reference"] == pytest.approx(313 * passes / 4, rel=0.06), "one pass of four"
    reads = ("--model", LLAMA_70B, "--machine", "a100-80", "--loss", "simpo")
    assert found(*reads).run(1000)["the reference"] == 0
    assert "Each GPU sends 35.3 GB to the host in a step, and gets 17.6 GB." in text


def test_speeds_by_the_name_the_driver_or_the_memory():
    assert speeds.of_device("NVIDIA A100-SXM4-40GB").name == "a100-40"
    assert speeds.of_device("NVIDIA A100 80GB PCIe").name == "a100-80-pcie"
    assert speeds.of_device("NVIDIA H100 80GB HBM3").name == "h100"
    assert speeds.of_device("NVIDIA H100 PCIe").name == "h100-pcie"
    assert speeds.of_device("NVIDIA H200").name == "h200"
    for other in ("GeForce RTX 4090", "GH200 480GB", "H100 NVL", "H100 80GB HBM3 MIG 1g.10gb"):
        assert speeds.of_device(f"NVIDIA {other}") is None
    assert Machine.of(parse_options(["--model", "gpt2", "--gpu_memory", "40"])).speeds.name == "a100-40"
    assert Machine.of(parse_options(["--model", "gpt2", "--gpu_memory", "24"])).speeds is None
    h200 = Machine.of(parse_options(["--model", "gpt2", "--machine", "h200"]))
    assert h200.gpu_memory == 140 * GIB and h200.speeds.products == speeds.PRODUCTS * 989e12
    with pytest.raises(UserError, match="--machine h10 is not known: did you mean h100"):
        Machine.of(parse_options(["--model", "gpt2", "--machine", "h10"]))


def test_pairs_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="--pair_tokens 300: no pair is longer than 199 tokens"):
        planned("--model", LLAMA_8B, "--machine", "h100", "--max_length", "100", "--pair_tokens", "300")


def test_weights_on_the_host_are_waited_for(tmp_path):
    """Offloaded weights cross the link in each micro-batch, with gradients on the GPU as well."""
    config = load_tier("zero3_offload_large")
    config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    (tmp_path / "own.json").write_text(json.dumps(config))
    words = ("--model", LLAMA_70B, "--machine", "a100-80", "--ds_config", str(tmp_path / "own.json"))
    estimate = found(*words, to_host=1e9)
    assert estimate.options.gradients == "gpu"
    share = estimate.footprint.share
    step = estimate.step()
    travelling = step.waiting + step.products + step.recomputed + step.element_wise
    assert travelling == pytest.approx(2 * 2 * share * estimate.micro_batches / 1e9, rel=1e-6)


def test_without_speeds_nothing_is_estimated():
    plan = choose(parse_options(["--model", "gpt2"]), Machine(1, 1, None, 64 * GIB))
    assert seconds.estimate(plan) is None and described(plan) == plan.as_markdown()
    other = choose(parse_options(["--model", "gpt2"]), Machine(1, 1, 24 * GIB, 64 * GIB))
    assert "name one with --machine" in described(other) and set(seconds.facts(other).values()) == {None}
    refused = planned("--model", LLAMA_70B, "--machine", "a100-80", "--ds_config", "zero3_standard")
    assert not refused.fits and seconds.facts(refused) == seconds.facts(other), "no hours for what cannot run"


def test_weights_on_a_drive_are_read_in_each_pass():
    words = ("--model", LLAMA_70B, "--machine", "a100-80", "--ds_config", "zero3_nvme_large", "--nvme", "4000")
    estimate = found(*words)
    weights = 2 * estimate.model.parameters / 5e9
    step = estimate.step()
    passes = step.waiting + step.products + step.recomputed + step.element_wise
    assert passes == pytest.approx(2 * estimate.micro_batches * weights, rel=1e-3)
    tokens = estimate.options.micro_batch_tokens
    small = found(*words, "--scoring_tokens", str(tokens), "--micro_batch_tokens", str(tokens))
    assert small.reference == pytest.approx(small.tokens / tokens * weights, rel=1e-3)
    assert estimate.reference < small.reference / 4, "larger micro-batches read the weights less often"
    assert step.optimizer == pytest.approx(2 * 16 * estimate.model.parameters / 5e9, rel=1e-3)


def test_experts_products_are_no_bytes():
    """Four times as many experts have four times the weights, but a token still goes through two."""
    moved = []
    for experts in (4, 16):
        config = MixtralConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, num_local_experts=experts, num_experts_per_tok=2,
        )  # fmt: skip
        counter = Counter(config, parse_options(["--model", "gpt2"]), torch.bfloat16, experts=True)
        moved.append(counter.count(2048, 256, False, LogitBudget.on(80 * GIB)).moved)
    assert moved[1] == pytest.approx(moved[0], rel=0.01)


@pytest.mark.parametrize("words", [["--pair_tokens=3"], ["--max_length=2", "--global_batch_pairs=1"], ["--plan=off"]])
def test_odd_sizes_are_estimated(words):
    assert found("--model", "gpt2", "--machine", "h100", "--global_batch_pairs", "8", *words).step().seconds > 0


def test_measuring_is_for_training_alone():
    with pytest.raises(UserError, match=r"--plan measure is for dpo_ds\.train, and dpo_ds\.evaluate was called"):
        parse_options(["--model", "gpt2", "--plan", "measure"], "evaluate")


def test_progress_compares_with_the_plan(capsys, monkeypatch):
    monkeypatch.setattr("dpo_ds.reports.progress.LOG_SECONDS", -1)
    for expected in (None, 12.0):
        progress = Progress(expected)
        progress.starting(0, 9)
        for step in (1, 2):
            progress.step_begins(step)
            progress.step_ended({"step": step, "loss": 0.7, "rewards/accuracies": 0.5, "pairs/s": 3.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("by the plan" not in line for line in lines[:3])
    assert "s a step (12 s by the plan)" in lines[3]
