"""What the plan chooses and refuses, for machines of many kinds."""

import json

import launching
import pytest
from deepspeed.runtime.zero import stage3

from dpo_ds.config import parse_options
from dpo_ds.engine import forms, gradients
from dpo_ds.engine.tiers import fill_tier
from dpo_ds.errors import UserError
from dpo_ds.plan.choose import MOST_SCORED, choose
from dpo_ds.plan.footprint import ScoringFootprint
from dpo_ds.plan.machine import GIB, Machine, host_memory
from dpo_ds.plan.plan import Plan
from dpo_ds.plan.refuse import for_run, remedies, show
from dpo_ds.ranks import process

# ---------------------------------------------------------------------------------------------- choosing and refusing

LLAMA_70B = "meta-llama/Meta-Llama-3-70B-Instruct"
QWEN_72B = "Qwen/Qwen2-72B-Instruct"


def planned(model: str, gpus: int = 8, gpu: int = 80, host: int = 2000, nvme: int = 0, *more: str) -> Plan:
    machine = Machine(gpus, min(gpus, 8), gpu * GIB, host * GIB, nvme * GIB)
    return choose(parse_options(["--model", model, *more]), machine)


@pytest.mark.usefixtures("documented_torch")
@pytest.mark.parametrize(
    ("form", "host", "gpu"), [("deepspeed", 20, 2), ("host", 16, 2), ("gpu", 12, 6), ("gpu_bf16", 12, 4)]
)
def test_70b_is_what_was_measured(form, host, gpu):
    """Bytes a parameter. Of DeepSpeed's own form, 22.4 were measured on CPU, with the weights."""
    chosen = planned(LLAMA_70B, 8, 80, 2000, 0, "--gradients", form)
    parameters = chosen.model.parameters
    on_host = sum(part.bytes for part in chosen.parts if part.where == "host" and part.what != "processes")
    always = ("weights", "gradients, accumulated")
    on_gpu = sum(part.bytes for part in chosen.parts if part.where == "gpu" and part.what.startswith(always))
    assert on_host / parameters == pytest.approx(host, rel=0.02)
    assert 8 * on_gpu / parameters == pytest.approx(gpu, rel=1e-6)
    assert chosen.options.ds_config == "zero3_offload_large" and chosen.fits


def test_where_gradients_are_by_the_room():
    assert planned(LLAMA_70B, host=1000).options.gradients == "gpu"
    assert planned(LLAMA_70B, gpu=40).options.gradients in ("gpu_bf16", "host")
    assert planned(LLAMA_70B, gpu=80, host=850).fits and not planned(LLAMA_70B, host=700).fits
    assert planned("01-ai/Yi-34B-Chat", 16).options.gradients == "deepspeed", "nothing is on the host"


def test_a_form_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match="gpu_bf16 sums in bf16, but this run computes in fp32: say --gradients gpu"):
        planned(LLAMA_70B, 8, 80, 2000, 0, "--gradients", "gpu_bf16", "--precision", "fp32")
    own = tmp_path / "own.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    for sums, form, words in (("fp32", "gpu_bf16", "--gradients gpu_bf16 says bf16"), ("bf16", "host", "sums in fp32")):
        own.write_text(json.dumps({"zero_optimization": zero, "data_types": {"grad_accum_dtype": sums}}))
        with pytest.raises(UserError, match=words):
            planned(LLAMA_70B, 8, 80, 2000, 0, "--gradients", form, "--ds_config", str(own))
        assert planned(LLAMA_70B, 8, 80, 2000, 0, "--ds_config", str(own)).options.gradients == "gpu"


