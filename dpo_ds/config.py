"""The run's options: one dataclass, filled by `--config run.yaml` and by flags over it.

    options = parse_options(["--config", "run.yaml", "--learning_rate", "1e-6"])

A key has one spelling: the field's name is the flag, the YAML key and the attribute. YAML is turned into flags, and
argparse reads all flags together. So types, choices and unknown keys are checked in one place. A run writes the
options that it used to options.yaml in its output folder; `--config` reads that file back.
"""

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from dpo_ds.checksums import of_bytes
from dpo_ds.errors import UserError, one_line
from dpo_ds.secrets import holds_secret

if TYPE_CHECKING:
    from typing_extensions import Self

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Help:
    """What `--help` says about an option. `heading` starts a group: this option and those after it stand under it."""

    text: str
    heading: str | None = None


@dataclass(frozen=True)
class Options:
    """Every option of a run. `None` means that the model and the machine decide (the option's help says how)."""

    model: Annotated[
        str, Help("Model to align: hub id, local folder, or tiny-gpt2 (built in).", heading="what to train")
    ] = ""
    dataset: Annotated[
        str,
        Help(
            "Preference pairs: hub id, folder, file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), glob, or sample "
            "(built in). Several: a.jsonl,b/c; mixed by weight: a.jsonl:0.7,b/c:0.3."
        ),
    ] = "HuggingFaceH4/ultrafeedback_binarized"
    dataset_split: Annotated[str, Help("Split of --dataset; auto: train_prefs, train, or the only one.")] = "auto"
    dataset_config: Annotated[str | None, Help("Config of --dataset, where it has several (a part with a name).")] = (
        None
    )
    columns: Annotated[
        str | None,
        Help("The data's names of columns that are not found by themselves: prompt=ask,chosen=best. See docs/data.md."),
    ] = None
    pairs: Annotated[
        Literal["best_worst", "all", "adjacent", "above_margin"],
        Help(
            "Which pairs are made of several answers to one prompt with scores or ranks: the best and the worst; every "
            "two; each with the next worse; or every two whose scores differ by --min_margin."
        ),
    ] = "best_worst"
    min_margin: Annotated[
        float, Help("With --pairs above_margin: how much better a pair's chosen answer must be, in the data's scores.")
    ] = 0.0
    eval_dataset: Annotated[
        str | None, Help("Held-out pairs; by default a fixed part of --dataset, chosen by content, is held out.")
    ] = None
    eval_pairs: Annotated[
        int | None, Help("How many pairs to evaluate on, at most; by default 5% of the set, 500 at most. 0: none.")
    ] = None
    output_dir: Annotated[str | None, Help("Folder of this run; by default runs/<model>-<dataset>.")] = None
    cache_dir: Annotated[str, Help("Where tokenised sets and reference tables are kept, by content, for all runs.")] = (
        "~/.cache/dpo_ds"
    )
    trust_remote_code: Annotated[bool, Help("Run Python code that comes with the model.")] = False

    ds_config: Annotated[
        str, Help("DeepSpeed config: auto, a tier of ds_configs/, or a JSON file.", heading="the machine")
    ] = "auto"
    precision: Annotated[Precision, Help("bf16 keeps fp32 master weights. auto: bf16 on a GPU, fp32 on CPU.")] = "auto"
    attention: Annotated[
        Literal["auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa"],
        Help("Attention kernel. auto: the fastest that the GPU and the model support; varlen is torch's own."),
    ] = "auto"
    fuse: Annotated[
        Literal["auto", "on", "off"],
        Help(
            "Compile the layers' norms, rotations and gated activations, each to one kernel. Numbers change by "
            "rounding alone. auto: on a GPU, for the twelve models' architectures, if a try at the start works."
        ),
    ] = "auto"
    gradients: Annotated[
        Literal["auto", "gpu", "gpu_bf16", "host", "deepspeed"],
        Help(
            "Where gradients are summed while a ZeRO-3 tier keeps the optimizer's state on the host: on the GPU in "
            "fp32 or bf16 (12 host bytes a parameter in all), on the host (16), or as DeepSpeed does it (20). auto: "
            "the first that fits. All give the same bits, except gpu_bf16, which rounds the sums. It has no effect on "
            "other tiers."
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        Literal["auto", "on", "off"],
        Help("Recompute activations in backward. auto: the plan turns it on if they do not fit otherwise."),
    ] = "auto"
    recomputed_layers: Annotated[
        int | None,
        Help(
            "How many layers recompute their activations, the first ones; the others keep them. By default as few as "
            "fit, or all with --gradient_checkpointing on."
        ),
    ] = None
    micro_batch_tokens: Annotated[
        int | None,
        Help(
            "The most tokens in one micro-batch on one rank; a packed pair is prompt + chosen + rejected. By default "
            "the most that fits by the plan, up to the rank's share of a step (on CPU 1024, or the longest pair)."
        ),
    ] = None
    scoring_tokens: Annotated[
        int | None,
        Help(
            "The most tokens in a micro-batch without gradients: for the reference table and the held-out pairs. More "
            "of them are faster where weights come from a drive or over a slow link. By default as many as fit in "
            "the memory of a training micro-batch; on CPU, or with --reference_model, as many as in training."
        ),
    ] = None

    plan: Annotated[
        Literal["auto", "only", "measure", "off"],
        Help(
            "auto: estimate memory and disk, pick tier and micro-batch, refuse what cannot fit; only: print the plan "
            "and stop; measure: time a few layers on this machine, say how long a step takes, and stop; off: take the "
            "tier of the model's size class without a check.",
            heading="whether it fits",
        ),
    ] = "auto"
    gpus: Annotated[int | None, Help("Plan for this many GPUs (nodes of 8); by default one for each rank.")] = None
    gpu_memory: Annotated[float | None, Help("Plan for GPUs with this many GiB; by default this machine's.")] = None
    host_memory: Annotated[
        float | None,
        Help(
            "Plan for this many GiB of host memory in each node; by default this machine's, and 1,000 with GPUs that "
            "are not here."
        ),
    ] = None
    nvme: Annotated[
        float | None, Help("Plan for this many GiB on --nvme_path in each node; by default what is free there.")
    ] = None
    machine: Annotated[
        str | None,
        Help(
            "The kind of machine, for the time that the plan estimates: a100-40, a100-80, a100-80-pcie, h100, "
            "h100-pcie or h200; with --gpus, or where no GPU is, also for its memory. By default by the GPU's name or "
            "memory."
        ),
    ] = None
    pair_tokens: Annotated[
        int | None,
        Help("Estimate the time for packed pairs of this mean length in tokens; by default half of the longest."),
    ] = None
    price_per_gpu_hour: Annotated[
        float | None, Help("Estimate the cost as well, in the currency of this price of a GPU for an hour.")
    ] = None
    nvme_path: Annotated[
        str | None, Help("Folder on a fast local disk, for tiers that keep the optimizer's state there.")
    ] = None

    loss: Annotated[
        str,
        Help(
            "The loss, or several that are summed: sigmoid (DPO), simpo, sigmoid,sft, ... See docs/losses.md.",
            heading="the loss",
        ),
    ] = "sigmoid"
    loss_weights: Annotated[str | None, Help("The weight of each of several losses: 1,0.1. By default 1 each.")] = None
    beta: Annotated[
        float | None,
        Help("How strongly the policy is held to the reference; by default the loss decides (DPO: 0.1)."),
    ] = None
    sft_weight: Annotated[
        float | None,
        Help("Adds the loss sft with this weight: fine-tuning's loss on the chosen answers."),
    ] = None
    label_smoothing: Annotated[
        float | None,
        Help("The share of pairs that may be the wrong way round: conservative DPO, robust, exo_pair, ..."),
    ] = None
    f_divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "js", "alpha"] | None,
        Help("The divergence that holds the policy to the reference; by default DPO's reverse_kl."),
    ] = None
    f_alpha: Annotated[
        float | None, Help("With --f_divergence alpha: 0 is the reverse KL, 1 the forward KL; by default 0.5.")
    ] = None
    ld_alpha: Annotated[
        float | None,
        Help("LD-DPO: the weight, 0 to 1, of a pair's longer answer's tokens beyond the shorter one's length."),
    ] = None
    wpo: Annotated[bool, Help("WPO: pairs count more the likelier the policy itself is to give such answers.")] = False
    simpo_gamma: Annotated[float | None, Help("simpo: the margin of rewards to reach; by default 1.")] = None
    orpo_lambda: Annotated[float | None, Help("orpo: the weight of the odds ratio; by default 0.1.")] = None
    cpo_alpha: Annotated[float | None, Help("cpo: the weight of its likelihood of chosen answers; by default 1.")] = (
        None
    )
    dpop_lambda: Annotated[
        float | None, Help("dpop: the weight of what a chosen answer loses against the reference; by default 50.")
    ] = None
    length_alpha: Annotated[
        float | None, Help("rdpo: the reward that one more token brings by being longer; by default 0.01.")
    ] = None
    discopop_tau: Annotated[float | None, Help("discopop: its temperature; by default 0.05.")] = None
    beta_alpha: Annotated[
        float | None, Help("beta_dpo: how much the step's mean margin changes beta; by default 0.6.")
    ] = None
    beta_momentum: Annotated[
        float | None, Help("beta_dpo: how slowly the usual margin follows the steps'; by default 0.9.")
    ] = None
    offset_alpha: Annotated[float | None, Help("odpo: the weight of the log of the data's margin; by default 1.")] = (
        None
    )
    desirable_weight: Annotated[float | None, Help("kto_pair: the weight of chosen answers; by default 1.")] = None
    undesirable_weight: Annotated[float | None, Help("kto_pair: the weight of rejected answers; by default 1.")] = None
    router_aux_loss_coef: Annotated[
        str,
        Help("Weight of a mixture of experts' load-balancing loss, over each pair's tokens; model: as in its config."),
    ] = "0"
    reference: Annotated[
        Literal["auto", "precomputed", "live", "base", "none"],
        Help(
            "Reference log-probabilities: a table made once; a second engine; LoRA's base weights; or none. auto: "
            "precomputed, or none if no loss needs them."
        ),
    ] = "auto"
    reference_model: Annotated[
        str | None,
        Help("Another model as the reference, by default --model itself: hub id or folder, with the same token ids."),
    ] = None
    reference_adapter: Annotated[
        str | None,
        Help("A peft LoRA adapter on the reference's weights, hub id or folder; by default --adapter as it starts."),
    ] = None

    reference_update_every: Annotated[
        int | None,
        Help("TR-DPO: move a --reference live towards the policy after every so many steps; by default it stays."),
    ] = None
    reference_update_alpha: Annotated[
        float | None,
        Help(
            "How far: its weights become alpha * policy + (1 - alpha) * its own; by default 0.6; 1 copies the policy."
        ),
    ] = None
    reference_table: Annotated[
        str | None, Help("Read the reference's log-probabilities from this file of dpo_ds.score --output FILE.")
    ] = None

    learning_rate: Annotated[
        float | None,
        Help(
            "Peak AdamW learning rate; by default the model's size decides, ten times as high with --lora.",
            heading="the optimisation",
        ),
    ] = None
    epochs: Annotated[float, Help("Passes over the training pairs; may be a fraction.")] = 1.0
    max_steps: Annotated[int | None, Help("Optimizer steps; overrides --epochs.")] = None
    global_batch_pairs: Annotated[int, Help("Pairs of one optimizer step, over all ranks and micro-batches.")] = 32
    warmup_ratio: Annotated[float, Help("Fraction of the steps over which the learning rate rises.")] = 0.1
    lr_scheduler: Annotated[
        Literal["linear", "cosine", "constant"], Help("What the learning rate does after the warm-up.")
    ] = "linear"
    weight_decay: Annotated[float, Help("AdamW's weight decay, on matrices only (no biases, no norms).")] = 0.0
    max_grad_norm: Annotated[float, Help("Gradients with a larger norm are scaled down to it; 0: never.")] = 1.0
    seed: Annotated[int, Help("Decides the order of the pairs and LoRA's first weights.")] = 42

    max_length: Annotated[
        int | None,
        Help(
            "Tokens of prompt + the longer answer; by default 1024, or the model's context if less.",
            heading="the data",
        ),
    ] = None
    group_prompts: Annotated[
        bool, Help("Rows that share a prompt are packed together: the prompt is computed once, and each answer.")
    ] = True
    truncation: Annotated[
        Literal["keep_question", "keep_end", "keep_start"],
        Help(
            "keep_question cuts an answer's end before it cuts more than half of the prompt, and the prompt's oldest "
            "turns first; keep_end cuts the prompt's beginning; keep_start cuts prompt + answer at the end."
        ),
    ] = "keep_question"
    min_prompt_tokens: Annotated[
        int | None,
        Help("What keep_question leaves to a prompt that is longer, at least; by default half of --max_length."),
    ] = None
    chat_template: Annotated[
        Literal["auto", "none"], Help("auto: the tokenizer's own template where it has one; none: plain concatenation.")
    ] = "auto"
    chat_template_kwargs: Annotated[
        str, Help("Variables for the chat template, as a JSON object: '{\"enable_thinking\": false}'.")
    ] = ""
    max_left_out: Annotated[float, Help("Stop if more than this fraction of the rows cannot be used.")] = 0.1

    lora: Annotated[bool, Help("Train low-rank adapters (peft) instead of all the weights.", heading="LoRA")] = False
    adapter: Annotated[
        str | None,
        Help("Start from this peft LoRA adapter of --model, hub id or folder; it brings rank, alpha and targets."),
    ] = None
    lora_r: Annotated[int, Help("Rank of the adapters.")] = 16
    lora_alpha: Annotated[float, Help("Their scale is lora_alpha / lora_r.")] = 32.0
    lora_dropout: Annotated[float, Help("Dropout on the adapters' input.")] = 0.0
    lora_targets: Annotated[
        str,
        Help(
            "Comma-separated module names, or all-linear: all but the output head (name lm_head to add it) and fused "
            "experts."
        ),
    ] = "all-linear"

    eval_every: Annotated[
        int | None,
        Help(
            "Steps between evaluations; by default ten in a run. 0: only before and after training.",
            heading="evaluation, checkpoints, export",
        ),
    ] = None
    save_every: Annotated[int, Help("Steps between checkpoints; 0: only the last step's.")] = 0
    keep_last: Annotated[
        int | None,
        Help("Keep only so many of the newest checkpoints; by default all. An older one goes once a new one is whole."),
    ] = None
    keep_best: Annotated[
        Literal["eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"] | None,
        Help("With --keep_last: keep the checkpoint with the best value of this metric as well."),
    ] = None
    on_save_error: Annotated[
        Literal["continue", "stop"],
        Help("When a checkpoint cannot be written, as on a full disk: go on and try again at the next, or stop."),
    ] = "continue"
    resume: Annotated[
        str,
        Help(
            "auto: resume where --output_dir stopped; never; or a checkpoint folder. From another run's checkpoint, a "
            "new --output_dir may begin with another rate, schedule or number of steps."
        ),
    ] = "auto"
    resume_optimizer: Annotated[
        bool, Help("Keep Adam's state when a run begins from another run's checkpoint (--resume).")
    ] = True
    export: Annotated[
        Literal["merged", "none"], Help("Write a plain Hugging Face folder, LoRA merged in, at the end.")
    ] = "merged"
    generations: Annotated[
        int | None, Help("Prompts to answer before and after training; by default 3 for models below 1 B, else 0.")
    ] = None

    max_bad_steps: Annotated[
        int, Help("Stop after so many steps in a row whose loss or gradients are not finite; none of them is applied.")
    ] = 3
    report_to: Annotated[
        str,
        Help(
            "Where the metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio, or several of them with "
            "commas. See docs/running.md."
        ),
    ] = "none"
    stop_seconds: Annotated[
        float,
        Help(
            "Seconds in which a run that a signal or the file stop in its folder asks to stop may end its step and "
            "save; then it ends at once."
        ),
    ] = 600.0
    hang_minutes: Annotated[
        float,
        Help(
            "Minutes without a step or scored answers after which each rank writes its Python stacks and the run ends."
        ),
    ] = 30.0

    def replace(self, **changes: Any) -> "Self":
        return dataclasses.replace(self, **changes)

    def planned(self, **changes: Any) -> "Planned":
        return Planned(**{**vars(self), **changes})

    def decided(self, **changes: Any) -> "Decided":
        return Decided(**{**vars(self), **changes})


