"""A user's mistake ends in one line with the remedy and exit code 2 on every rank, before any weights load.

CASES is the table: a name, what is wrong, and words of the line. Environments are in test_bad_environment.py.
"""

import gzip
import json
from pathlib import Path

import adapters
import launching
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

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


def with_weights(place, name: str, change) -> dict:
    """The options of a copy whose tensors are changed."""

    def changed(config, folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")

    return {"model": copied(place, name, changed)}


def with_value(value: float):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return change


def not_finite_adapter(place) -> dict:
    file = adapters.make(place / "llama", place / "nan-adapter") / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] = float("nan")
    save_file(tensors, file)
    return {"adapter": file.parent}


def without_head(tensors):
    del tensors["lm_head.weight"]


def other_vocabulary(tensors):
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:900]


def further_layer(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()


def as_gptq(tensors):
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(6, 80, dtype=torch.int32)
    del tensors["model.layers.0.mlp.up_proj.weight"]


def of_type(dtype):
    def change(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(dtype)

    return change


def with_config(place, name: str, **changes) -> dict:
    """The options of a copy whose config.json is changed."""
    return {"model": copied(place, name, lambda config, folder: config.update(changes))}


def with_file(place, name: str, file: str, content: str | bytes) -> dict:
    """The options of a copy in which a file is replaced, at the end: the config too."""
    folder = copied(place, name, lambda config, folder: None)
    with open(f"{folder}/{file}", "wb") as opened:
        opened.write(content if isinstance(content, bytes) else content.encode())
    return {"model": folder}


def with_index(place, name: str, content: str) -> dict:
    return with_file(place, name, "model.safetensors.index.json", content)


def with_tokenizer(place, name: str, **changes) -> dict:
    """The options of a copy whose tokenizer_config.json is changed."""
    file = "tokenizer_config.json"
    config = json.loads((place / "llama" / file).read_text())
    return with_file(place, name, file, json.dumps(config | changes))


def cut_shard(place, name: str) -> dict:
    """Weights in two shards, the second cut off."""

    def change(config, folder):
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        (folder / "model.safetensors").unlink()
        shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        for file, own in shards.items():
            save_file({key: tensors[key] for key in own}, folder / file)
        weight_map = {key: file for file, own in shards.items() for key in own}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        whole = (folder / "b.safetensors").read_bytes()
        (folder / "b.safetensors").write_bytes(whole[: len(whole) // 2])

    return {"model": copied(place, name, change)}


def yaml(place, name: str, text: str) -> dict:
    path = place / f"{name}.yaml"
    path.write_text(text)
    return {"config": str(path)}


def data(place, name: str, content: str | bytes) -> dict:
    path = place / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"dataset": str(path)}


def checkpoint(place, name: str, content: str) -> dict:
    folder = place / name / "step-000001"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(content)
    return {"resume": str(folder)}


def taken_folder(place, name: str, **files: str) -> dict:
    """A folder that holds files already, which must stay as they are."""
    (place / name).mkdir()
    for file, content in files.items():
        (place / name / file.replace("_", ".")).write_text(content)
    return {"output_dir": str(place / name)}


def section(place, key: str, value) -> dict:
    """A DeepSpeed config with one key, given as a path."""
    config: dict = {}
    inner = config
    *above, last = key.split(".")
    for name in above:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return {"ds_config": tier(place, f"section-{key}", config)}


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
    "contradicting recomputation": (
        lambda p: {"gradient_checkpointing": "off", "recomputed_layers": 1}, "contradict each other"),
    "contradicting sums": (
        lambda p: {"gradients": "gpu_bf16", "precision": "fp32"}, "this run computes in fp32: say --gradients gpu"),
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

NUMBERS = {
    "seed": (2**70, "at most 18,446,744,073,709,551,615: lower it"),
    "epochs": (1e15, "at most 1,000,000.0: lower it"),
    "max_steps": (10**15, "at most 1,000,000,000: lower it"),
    "global_batch_pairs": (10**12, "at most 1,000,000,000: lower it"),
    "micro_batch_tokens": (10**12, "at most 16,777,216: lower it"),
    "max_length": (10**12, "at most 16,777,216: lower it"),
    "lora_r": (10**9, "at most 65,536: lower it"),
    "gpus": (10**12, "at most 1,000,000: lower it"),
    "gpus ": (8, "--gpus 8 plans for another machine than this, where 1 rank(s) run"),
    "gpu_memory": (1e300, "at most 1,000,000.0: lower it"),
    "gpu_memory ": (80, "--gpu_memory 80.0 is of GPUs, and none is here"),
    "host_memory": (1e300, "at most 1,000,000.0: lower it"),
    "nvme": (1e300, "at most 1,000,000,000.0: lower it"),
    "machine": ("a100-8", "--machine a100-8 is not known: did you mean a100-80"),
    "machine ": ("h100", "none is here: leave it out, or say --plan only"),
    "pair_tokens": (2, "3 or more: a token of the prompt and one of each answer"),
    "pair_tokens ": (10**6, "no pair is longer than"),
    "price_per_gpu_hour": (-1, "0 or more"),
    "hang_minutes": (1e300, "at most 30,000.0: lower it"),
    "save_every": (10**20, "at most 9,223,372,036,854,775,807: lower it"),
    "weight_decay": (1e300, "lower it"),
    "lora_alpha": (1e300, "lower it"),
    "beta": (1e300, "lower it"),
    "max_grad_norm": ("nan", "--max_grad_norm is nan, but must be finite"),
    "warmup_ratio": ("nan", "--warmup_ratio is nan, but must be finite"),
    "max_left_out": ("-inf", "--max_left_out is -inf, but must be finite"),
    "lora_dropout": (1, "from 0 to below 1"),
    "label_smoothing": (0.7, "from 0 to 0.5"),
    "keep_last": (0, "more than 0"),
    "max_bad_steps": (0, "more than 0"),
    "eval_every": (-1, "0 or more"),
    "recomputed_layers": (-1, "0 or more"),
    "recomputed_layers ": (10**6, "the model has 2 layers"),
    "router_aux_loss_coef": ("much", "a number above it, or model"),
    "loss_weights": ("nan", "each weight must be more than 0"),
    "host_memory ": (1e-300, "does not fit"),
    "scoring_tokens": (9, "--scoring_tokens 9 cannot hold"),
    "micro_batch_tokens ": (2**24, "of host memory are missing"),
}
CASES |= {f"{name}={value}": (lambda p, name=name, value=value: {name.strip(): value}, words)
          for name, (value, words) in NUMBERS.items()}  # fmt: skip

CASES |= {
    # options from a file
    "a key twice": (lambda p: yaml(p, "twice", "beta: 0.1\nbeta: 0.2\n"), "beta and beta set the same option"),
    "a key and its alias": (lambda p: yaml(p, "alias", "model: a\nmodel_name: b\n"), "model and model_name set"),
    "yaml that runs code": (lambda p: yaml(p, "code", "!!python/object/apply:os.system ['true']"), "is not YAML"),
    "two documents": (lambda p: yaml(p, "two", "beta: 1\n---\nbeta: 2\n"), "is not YAML"),
    "a list for a key": (lambda p: yaml(p, "list", "? [a]\n: 1\n"), "is not YAML"),
    "a date for a number": (lambda p: yaml(p, "date", "beta: 2001-01-01\n"), "--beta"),
    "an empty file of options": (lambda p: yaml(p, "empty", ""), "holds no 'key: value' lines"),
    "a folder of options": (lambda p: {"config": str(p)}, "name a YAML file of options"),
    # the model's config
    "more layers than weights": (lambda p: with_config(p, "more", num_hidden_layers=3), "model.layers.2."),
    "fewer layers than weights": (lambda p: with_config(p, "fewer", num_hidden_layers=1), "layers that its config"),
    "no layers": (lambda p: with_config(p, "none", num_hidden_layers=0), "num_hidden_layers 0, which must be above 0"),
    "layers in words": (lambda p: with_config(p, "words", num_hidden_layers="two"), "its config.json cannot be used"),
    "a size that heads do not divide": (lambda p: with_config(p, "hidden", hidden_size=50), "not a multiple of"),
    "no heads": (lambda p: with_config(p, "heads", num_attention_heads=0), "its config.json cannot be used"),
    "other key heads": (lambda p: with_config(p, "kv", num_key_value_heads=4), "has the shape [24, 48], but [48, 48]"),
    "no context": (lambda p: with_config(p, "context", max_position_embeddings=0), "max_position_embeddings 0, which"),
    "a negative vocabulary": (lambda p: with_config(p, "negative", vocab_size=-5), "vocab_size -5, which must be"),
    "no such activation": (lambda p: with_config(p, "act", hidden_act="zzz"), "no model can be built of its"),
    "no such kind of model": (lambda p: with_config(p, "kind", model_type="zzz"), "its config.json cannot be used"),
    "code that is not trusted": (
        lambda p: with_config(p, "remote", model_type="zzz", auto_map={"AutoConfig": "c.C"}), "--trust_remote_code"),
    "GPTQ": (lambda p: with_config(p, "gptq", quantization_config={"quant_method": "gptq", "bits": 4}),
             "is quantised (gptq), and quantised weights cannot be trained: take the model"),
    "bitsandbytes": (
        lambda p: with_config(p, "bnb", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is quantised (bitsandbytes)"),
    "a config that is no JSON": (lambda p: with_file(p, "nojson", "config.json", "{,"), "cannot be used"),
    "a config that is a list": (lambda p: with_file(p, "aslist", "config.json", "[]"), "cannot be used"),
    # its weights
    "weights that are NaN": (lambda p: with_weights(p, "nan", with_value(float("nan"))),
                             "model.layers.1.mlp.up_proj.weight has values that are NaN or infinite"),
    "weights that are infinite": (lambda p: with_weights(p, "inf", with_value(float("-inf"))), "NaN or infinite"),
    "an adapter that is NaN": (not_finite_adapter, "lora_A.weight has values that are NaN or infinite"),
    "a missing head": (lambda p: with_weights(p, "headless", without_head), "1 of 21 tensors"),
    "another vocabulary": (lambda p: with_weights(p, "words900", other_vocabulary),
                           "lm_head.weight has the shape [900, 48], but [1024, 48] by its config.json (2 such"),
    "a layer too many": (lambda p: with_weights(p, "further", further_layer), "model.layers.2.mlp.up_proj.weight"),
    "weights of GPTQ": (lambda p: with_weights(p, "qweight", as_gptq), "qweight is of type I32, so the weights are"),
    "weights of int8": (lambda p: with_weights(p, "int8", of_type(torch.int8)), "is of type I8"),
    "weights of fp8": (lambda p: with_weights(p, "fp8", of_type(torch.float8_e4m3fn)), "is of type F8_E4M3"),
    "empty weights": (lambda p: with_file(p, "hollow", "model.safetensors", ""), "is damaged or cannot be read"),
    "a pointer of git lfs": (lambda p: with_file(p, "lfs", "model.safetensors", "version https://git-lfs.github.com/"),
                             "is damaged or cannot be read"),
    "a shard that is cut off": (lambda p: cut_shard(p, "shards"), "b.safetensors is damaged or cannot be read"),
    "an index without weight_map": (lambda p: with_index(p, "nomap", "{}"), "is damaged (KeyError 'weight_map')"),
    "an index that is a list": (lambda p: with_index(p, "indexlist", "[]"), "index.json is damaged"),
    "an index of numbers": (lambda p: with_index(p, "numbers", '{"weight_map": {"a": 1}}'), "index.json is damaged"),
    "a shard that is missing": (lambda p: with_index(p, "lost", '{"weight_map": {"a": "x.safetensors"}}'),
                                "x.safetensors is in the index but not there"),
    "an index that leaves the folder": (
        lambda p: with_index(p, "leaves", '{"weight_map": {"a": "../llama/model.safetensors"}}'), "outside its folder"),
    # its tokenizer
    "a tokenizer that is cut off": (lambda p: with_file(p, "tokcut", "tokenizer.json", "{"), "no tokenizer that loads"),
    "an empty tokenizer": (lambda p: with_file(p, "tokempty", "tokenizer.json", "{}"), "no tokenizer that loads"),
    "a tokenizer's config that is a list": (
        lambda p: with_file(p, "toklist", "tokenizer_config.json", "[]"), "no tokenizer that loads"),
    "a template of half a loop": (lambda p: with_tokenizer(p, "half", chat_template="{% for"), "--chat_template none"),
    "a template that refuses": (
        lambda p: with_tokenizer(p, "refuses", chat_template="{{ raise_exception('no') }}"), "--chat_template none"),
    "a template that drops the prompt": (
        lambda p: with_tokenizer(p, "drops", chat_template="x"), "drops a message of the prompt"),
    "a template that is a number": (lambda p: with_tokenizer(p, "number", chat_template=5), "chat_template is no text"),
    "a template that reaches out": (
        lambda p: with_tokenizer(p, "reaches", chat_template="{{ ''.__class__.__mro__ }}"), "--chat_template none"),
    # the data
    "data that is no JSON": (lambda p: data(p, "text.jsonl", "prompt, chosen\n"), "text.jsonl"),
    "data that is empty": (lambda p: data(p, "void.jsonl", ""), "void.jsonl"),
    "data that is cut off": (lambda p: data(p, "cut.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-12]), "cut.jsonl.gz"),
    "data in another encoding": (lambda p: data(p, "latin.csv", "prompt,chosen,rejected\né,a,b\n".encode("latin-1")),
                                 "save it as UTF-8"),
    "parquet that is none": (lambda p: data(p, "none.parquet", "PAR1"), "none.parquet cannot be read as parquet"),
    "a heading twice": (lambda p: data(p, "double.csv", "prompt,chosen,chosen\na,b,c\n"), "chosen twice"),
    "a line of too many cells": (lambda p: data(p, "cells.csv", "prompt,chosen,rejected\na,b,c,d\n"), "has 4 cells"),
    "a file of no known kind": (lambda p: data(p, "pairs.xlsx", "x"), "pairs.xlsx"),
    "weights that do not sum to 1": (lambda p: {"dataset": "sample:0.5,sample:0.7"}, "they must sum to 1"),
    "an empty name": (lambda p: {"dataset": "sample,,sample"}, "an empty name"),
    "no such split": (lambda p: {"dataset_split": "nope"}, "has no split nope"),
    # checkpoints and the run's folder
    "a checkpoint that is a file": (lambda p: {"resume": str(p / "llama" / "config.json")}, "is no checkpoint"),
    "a checkpoint without facts": (lambda p: checkpoint(p, "facts", "{}"), "is no checkpoint"),
    "a checkpoint that is no JSON": (lambda p: checkpoint(p, "notjson", "{,"), "is no checkpoint"),
    "a run that cannot be read": (lambda p: taken_folder(p, "unread", run_json="{,"), "run.json is damaged"),
    "a run that is another": (lambda p: taken_folder(p, "other-run", run_json='{"date": "2026-01-01"}'), "another run"),
    # a wrong type in each section of a DeepSpeed config
    **{f"{key}={value}": (lambda p, key=key, value=value: section(p, key, value), key.split(".")[0])
       for key, value in {
           "bf16.enabled": "yes", "fp16": 1, "data_types.grad_accum_dtype": 32, "optimizer": "AdamW",
           "optimizer.params.eps": "small", "optimizer.type": 3, "scheduler": "linear", "zero_optimization.stage": "3",
           "zero_optimization.reduce_bucket_size": "5e8", "zero_optimization.offload_optimizer": "cpu",
           "aio.block_size": 1.5, "activation_checkpointing.partition_activations": "no", "comms_logger.enabled": "on",
           "flops_profiler.profile_step": "first", "timers.throughput": [], "tensorboard": True, "wandb.enabled": 2,
           "csv_monitor.output_path": 5, "comet.enabled": "x", "checkpoint.tag_validation": 1, "compile": "max",
           "gradient_clipping": "1.0", "steps_per_print": 0.5, "log_level": 3, "train_batch_size": "32",
           "wall_clock_breakdown": 1, "communication_data_type": 16, "prescale_gradients": "no", "dump_state": "yes",
       }.items()},
}  # fmt: skip


def everything_in(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    taken = Path(options["output_dir"])
    before = everything_in(taken)
    with pytest.raises(UserError) as error:
        main([f"--{key}={value}" for key, value in options.items()])
    message = str(error.value)
    assert words in message and "\n" not in message, message
    assert not (place / "out").exists(), "a run that cannot start leaves nothing behind"
    assert everything_in(taken) == before, "nothing is overwritten"


def test_the_table_is_long_enough():
    assert len(CASES) >= 150


@pytest.mark.launch
@pytest.mark.parametrize("wrong", ["option", "model", "weights"])
def test_exit_code_and_one_voice_on_two_ranks(wrong, place):
    """The launcher ends with our exit code. Rank 0 reports the error once, and no rank shows a traceback.

    transformers would fill missing tensors with random values, and under ZeRO-3 no rank has them all.
    """
    deeper = with_config(place, "deeper", num_hidden_layers=3)["model"]
    more, words = {
        "option": (["--betta=1"], "did you mean --beta?"),
        "model": (["--max_length=100000"], "above the model's context of 512"),
        "weights": (
            ["--ds_config=zero3_standard", "--max_length=64", f"--cache_dir={place}/cache", f"--model={deeper}"],
            "9 of 30 tensors that its config.json describes are missing from its weights",
        ),
    }[wrong]
    done = launching.run(
        2, "-m", "dpo_ds.train", "--model", place / "llama", "--dataset", "sample", "--output_dir", place / "two",
        *more, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout[-3000:]
    assert done.stdout.count("dpo_ds: error:") == 1 and "Traceback" not in done.stdout and words in done.stdout
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