def test_an_unknown_deepspeed_keeps_its_gradients_itself(monkeypatch, capsys):
    less = planned(LLAMA_70B)
    monkeypatch.setattr(forms, "KNOWN", ("0.1",))
    chosen = planned(LLAMA_70B)
    assert chosen.options.gradients == "deepspeed" and chosen.need("host") > 1.5 * less.need("host")
    config = fill_tier(chosen.options.ds_config, chosen.options, chosen.model, 8, on_gpu=True)
    with gradients.kept(chosen.options.gradients, config):
        assert stage3.DeepSpeedZeroOptimizer_Stage3.__module__ == stage3.__name__
    assert "takes 20 host bytes a parameter: dpo_ds knows how to do with less in 0.1 alone" in capsys.readouterr().out


def test_without_a_plan_no_form_takes_more_gpu_memory_than_deepspeeds():
    options = parse_options(["--model", LLAMA_70B, "--gpus", "8", "--gpu_memory", "80", "--plan", "off"])
    assert for_run(options).options.gradients == "host"


@pytest.mark.parametrize(("given", "expected"), [((), 0), (("--recomputed_layers", "3"), 3)])
def test_without_a_plan_the_layers_that_are_named_recompute(given, expected):
    words = ["--model", "gpt2", "--gpus", "1", "--gpu_memory", "80", "--plan", "off", *given]
    assert for_run(parse_options(words)).options.recomputed_layers == expected


def test_tiers_by_the_machine():
    assert planned("gpt2").options.ds_config == "zero0_debug"
    assert planned("01-ai/Yi-34B-Chat").options.ds_config == "zero3_offload_specialised"
    assert planned("01-ai/Yi-34B-Chat", 16).options.ds_config == "zero3_standard", "no offload if the GPUs can hold all"
    assert planned(LLAMA_70B, host=700, nvme=4000).options.ds_config == "zero3_nvme_large"
    assert planned("meta-llama/Meta-Llama-3-8B-Instruct", 1, 80).options.ds_config == "zero3_offload_specialised"


def test_the_micro_batch_fills_the_gpu():
    """It grows with the memory, up to a rank's share of a step. The next larger one does not fit."""
    large, small = planned(LLAMA_70B), planned(LLAMA_70B, gpu=40)
    assert large.options.micro_batch_tokens == 4 * (2 * 1024 - 1)
    assert small.options.micro_batch_tokens < large.options.micro_batch_tokens
    tokens = small.options.micro_batch_tokens + 1024
    assert not planned(LLAMA_70B, 8, 40, 2000, 0, "--micro_batch_tokens", str(tokens)).fits


def test_recomputation_only_where_memory_needs_it():
    model = "meta-llama/Meta-Llama-3-8B-Instruct"
    assert planned(model, gpu=80).options.gradient_checkpointing == "off"
    some = planned(model, gpu=40)
    assert some.options.gradient_checkpointing == "on" and 0 < some.options.recomputed_layers < some.model.layers
    less = ("--recomputed_layers", str(some.options.recomputed_layers - 1))
    assert planned(model, 8, 40, 2000, 0, *less).need("gpu") > 0.9 * 40 * GIB >= some.need("gpu")
    assert planned(model, 8, 40, 2000, 0, "--gradient_checkpointing", "on").options.recomputed_layers == 32
    assert f"recomputed in {some.options.recomputed_layers} of 32 layers" in some.as_markdown()
    with pytest.raises(UserError, match="--recomputed_layers 33: the model has 32 layers"):
        planned(model, 8, 40, 2000, 0, "--recomputed_layers", "33")


def test_a_live_reference_is_counted():
    more = ("--gradients", "host", "--gradient_checkpointing", "on")
    alone, both = (
        planned(LLAMA_70B, 8, 80, 2000, 0, *more),
        planned(LLAMA_70B, 8, 80, 2000, 0, "--reference", "live", *more),
    )
    assert both.need("gpu") - alone.need("gpu") == pytest.approx(2 * 70.55e9 / 8, rel=1e-3)