# The same fields in the same order, some with a narrower type. kw_only lets those stand here without a default.
@dataclass(frozen=True, kw_only=True)
class Planned(Options):
    """A plan's options: what follows from the model and the machine is filled in."""

    precision: Literal["bf16", "fp32"]
    fuse: Literal["on", "off"]
    gradients: Literal["gpu", "gpu_bf16", "host", "deepspeed"]
    gradient_checkpointing: Literal["on", "off"]
    recomputed_layers: int
    micro_batch_tokens: int
    scoring_tokens: int
    learning_rate: float
    max_length: int
    reference: Literal["precomputed", "live", "base", "none"]

    def __post_init__(self) -> None:
        _require_filled(self, Planned)


@dataclass(frozen=True, kw_only=True)
class Decided(Planned):
    """A run's options: nothing is left to decide. What may still be None has no value in this run."""

    output_dir: str
    eval_every: int
    generations: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_filled(self, Decided)


def _require_filled(options: Options, kind: type[Options]) -> None:
    """Raises AssertionError if a field that `kind` narrows still has its default, which stands for "not decided"."""
    for name in kind.__annotations__:
        assert getattr(options, name) != FIELDS[name].default, f"{kind.__name__} options need a value for {name}"


# Fields that say where or how to run, not what to compute: two runs that differ only here are the same run.
NOT_IDENTITY = frozenset(
    {"output_dir", "cache_dir", "resume", "resume_optimizer", "export", "generations", "save_every", "eval_every"}
    | {"attention", "fuse", "report_to", "stop_seconds", "hang_minutes", "max_bad_steps"}
    | {"keep_last", "keep_best", "on_save_error"}
    | {"plan", "gpus", "gpu_memory", "host_memory", "nvme", "nvme_path", "machine", "pair_tokens"}
    | {"price_per_gpu_hour"}
)

