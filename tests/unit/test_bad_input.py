"""A user's mistake ends in one line with the remedy and exit code 2 on every rank, before any weights load."""

import gzip
import json

import launching
import pytest
import tiny
from safetensors.torch import save_file

from dpo_ds.errors import UserError
from dpo_ds.train import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    tiny.make("llama", place / "llama")
    return place


def copied(place, name: str, change) -> str:
    """A copy of the good model folder, its config.json changed."""
    import shutil

    folder = place / name
    shutil.copytree(place / "llama", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    change(config, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def rows(place, name: str, lines: list[dict]) -> str:
    path = place / f"{name}.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return str(path)


def tier(place, name: str, config) -> str:
    path = place / f"{name}.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


GOOD = {"prompt": "Once", "chosen": " upon a time.", "rejected": " there was."}
PAIR_WITHOUT_PROMPT = {"question": "a", "answer": "b"}


def no_eos(config, folder):
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in tokenizer.items() if k != "eos_token"}))


def tied(config, folder):
    config.update(tie_word_embeddings=True)


def no_weights(config, folder):
    (folder / "model.safetensors").unlink()


def damaged_weights(config, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def old_weights(config, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


CASES = {
    "model folder missing": (lambda p: {"model": "./nowhere"}, "is not there"),
    "model not on the hub": (lambda p: {"model": "no/such-model"}, "cannot be read from the hub"),
    "folder without config": (lambda p: {"model": str(p)}, "no config.json"),
    "no causal model": (lambda p: {"model": copied(p, "t5", lambda c, f: (c.clear(), c.update(model_type="t5")))},
                        "not a causal language model"),
    "a classifier": (
        lambda p: {"model": copied(p, "cls", lambda c, f: c.update(architectures=["LlamaForSequenceClassification"]))},
        "was saved as LlamaForSequenceClassification"),
    "no eos": (lambda p: {"model": copied(p, "eos", no_eos)}, "no EOS token"),
    "no weights": (lambda p: {"model": copied(p, "weights", no_weights)}, "no safetensors weights"),
    "small vocabulary": (lambda p: {"model": copied(p, "vocab", lambda c, f: c.update(vocab_size=10))}, "vocab_size"),
    "max_length above the context": (lambda p: {"max_length": 4096}, "above the model's context of 512"),
    "unknown tier": (lambda p: {"ds_config": "zero4"}, "the tiers are zero0_debug"),
    "broken json": (lambda p: {"ds_config": tier(p, "broken", "{,}")}, "is not JSON"),
    "json that is no object": (lambda p: {"ds_config": tier(p, "list", "[1]")}, "one JSON object"),
    "fp16": (lambda p: {"ds_config": tier(p, "fp16", {"fp16": {"enabled": True}})}, "use bf16 or fp32"),
    "contradicting precision": (lambda p: {"ds_config": tier(p, "bf", {"bf16": {"enabled": True}})}, "make them agree"),
    "contradicting batch": (lambda p: {"ds_config": tier(p, "b", {"train_batch_size": 64})}, "--global_batch_pairs"),
    "contradicting clipping": (lambda p: {"ds_config": tier(p, "c", {"gradient_clipping": 0.5})}, "--max_grad_norm"),
    "contradicting rate": (
        lambda p: {"ds_config": tier(p, "lr", {"optimizer": {"type": "AdamW", "params": {"lr": 1}}})},
        "--learning_rate"),
    "ratio": (lambda p: {"ds_config": tier(p, "ratio", {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}})},
              "ratio below 1"),
    "bf16 masters": (lambda p: {"ds_config": tier(p, "m", {"bf16": {"bf16_master_weights_and_grads": True}})},
                     "loses DPO's small updates"),
    "an auto that is not ours": (lambda p: {"ds_config": tier(p, "auto", {"zero_optimization": {"stage": "auto"}})},
                                 "no rule fills"),
    "a scheduler": (lambda p: {"ds_config": tier(p, "s", {"scheduler": {"type": "WarmupLR", "params": {"a": 1}}})},
                    "--lr_scheduler"),
    "dataset file missing": (lambda p: {"dataset": "./none.jsonl"}, "none.jsonl"),
    "dataset not on the hub": (lambda p: {"dataset": "no/such-set"}, "no/such-set"),
    "missing columns": (
        lambda p: {"dataset": rows(p, "columns", [PAIR_WITHOUT_PROMPT])}, ".jsonl.gz: it has the columns question"),
    "nothing usable": (lambda p: {"dataset": rows(p, "equal", [{**GOOD, "rejected": GOOD["chosen"]}])}, "equal"),
    "too many left out": (
        lambda p: {"dataset": rows(p, "some", [GOOD] * 4 + [{**GOOD, "chosen": ""}])}, "--max_left_out"),
    "micro-batch too small": (lambda p: {"micro_batch_tokens": 9}, "--micro_batch_tokens 9 cannot hold"),
    "output folder of something else": (lambda p: {"output_dir": str(p / "llama")}, "something else"),
    "output is a file": (lambda p: {"output_dir": str(p / "llama" / "config.json")}, "is a file"),
    "lora on nothing": (lambda p: {"lora": "true", "lora_targets": "c_attn"}, "it has down_proj, gate_proj"),
    "no such stage": (lambda p: {"ds_config": tier(p, "7", {"zero_optimization": {"stage": 7}})}, "stage is 7"),
    "a key that ZeRO does not have": (
        lambda p: {"ds_config": tier(p, "k", {"zero_optimization": {"stage": 2, "bucket": 1}})}, "bucket"),
    "zero as a switch": (lambda p: {"ds_config": tier(p, "zt", {"zero_optimization": True})},
                         "zt.json: zero_optimization is true: it must be an object"),
    "bf16 as a switch": (lambda p: {"ds_config": tier(p, "bt", {"bf16": True})}, "bf16 is true"),
    "offload in a word": (lambda p: {"ds_config": tier(p, "ow", {"zero_optimization": {"offload_param": "cpu"}})},
                          "zero_optimization.offload_param is"),
    "one beta": (lambda p: {"ds_config": tier(p, "b1", {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}})},
                 "optimizer.params.betas is [0.9]"),
    "a parameter that Adam does not take": (
        lambda p: {"ds_config": tier(p, "pa", {"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}})},
        "optimizer.params.momentum is 0.9"),
    "no such dtype": (lambda p: {"ds_config": tier(p, "dt", {"data_types": {"grad_accum_dtype": "fp33"}})},
                      "data_types.grad_accum_dtype"),
    "printing every 0 steps": (lambda p: {"ds_config": tier(p, "sp", {"steps_per_print": 0})}, "steps_per_print is 0"),
    "quantised weights on a CPU": (
        lambda p: {"ds_config": tier(p, "qw", {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}})},
        "needs a CUDA GPU"),
    "no sub-groups": (
        lambda p: {"ds_config": tier(p, "sg", {"zero_optimization": {"stage": 3, "sub_group_size": 0}})},
        "sub_group_size is 0: it must be above 0"),
    "no such writer": (lambda p: {"ds_config": tier(p, "wr", {"checkpoint": {"writer": {"type": "nope"}}})},
                       "checkpoint.writer is"),
    "damaged weights": (lambda p: {"model": copied(p, "damaged", damaged_weights)}, "is damaged"),
    "weights of the old kind": (lambda p: {"model": copied(p, "old", old_weights)}, "only pytorch_model.bin"),
    "all pairs held out": (lambda p: {"eval_pairs": 501}, "more than half of the 1000 pairs"),
    "evaluation file missing": (lambda p: {"eval_dataset": "./none.jsonl"}, "--eval_dataset ./none.jsonl"),
    "a cache that cannot be": (lambda p: {"cache_dir": str(p / "llama" / "config.json")}, "can be read and written"),
    "negative generations": (lambda p: {"generations": -1}, "--generations is -1"),
    "an infinite rate": (lambda p: {"learning_rate": "inf"}, "finite"),
    "lora on a tied head by its path": (
        lambda p: {"lora": "true", "lora_targets": "model.lm_head", "model": copied(p, "tied", tied)}, "output head"),
    "lora on a tied head": (
        lambda p: {"lora": "true", "lora_targets": "lm_head", "model": copied(p, "tied", tied)}, "output head"),
    "resume from nowhere": (lambda p: {"resume": "/nowhere"}, "is no checkpoint"),
    "rates in words": (lambda p: {"learning_rate": "fast"}, "--learning_rate"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_with_the_remedy(case, place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, words = CASES[case]
    options = {
        "model": str(place / "llama"),
        "dataset": "sample",
        "cache_dir": str(place / "cache"),
        "output_dir": str(place / "out"),
        "max_length": 64,
        "precision": "fp32",
        **make(place),
    }
    with pytest.raises(UserError) as error:
        main([f"--{key}={value}" for key, value in options.items()])
    message = str(error.value)
    assert words in message and "\n" not in message, message
    assert not (place / "out").exists(), "a run that cannot start leaves nothing behind"


@pytest.mark.launch
@pytest.mark.parametrize("more", [["--betta=1"], ["--max_length=100000"]], ids=["option", "model"])
def test_exit_code_and_one_voice_on_two_ranks(more, place):
    """The launcher ends with our exit code. Rank 0 reports the error once, and no rank shows a traceback."""
    done = launching.run(
        2, "-m", "dpo_ds.train", "--model", place / "llama", "--dataset", "sample", "--output_dir", place / "two",
        *more, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout[-3000:]
    assert done.stdout.count("dpo_ds: error:") == 1 and "Traceback" not in done.stdout
    assert not (place / "two").exists()


@pytest.mark.launch
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pairs(place, tmp_path):
    """A learning rate that is far too high ends the run with one line that names the step's pairs."""
    done = launching.run(
        1, "-m", "dpo_ds.train", "--model", place / "llama", "--dataset", "sample", "--output_dir", tmp_path / "nan",
        "--learning_rate", "1e30", "--warmup_ratio", "0", "--max_length", "64", "--global_batch_pairs", "4",
        "--eval_pairs", "0", "--precision", "fp32", check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if "dpo_ds: error:" in line]
    assert "lower --learning_rate" in line and "look at the pairs in" in line and "Traceback" not in done.stdout
    assert "python -m dpo_ds.replay" in done.stdout, "each step's pairs are written down"


@pytest.mark.launch
def test_weights_that_do_not_fit_the_config_are_noticed(place, tmp_path):
    """transformers would fill missing tensors with random values."""
    model = copied(place, "deeper", lambda c, f: c.update(num_hidden_layers=3))
    done = launching.run(
        1, "-m", "dpo_ds.train", "--model", model, "--dataset", "sample", "--output_dir", tmp_path / "out",
        "--cache_dir", tmp_path / "cache", check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if "dpo_ds: error:" in line]
    assert "9 tensors" in line and "model.layers.2." in line and "Traceback" not in done.stdout


@pytest.mark.launch
def test_a_reference_that_is_not_the_policy_is_noticed(place, tmp_path):
    """The first loss must be ln 2. Here the table's values are changed, and then its hash too."""
    import numpy as np

    cache = tmp_path / "cache"
    words = [
        "-m", "dpo_ds.train", "--model", place / "llama", "--dataset", "sample", "--max_length", "64",
        "--global_batch_pairs", "8", "--eval_pairs", "0", "--precision", "fp32", "--max_steps", "1", "--export", "none",
        "--cache_dir", cache,
    ]  # fmt: skip
    launching.run(1, *words, "--output_dir", tmp_path / "first")
    (table,) = cache.glob("reference/*/logps.npy")
    logps = np.load(table)
    np.save(table, logps + np.tile([1.0, 0.0], len(logps) // 2).astype(np.float32))  # chosen, rejected, ...
    caught = launching.run(1, *words, "--output_dir", tmp_path / "second").stdout
    assert "does not match its hash and is computed again" in caught, "a changed table is computed again"
    np.save(table, logps + np.tile([1.0, 0.0], len(logps) // 2).astype(np.float32))  # chosen, rejected, ...
    manifest = json.loads((table.parent / "table.json").read_text())
    import hashlib

    from dpo_ds.checksums import sealed

    manifest["sha256"] = hashlib.sha256(table.read_bytes()).hexdigest()
    del manifest["checksum"]
    (table.parent / "table.json").write_text(json.dumps(sealed(manifest)))
    done = launching.run(1, *words, "--output_dir", tmp_path / "third", check=False)
    assert done.returncode == 1 and "it must be 0.693147" in done.stdout, done.stdout[-2000:]


def test_weights_that_are_not_safetensors_are_not_unpickled(place, tmp_path):
    import torch

    folder = copied(place, "pickled", no_weights)
    torch.save({"x": torch.zeros(1)}, f"{folder}/pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors weights"):
        main([f"--model={folder}", "--dataset=sample", f"--output_dir={tmp_path}/x", f"--cache_dir={place}/cache"])
    save_file({"x": torch.zeros(1)}, f"{folder}/other.safetensors")