@pytest.mark.usefixtures("documented_torch")
def test_page_locked_memory_is_rounded_up_unless_torch_is_told_not_to(monkeypatch):
    exact = planned(QWEN_72B)
    with monkeypatch.context() as changed:
        changed.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        rounded = planned(QWEN_72B)
    assert rounded.need("host") > 1.1 * exact.need("host")
    monkeypatch.setattr(process, "knows_exact_pinned", lambda: False)
    assert planned(QWEN_72B).need("host") == rounded.need("host"), "torch before 2.13 cannot be told"


@pytest.mark.usefixtures("documented_torch")
def test_a_refusal_says_what_would_fit_and_it_does():
    options = parse_options(["--model", LLAMA_70B, "--gpus", "8", "--gpu_memory", "80", "--host_memory", "700"])
    with pytest.raises(UserError) as error:
        for_run(options)
    message = str(error.value)
    assert message.startswith(
        f"--model {LLAMA_70B} does not fit 8 GPU(s) of 80.0 GiB: 101 GiB of host memory are missing (it needs 801, "
        "there are 700); it would fit with --lora ("
    )
    assert message.endswith("; --plan only shows the table, --plan off starts anyway") and len(message) < 300
    found = dict(remedies(options, Machine.of(options)))
    assert list(found) == ["--lora", "--nvme_path on a local disk", "more host memory", "16 GPUs"]
    assert all(changed.fits for changed in found.values())
    assert for_run(options.replace(host_memory=1400.0)).fits
    assert for_run(options.replace(plan="off")).options.ds_config == "zero3_offload_large"


def test_scoring_needs_the_weights_and_a_forward_pass_alone():
    """No optimizer, no gradients: a model that cannot be trained on a machine can be evaluated there."""
    machine = Machine(1, 1, 80 * GIB, 60 * GIB)
    model = "meta-llama/Meta-Llama-3-8B-Instruct"
    options = parse_options(["--model", model])
    plan = choose(options, machine, ScoringFootprint)
    assert not choose(options, machine).fits and plan.fits and plan.options.ds_config == "zero0_debug"
    assert "trained" not in plan.as_markdown() and "recomputed" not in plan.as_markdown()
    assert [part.what for part in plan.parts if "weights" in part.what] == ["weights (bf16)"]
    assert plan.need("gpu") > 2 * plan.model.parameters and plan.need("disk") == 0
    large = choose(parse_options(["--model", LLAMA_70B]), Machine(8, 8, 80 * GIB, 100 * GIB), ScoringFootprint)
    assert large.fits and large.options.ds_config == "zero3_standard"


def test_more_tokens_are_scored_than_trained_on_in_the_same_memory():
    plan = planned(LLAMA_70B, host=1000)
    tokens, scored = plan.options.micro_batch_tokens, plan.options.scoring_tokens
    assert scored in (2 * tokens, 4 * tokens, 8 * tokens) and f"({scored} without gradients)" in plan.how
    same = planned(LLAMA_70B, 8, 80, 1000, 0, "--scoring_tokens", str(tokens))
    assert same.need("gpu") == plan.need("gpu")
    more = planned(LLAMA_70B, 8, 80, 1000, 0, "--scoring_tokens", str(2 * scored), "--micro_batch_tokens", str(tokens))
    assert more.need("gpu") > plan.need("gpu") or 2 * scored > MOST_SCORED