# Options that --adapter decides.
ADAPTERS_OWN = ("lora_r", "lora_alpha", "lora_targets")

# What --columns may name: these are the names that data/rows/forms.py looks for.
COLUMNS = (
    *("prompt", "messages", "question", "instruction", "input", "system", "history", "tools", "chat_template_kwargs"),
    *("chosen", "rejected", "response_a", "response_b", "preference", "responses", "scores", "ranks"),
    *("ranked_responses", "score_chosen", "score_rejected", "weight", "margin"),
)

# The most that a number may be: what is above it is a slip of the hand, and would run for years or overflow in torch.
# An option that is not named here has the limit of its type. A whole number must fit a file's int64, a fraction fp32.
MOST = {
    "seed": 2**64 - 1,  # torch takes no larger one
    "epochs": 1e6,
    "max_steps": 10**9,
    "global_batch_pairs": 10**9,
    "micro_batch_tokens": 2**24,
    "scoring_tokens": 2**24,
    "max_length": 2**24,
    "lora_r": 2**16,
    "gpus": 10**6,
    "gpu_memory": 1e6,
    "host_memory": 1e6,
    "nvme": 1e9,
    "pair_tokens": 2**24,
    "price_per_gpu_hour": 1e6,
    "hang_minutes": 3e4,  # torch counts milliseconds in 32 bits
}
MOST_OF_TYPE = {int: 2**63 - 1, float: 1e30}

