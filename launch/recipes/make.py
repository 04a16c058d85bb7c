"""Writes the recipes beside it: python launch/recipes/make.py

One for each of the twelve models, all weights and LoRA. What a recipe's head says is the plan's (dpo_ds/plan/), for
the machine below; tests/unit/test_recipes.py makes them again and compares.
"""

from pathlib import Path

from dpo_ds.config import Options
from dpo_ds.engine import join
from dpo_ds.losses.table import losses_of
from dpo_ds.models.find import known_models
from dpo_ds.plan.choose import choose
from dpo_ds.plan.machine import GIB, Machine
from dpo_ds.plan.refuse import described
from dpo_ds.plan.speeds import named

MACHINE = Machine(8, 8, gpu_memory=80 * GIB, host_memory=1000 * GIB, speeds=named("a100-80"))
WHY = {
    "model": "Hub id, or a folder with this model's weights.",
    "dataset": "61,000 pairs with GPT-4's preferences; or your own file with prompt, chosen and rejected.",
    "output_dir": "The run's folder; the same command resumes where it stopped.",
    "ds_config": "The DeepSpeed config that the plan picks for the machine above (ds_configs/README.md says why).",
    "gradient_checkpointing": "Recompute activations, as the plan decides; on repeats each forward.",
    "micro_batch_tokens": "Tokens a GPU takes at a time; null: the plan finds the most that fits.",
    "precision": "Weights and activations; the optimizer's copy of the weights is fp32.",
    "beta": "How strongly the policy is held to the reference; Zephyr (arXiv 2310.16944) and most since: 0.1.",
    "learning_rate": "Chosen by the model's size, ten times as high for adapters; Zephyr's 7 B used 5e-7.",
    "global_batch_pairs": "Pairs of one optimizer step, whatever the number of GPUs.",
    "epochs": "Passes over the pairs; more than one to three overfits preferences.",
    "max_length": "Tokens of prompt + the longer response; longer prompts lose their beginning.",
    "warmup_ratio": "Fraction of the steps over which the learning rate rises.",
    "lr_scheduler": "What the learning rate does after the warm-up.",
    "max_grad_norm": "Gradients above this norm are scaled down to it.",
    "save_every": "Steps between checkpoints; all are kept, each of the size above.",
    "seed": "Decides the order of the pairs.",
    "lora": "Train low-rank adapters; they are merged into the exported model.",
    "lora_r": "Rank of the adapters.",
    "lora_alpha": "The adapters' scale is lora_alpha / lora_r.",
    "lora_targets": "Linear modules that get an adapter: all but the output head; fused experts get none.",
    "reference": "base: the frozen weights under the adapters; precomputed: a table, made once and kept.",
}


def name(model: str, lora: bool) -> str:
    return f"{model.rpartition('/')[2]}-{'lora' if lora else 'full'}.yaml"


def text(model: str, lora: bool) -> str:
    options = Options(model=model, lora=lora)
    chosen = choose(options, MACHINE)
    decided = chosen.options
    values = {
        "model": model,
        "dataset": options.dataset,
        "output_dir": f"runs/{name(model, lora).removesuffix('.yaml')}",
        "ds_config": decided.ds_config,
        "gradient_checkpointing": f'"{decided.gradient_checkpointing}"',  # YAML 1.1 reads a bare on as true
        "micro_batch_tokens": "null",
        "precision": decided.precision,
        "beta": losses_of(options)[0].settings.beta,
        "learning_rate": f"{decided.learning_rate:.0e}".replace("e-0", "e-"),
        "global_batch_pairs": options.global_batch_pairs,
        "epochs": options.epochs,
        "max_length": decided.max_length,
        "warmup_ratio": options.warmup_ratio,
        "lr_scheduler": options.lr_scheduler,
        "max_grad_norm": options.max_grad_norm,
        "save_every": 500,
        "seed": options.seed,
        "reference": "precomputed",
    }
    if lora:
        values |= {key: getattr(options, key) for key in ("lora_r", "lora_alpha", "lora_targets")} | {"lora": "true"}
    head = [
        f"# deepspeed --num_gpus {MACHINE.ranks} -m dpo_ds.train --config launch/recipes/{name(model, lora)}",
        "#",
        *(f"# {line}".rstrip() for line in described(chosen).splitlines()),
    ]
    return "\n".join(head) + "\n\n" + "".join(f"# {WHY[key]}\n{key}: {value}\n" for key, value in values.items())


def main() -> None:
    join.quiet_start()
    for model in known_models():
        for lora in (False, True):
            Path(__file__).with_name(name(model, lora)).write_text(text(model, lora), encoding="utf-8")


if __name__ == "__main__":
    main()