def test_on_cpu_and_beside_another_reference_no_more_is_scored():
    for plan in (
        choose(parse_options(["--model", "gpt2"]), Machine(2, 2, None, 64 * GIB)),
        planned(LLAMA_70B, 8, 80, 1000, 0, "--reference_model", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ):
        assert plan.options.scoring_tokens == plan.options.micro_batch_tokens


def test_a_refused_scoring_does_not_suggest_lora():
    words = ["--model", LLAMA_70B, "--gpus", "1", "--gpu_memory", "80", "--host_memory", "100"]
    options = parse_options(words)
    with pytest.raises(UserError, match=r"does not fit 1 GPU\(s\).*would fit with --nvme_path"):
        for_run(options, ScoringFootprint)
    found = dict(remedies(options, Machine.of(options), ScoringFootprint))
    assert list(found) == ["--nvme_path on a local disk", "2 GPUs"] and all(plan.fits for plan in found.values())


def test_each_place_where_memory_is_missing_is_named():
    options = parse_options([
        "--model", LLAMA_70B, "--micro_batch_tokens", "65536", "--gpus", "16", "--gpu_memory", "40",
        "--host_memory", "500",
    ])  # fmt: skip
    with pytest.raises(UserError) as error:
        for_run(options)
    for words in ("does not fit 2 nodes of 8 GPU(s) of 40.0 GiB: ", "GiB on each GPU are missing", " and ",
                  "GiB of host memory in each node are missing"):  # fmt: skip
        assert words in str(error.value), error.value


@pytest.mark.usefixtures("documented_torch")
def test_the_table_comes_with_every_change_that_would_fit():
    options = parse_options([
        "--model", LLAMA_70B, "--plan", "only", "--gpus", "8", "--gpu_memory", "80", "--host_memory", "700",
    ])  # fmt: skip
    said = []
    with pytest.raises(UserError) as error:
        show(options, said.append)
    assert "--plan" not in str(error.value), "the table has been shown"
    (text,) = said
    assert "| **host** | **at most** | **801** of 700 | |" in text
    for change, other in remedies(options, Machine.of(options)):
        assert f"\n- {change}: {other.how}; " in text


def test_nvme_without_a_folder_is_told_so():
    options = parse_options(["--model", "tiny-gpt2", "--ds_config", "zero3_nvme_large"])
    with pytest.raises(UserError, match="name a folder on a local drive with --nvme_path"):
        for_run(options)


def test_no_remedy_that_the_config_refuses():
    """zero3_nvme_large does not allow LoRA, so --lora is no remedy for a run that has too little NVMe."""
    options = parse_options([
        "--model", LLAMA_70B, "--ds_config", "zero3_nvme_large", "--gpus", "8", "--gpu_memory", "80", "--nvme", "500",
    ])  # fmt: skip
    with pytest.raises(UserError, match="on --nvme_path") as error:
        for_run(options)
    assert "lora" not in str(error.value).lower()


@pytest.mark.launch
def test_the_users_70b_command_is_refused_in_one_line(tmp_path):
    """Eight ranks without GPU and network end with one line and exit code 2, and leave nothing behind."""
    done = launching.run(8, "-m", "dpo_ds.train", "--model", LLAMA_70B, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 2, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if "dpo_ds: error:" in line]
    assert "does not fit 8 rank(s) without GPU" in line and "with 8 GPUs of 80 GiB (" in line
    assert "Traceback" not in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.launch
def test_plan_only_prints_and_stops(tmp_path):
    done = launching.run(
        1, "-m", "dpo_ds.train", "--model", LLAMA_70B, "--plan", "only", "--gpus", 8, "--gpu_memory", 80,
        "--host_memory", 2000, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "zero3_offload_large" in done.stdout and "| **gpu** | **at most** |" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_json_is_the_same_plan():
    done = launching.run(
        1, "-m", "dpo_ds.plan", "--model", LLAMA_70B, "--gpus", 8, "--host_memory", 2000, "--json"
    ).stdout  # fmt: skip
    facts = json.loads(done[done.index("{") :])
    chosen = planned(LLAMA_70B)
    assert facts["tier"] == chosen.options.ds_config and facts["fits"] is True
    assert facts["need"] == {where: chosen.need(where) for where in ("gpu", "host", "nvme", "disk")}
    assert sum(part["bytes"] for part in facts["parts"] if part["where"] == "disk") == facts["need"]["disk"]


def test_a_control_groups_limit_counts():
    """The machine's memory counts, or a container's limit if that is lower."""
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal"))
    assert 0 < host_memory() <= 1.01 * total