# What --report_to may name.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

DESCRIPTION = "The options of a run. --model alone is enough; the rest follows from the model and the machine."

FIELDS = {field.name: field for field in dataclasses.fields(Options)}
# Other spellings of an option, as a flag and in YAML.
ALIASES = {"model_name": "model"}

_TYPES = get_type_hints(Options)
_HELP: dict[str, Help] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()
}


def help_of(name: str) -> str:
    return _HELP[name].text


def group_of(name: str) -> str:
    """The heading of the option's group: its own, or the nearest above it."""
    names = list(FIELDS)
    return next(heading for above in names[names.index(name) :: -1] if (heading := _HELP[above].heading))


def parse_options(argv: list[str], command: str = "train", positional: str | None = None) -> Options:
    """Options from flags, over a YAML file if `--config FILE` is among them (a later flag overrides an earlier one).

    positional: the option whose value may stand without its flag. Raises UserError, in one line, for unknown keys
    (naming the nearest), wrong types and values out of range.
    """
    words = _flags_of_config(argv) + argv
    _refuse_secrets(words)
    values, unknown = _parser(command).parse_known_args(words)
    if positional is not None and unknown and not unknown[0].startswith("-"):
        if any(word.partition("=")[0] == f"--{positional}" for word in argv):
            raise UserError(f"{one_line(unknown[0])} and --{positional} name the same thing: leave out one of them")
        setattr(values, positional, unknown.pop(0))
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"unexpected argument {one_line(unknown[0], None)}: options are written --name value")
    if unknown:
        raise UserError(_unknown(unknown[0], ["--" + name for name in [*FIELDS, *ALIASES, "config"]]))
    options = Options(**{name: getattr(values, name) for name in FIELDS})
    if options.adapter is not None:
        if given := [name for name in ADAPTERS_OWN if any(word.partition("=")[0] == f"--{name}" for word in words)]:
            raise UserError(f"--adapter {options.adapter} brings its own --{given[0]}: leave out one of them")
        options = options.replace(lora=True)
    check(options)
    if options.plan == "measure" and command != "train":
        raise UserError(f"--plan measure is for dpo_ds.train, and dpo_ds.{command} was called: leave it out")
    return options


