"""The run's options: one dataclass, filled by `--config run.yaml` and by flags over it.

    options = parse_options(["--config", "run.yaml", "--learning_rate", "1e-6"])

A key has one spelling: the field's name is the flag, the YAML key and the attribute. YAML is turned into flags and
parsed with the others by transformers' HfArgumentParser, so that types, choices and unknown keys are checked in one
place. What a run used is written to its output folder as options.yaml and can be fed back with `--config`.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from transformers.hf_argparser import HfArg, HfArgumentParser

from dpo_ds.errors import UserError


@dataclass(frozen=True)
class Options:
    """Every option of a run. `None` means: follows from the model and the machine (see `--help` for how)."""

    # what to train, on what, to where
    model: str | None = HfArg(
        default=None, aliases=["--model_name"], help="Model to align: hub id, local folder, or tiny-gpt2 (built in)."
    )
    dataset: str = HfArg(
        default="HuggingFaceH4/ultrafeedback_binarized",
        help="Preference pairs: hub id, folder, .jsonl/.jsonl.gz/.json/.csv/.parquet file, or sample (built in).",
    )
    dataset_split: str = HfArg(default="auto", help="Split of --dataset; auto: train_prefs, train, or the only one.")
    eval_dataset: str | None = HfArg(
        default=None, help="Held-out pairs; by default a fixed part of --dataset, chosen by content, is held out."
    )
    eval_pairs: int | None = HfArg(
        default=None, help="How many pairs to evaluate on, at most; by default 5%% of the set, 500 at most. 0: none."
    )
    output_dir: str | None = HfArg(default=None, help="Folder of this run; by default runs/<model>-<dataset>.")
    cache_dir: str = HfArg(
        default="~/.cache/dpo_ds", help="Where tokenised sets and reference tables are kept, by content, for all runs."
    )
    trust_remote_code: bool = HfArg(default=False, help="Run Python code that comes with the model. Off unless asked.")

    # the machine
    ds_config: str = HfArg(default="auto", help="DeepSpeed config: auto, a tier of ds_configs/, or a JSON file.")
    precision: Literal["auto", "bf16", "fp32"] = HfArg(
        default="auto", help="bf16 keeps fp32 master weights. auto: bf16 on a GPU, fp32 on CPU."
    )
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa"] = HfArg(
        default="auto",
        help="Attention's kernel. auto: the fastest that GPU and model have; varlen is torch's own.",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = HfArg(
        default="auto", help="Recompute activations in backward. auto: on where memory needs it, by the plan."
    )
    micro_batch_tokens: int | None = HfArg(
        default=None,
        help="Tokens of one micro-batch on one rank, at most: a packed pair is prompt + chosen + rejected. By default "
        "what the plan finds room for, up to the rank's share of a step (on CPU 1024, or the longest pair).",
    )

    # whether it fits
    plan: Literal["auto", "only", "off"] = HfArg(
        default="auto",
        help="auto: work out what the run takes, pick tier and micro-batch by it, refuse what cannot fit; only: print "
        "that and stop; off: the class's tier, whatever the machine.",
    )
    gpus: int | None = HfArg(default=None, help="Plan for so many GPUs (nodes of 8); by default one for each rank.")
    gpu_memory: float | None = HfArg(default=None, help="Plan for GPUs of so many GiB; by default this machine's.")
    host_memory: float | None = HfArg(default=None, help="Plan for so many GiB of host memory in each node.")
    nvme: float | None = HfArg(default=None, help="Plan for so many GiB on --nvme_path in each node.")
    nvme_path: str | None = HfArg(
        default=None, help="Folder on a fast local disk, for tiers that keep the optimizer's state there."
    )

    # the loss
    beta: float = HfArg(default=0.1, help="DPO's beta: how strongly the policy is held to the reference.")
    router_aux_loss_coef: str = HfArg(
        default="0",
        help="Weight of a mixture of experts' load-balancing loss, over each pair's tokens; model: as in its config.",
    )
    reference: Literal["precomputed", "live", "base", "none"] = HfArg(
        default="precomputed",
        help="Reference log-probabilities: a table made once; a second engine; LoRA's base weights; or none.",
    )

    # the optimisation
    learning_rate: float | None = HfArg(
        default=None, help="Peak AdamW learning rate; by default by the model's size, ten times as high with --lora."
    )
    epochs: float = HfArg(default=1.0, help="Passes over the training pairs; may be a fraction.")
    max_steps: int | None = HfArg(default=None, help="Optimizer steps; overrides --epochs.")
    global_batch_pairs: int = HfArg(default=32, help="Pairs of one optimizer step, over all ranks and micro-batches.")
    warmup_ratio: float = HfArg(default=0.1, help="Part of the steps over which the learning rate rises.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = HfArg(
        default="linear", help="What the learning rate does after the warm-up."
    )
    weight_decay: float = HfArg(default=0.0, help="AdamW's weight decay, on matrices only (no biases, no norms).")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are scaled down to this norm; 0: never.")
    seed: int = HfArg(default=42, help="Decides the order of the pairs and LoRA's first weights.")

    # the data
    max_length: int | None = HfArg(
        default=None, help="Tokens of prompt + the longer response; by default 1024, or the model's context if less."
    )
    truncation: Literal["keep_end", "keep_start"] = HfArg(
        default="keep_end", help="keep_end cuts the prompt's beginning; keep_start cuts prompt + response at the end."
    )
    chat_template: Literal["auto", "none"] = HfArg(
        default="auto", help="auto: the tokenizer's own template where it has one; none: plain concatenation."
    )
    max_left_out: float = HfArg(default=0.1, help="Stop if a larger part of the rows than this cannot be used.")

    # LoRA
    lora: bool = HfArg(default=False, help="Train low-rank adapters (peft) instead of all the weights.")
    lora_r: int = HfArg(default=16, help="Rank of the adapters.")
    lora_alpha: float = HfArg(default=32.0, help="Their scale is lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout on the adapters' input.")
    lora_targets: str = HfArg(
        default="all-linear",
        help="Comma-separated module names, or all-linear: all but the output head (name lm_head to have it) and fused "
        "experts.",
    )

    # on the way, and the end
    eval_every: int | None = HfArg(
        default=None, help="Steps between evaluations; by default ten a run. 0: only before and after."
    )
    save_every: int = HfArg(default=0, help="Steps between checkpoints; 0: only the last step's.")
    resume: str = HfArg(
        default="auto", help="auto: go on where --output_dir stopped; never; or a checkpoint folder to start from."
    )
    export: Literal["merged", "none"] = HfArg(
        default="merged", help="Write a plain Hugging Face folder, LoRA merged in, at the end."
    )
    generations: int | None = HfArg(
        default=None, help="Prompts to show answers to, before and after; by default 3 for models below 1 B, else 0."
    )

    def replace(self, **changes) -> "Options":
        return dataclasses.replace(self, **changes)


# Fields that say where or how to run, not what to compute: two runs that differ only here are the same run.
NOT_IDENTITY = frozenset(
    {"output_dir", "cache_dir", "resume", "export", "generations", "save_every", "eval_every", "attention"}
    | {"plan", "gpus", "gpu_memory", "host_memory", "nvme", "nvme_path"}
)

DESCRIPTION = "The options of a run. --model alone is enough; the rest follows from the model and the machine."

FIELDS = {field.name: field for field in dataclasses.fields(Options)}


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def parse_options(argv: list[str], command: str = "train") -> Options:
    """Options from flags, over a YAML file if `--config FILE` is among them (a later flag overrides an earlier one).

    Raises UserError, in one line, for unknown keys (naming the nearest), wrong types and values out of range.
    """
    parser = _Parser(Options, prog=f"python -m dpo_ds.{command}", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it.")
    # Both launchers pass the rank's number on the command line; the environment has it as well.
    parser.add_argument("--local_rank", "--local-rank", dest="local_rank", type=int, help="Set by the launcher.")
    argv = _flags_of_config(parser, argv) + argv
    options, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"unexpected argument {unknown[0]}: options are written --name value")
    if unknown:
        raise UserError(_unknown(unknown[0], ["--" + name for name in [*FIELDS, "model_name", "config"]]))
    check(options)
    return options


def _flags_of_config(parser: _Parser, argv: list[str]) -> list[str]:
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    paths += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    flags = []
    for path in paths:
        for key, value in _read_yaml(path).items():
            key = "model" if key == "model_name" else key
            if key not in FIELDS:
                raise UserError(f"{path}: {_unknown(str(key), list(FIELDS))}")
            if isinstance(value, (list, dict)):
                raise UserError(f"{path}: {key} takes a single value, not a {type(value).__name__}")
            if value is not None:  # null: the default
                flags.append(f"--{key}={value}")
    return flags


def _read_yaml(path: str) -> dict:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; name a YAML file of options") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no 'key: value' lines")
    return content


def _unknown(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.0)
    return f"unknown option {word.split('=')[0]}; did you mean {nearest[0]}? (--help lists all)"


def check(options: Options) -> None:
    """Raises UserError for values that no model, data or machine could make right."""
    if not options.model:
        raise UserError("--model is needed: a hub id, a local folder, or tiny-gpt2")
    for name in ("beta", "epochs", "global_batch_pairs", "max_steps", "lora_r", "lora_alpha", "micro_batch_tokens"):
        _require(options, name, lambda x: x > 0, "more than 0")
    for name in (
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "eval_pairs",
        "eval_every",
        "save_every",
        "generations",
        "nvme",
    ):
        _require(options, name, lambda x: x >= 0, "0 or more")
    for name in ("gpus", "gpu_memory", "host_memory"):
        _require(options, name, lambda x: x > 0, "more than 0")
    for name in ("warmup_ratio", "max_left_out"):
        _require(options, name, lambda x: 0 <= x <= 1, "between 0 and 1")
    _require(options, "lora_dropout", lambda x: 0 <= x < 1, "from 0 to below 1")
    _require(options, "max_length", lambda x: x >= 2, "2 or more: a prompt token and a response token")
    _require(options, "seed", lambda x: x >= 0, "0 or more")
    if options.router_aux_loss_coef != "model":
        _require_number("router_aux_loss_coef", options.router_aux_loss_coef)
    if options.reference == "base" and not options.lora:
        raise UserError("--reference base uses LoRA's frozen base weights: add --lora, or use --reference precomputed")


def _require(options: Options, name: str, holds, wanted: str) -> None:
    value = getattr(options, name)
    if value is not None and not math.isfinite(value):
        raise UserError(f"--{name} is {value}, but must be finite")
    if value is not None and not holds(value):
        raise UserError(f"--{name} is {value}, but must be {wanted}")


def _require_number(name: str, text: str) -> None:
    try:
        fine = math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        fine = False
    if not fine:
        raise UserError(f"--{name} is {text}, but must be 0, a number above it, or model")


def to_yaml(options: Options) -> str:
    """The options as YAML that `--config` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(options), sort_keys=False)