def _refuse_secrets(words: list[str]) -> None:
    """Raises UserError, without repeating it, for a token or a password: a run writes its options to several files."""
    for place, word in enumerate(words):
        if holds_secret(word):
            flag = word if word.startswith("--") else words[place - 1]
            name = flag.partition("=")[0] if place or word.startswith("--") else "an argument"
            raise UserError(
                f"{name if not holds_secret(name) else 'an argument'} holds a token or a password, and options are "
                "written to the run's files: set HF_TOKEN, or run `hf auth login`, and leave it out"
            )


def given(argv: list[str]) -> set[str]:
    """The names of the options that flags or a --config file among them give."""
    words = _flags_of_config(argv) + argv
    names = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    return {ALIASES.get(name, name) for name in names}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def _parser(command: str) -> Parser:
    """argparse's parser for the fields of Options, in groups under their headings."""
    parser = Parser(
        prog=f"python -m dpo_ds.{command}",
        usage="%(prog)s [--config FILE] [--name value ...]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it.")
    # Both launchers pass the rank's number as a flag. We read it from the environment, so help hides the flag.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    headings = dict.fromkeys(group_of(name) for name in FIELDS)
    groups = {heading: parser.add_argument_group(heading) for heading in headings}
    for name, field in FIELDS.items():
        flags = ["--" + name, *("--" + alias for alias, of in ALIASES.items() if of == name)]
        text = help_of(name) + (f" (default: {field.default})" if field.default not in (None, "") else "")
        text = text.replace("%", "%%")  # argparse would read a lone % as a format
        groups[group_of(name)].add_argument(*flags, default=field.default, help=text, **_reading(name))
    return parser


def _reading(name: str) -> dict[str, Any]:
    """The arguments of `add_argument` for the field's type."""
    kind = _TYPES[name]
    if NoneType in get_args(kind):  # X | None: a value that is given is an X
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:  # a bare --lora means true
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": kind, "metavar": {str: "TEXT", int: "INTEGER", float: "NUMBER"}[kind]}


def _true_or_false(text: str) -> bool:
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _flags_of_config(argv: list[str]) -> list[str]:
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    paths += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    flags = []
    for path in paths:
        for key, value in _read_yaml(path).items():
            key = ALIASES.get(key, key)
            if key not in FIELDS:
                raise UserError(f"{path}: {_unknown(str(key), list(FIELDS))}")
            if isinstance(value, (list, dict)):
                raise UserError(f"{path}: {key} takes a single value, not a {type(value).__name__}")
            if value is not None:  # null: the default
                flags.append(f"--{key}={value}")
    return flags


class _OneOfEach(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice. By itself it takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [ALIASES.get(key, key) for key in keys]
        if twice := [key for key, name in zip(keys, names, strict=True) if names.count(name) > 1]:
            raise UserError(f"{' and '.join(map(one_line, twice[:2]))} set the same option: leave out one of them")
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
        _require_checksum(text, path)
        content = yaml.load(text, Loader=_OneOfEach)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; name a YAML file of options") from None
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {one_line(error, None)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no 'key: value' lines")
    return content


def _unknown(word: str, known: list[str]) -> str:
    name = one_line(word.split("=")[0], None)
    [nearest] = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown option {name}; did you mean {nearest}? (--help lists all)"


def read_columns(text: str | None) -> dict[str, str]:
    """What --columns says: {our name: the data's column}. Raises UserError for what is not of the form name=column."""
    found: dict[str, str] = {}
    for entry in (text or "").split(",") if text is not None else []:
        name, equals, column = (part.strip() for part in entry.partition("="))
        if not equals or not name or not column:
            raise UserError(f"--columns {one_line(text or '')}: write name=column, as in prompt=question,chosen=best")
        if name not in COLUMNS:
            [nearest] = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.0)
            raise UserError(f"--columns has no name {name}; did you mean {nearest}? It takes {', '.join(COLUMNS)}")
        if name in found:
            raise UserError(f"--columns names {name} twice: {found[name]} and {column}")
        found[name] = column
    return found


def trackers_of(options: Options) -> list[str]:
    """What --report_to names. Raises UserError for what is no tracker."""
    names = [name.strip() for name in options.report_to.split(",")]
    if names == ["none"]:
        return []
    for name in names:
        if name not in TRACKERS:
            [nearest] = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.0)
            raise UserError(
                f"--report_to has no {one_line(name)}; did you mean {nearest}? It takes none, or {', '.join(TRACKERS)}"
            )
    return list(dict.fromkeys(names))


def check(options: Options) -> None:
    """Raises UserError for values that are wrong for every model, data set and machine."""
    if not options.model:
        raise UserError("--model is needed: name a hub id, a local folder, or tiny-gpt2")
    _require_sane_numbers(options)
    for name in (
        "beta",
        "epochs",
        "global_batch_pairs",
        "max_steps",
        "lora_r",
        "lora_alpha",
        "micro_batch_tokens",
        "scoring_tokens",
        "max_bad_steps",
        "stop_seconds",
        "hang_minutes",
        "keep_last",
    ):
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
        "price_per_gpu_hour",
    ):
        _require(options, name, lambda x: x >= 0, "0 or more")
    for name in ("gpus", "gpu_memory", "host_memory"):
        _require(options, name, lambda x: x > 0, "more than 0")
    for name in ("warmup_ratio", "max_left_out"):
        _require(options, name, lambda x: 0 <= x <= 1, "between 0 and 1")
    _require(options, "ld_alpha", lambda x: 0 <= x <= 1, "between 0 and 1")
    _require(options, "sft_weight", lambda x: x > 0, "more than 0")
    _require(options, "lora_dropout", lambda x: 0 <= x < 1, "from 0 to below 1")
    _require(options, "max_length", lambda x: x >= 2, "2 or more: a token of the prompt and one of an answer")
    _require(options, "pair_tokens", lambda x: x >= 3, "3 or more: a token of the prompt and one of each answer")
    _require(options, "min_prompt_tokens", lambda x: x > 0, "more than 0")
    if options.min_prompt_tokens is not None and options.truncation != "keep_question":
        raise UserError("--min_prompt_tokens is for --truncation keep_question: leave one of them out")
    most = options.max_length
    if most is not None:
        _require(options, "min_prompt_tokens", lambda x: x < most, f"less than --max_length, {most}")
    template_variables(options)
    _require(options, "recomputed_layers", lambda x: x >= 0, "0 or more")
    if options.recomputed_layers is not None:
        contradicted = "off" if options.recomputed_layers else "on"
        if options.gradient_checkpointing == contradicted:
            raise UserError(
                f"--gradient_checkpointing {contradicted} and --recomputed_layers {options.recomputed_layers} "
                "contradict each other: leave one of them out"
            )
    _require(options, "seed", lambda x: x >= 0, "0 or more")
    _require(options, "min_margin", lambda x: x >= 0, "0 or more")
    if options.min_margin and options.pairs != "above_margin":
        raise UserError("--min_margin is for --pairs above_margin: add that, or leave out --min_margin")
    read_columns(options.columns)
    trackers_of(options)
    if options.router_aux_loss_coef != "model":
        _require_number("router_aux_loss_coef", options.router_aux_loss_coef)
    if options.reference_model is not None and options.reference in ("base", "none"):
        raise UserError(f"--reference {options.reference} scores no --reference_model: leave one of them out")
    if options.reference_adapter is not None and options.reference in ("base", "none"):
        raise UserError(f"--reference {options.reference} scores no --reference_adapter: leave one of them out")
    if options.reference_table is not None:
        if options.reference not in ("auto", "precomputed"):
            raise UserError(f"--reference {options.reference} reads no --reference_table: leave one of them out")
        for name in ("reference_model", "reference_adapter"):
            if getattr(options, name) is not None:
                raise UserError(f"--reference_table already has the values of a reference: leave out --{name}")
    _require(options, "reference_update_every", lambda x: x > 0, "more than 0")
    _require(options, "reference_update_alpha", lambda x: 0 < x <= 1, "above 0 and at most 1")
    if options.reference_update_alpha is not None and options.reference_update_every is None:
        raise UserError("--reference_update_alpha is for --reference_update_every: add that, or leave it out")
    if options.reference_update_every is not None:
        if options.reference != "live":
            raise UserError(
                f"--reference_update_every moves a reference's weights, and --reference {options.reference} has none: "
                "add --reference live"
            )
        for name in ("reference_model", "reference_adapter"):
            if getattr(options, name) is not None:
                raise UserError(f"--reference_update_every mixes policy and reference: leave out --{name}")
        if options.lora:
            raise UserError(
                "--reference_update_every moves all weights, and --lora trains adapters: train all weights, or leave "
                "--reference_update_every out"
            )
    if options.reference == "base" and not options.lora:
        raise UserError("--reference base uses LoRA's frozen base weights: add --lora, or use --reference precomputed")


def template_variables(options: Options) -> dict[str, Any]:
    """--chat_template_kwargs. Raises UserError if that is not a JSON object."""
    text = options.chat_template_kwargs
    try:
        variables = json.loads(text) if text else {}
    except ValueError:
        variables = None
    if not isinstance(variables, dict):
        raise UserError(
            f"--chat_template_kwargs is {one_line(text)}, but must be a JSON object, such as "
            "'{\"enable_thinking\": false}'"
        )
    return variables


def _require(options: Options, name: str, holds: Callable[[float], bool], wanted: str) -> None:
    value = getattr(options, name)
    if value is not None and not holds(value):
        raise UserError(f"--{name} is {value}, but must be {wanted}")


def _require_sane_numbers(options: Options) -> None:
    for name in FIELDS:
        value = getattr(options, name)
        if type(value) not in MOST_OF_TYPE:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} is {value}, but must be finite")
        if value > (most := MOST.get(name, MOST_OF_TYPE[type(value)])):
            raise UserError(f"--{name} is {value}, but must be at most {most:,}: lower it")


def _require_number(name: str, text: str) -> None:
    try:
        fine = math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        fine = False
    if not fine:
        raise UserError(f"--{name} is {one_line(text, None)}, but must be 0, a number above it, or model")


MARK = "# A run wrote the lines below. Take this line away where you change one: "  # then comes their checksum


def with_checksum(text: str) -> str:
    """The text of an options.yaml, after a line with its checksum."""
    return f"{MARK}{of_bytes(text.encode())}\n{text}"


def _require_checksum(text: str, path: str) -> None:
    """Raises UserError if a file begins as one that a run wrote, and is not as the run wrote it."""
    first, _, rest = text.partition("\n")
    if first.startswith(MARK) and first.removeprefix(MARK) != of_bytes(rest.encode()):
        raise UserError(
            f"--config {path} is not as a run wrote it: if you changed it, take its first line away; else it is "
            "damaged, and the command that started the run writes it again"
        )


def to_yaml(options: Options) -> str:
    """The options as YAML that `--config` reads back to an equal object, but for what --adapter will decide again."""
    values = dataclasses.asdict(options)
    if options.adapter is not None:
        values = {name: value for name, value in values.items() if name not in ADAPTERS_OWN}
    return yaml.safe_dump(values, sort_keys=False)
