"""Is every loss that TRL has the same here? Five optimizer steps of each, on the same pairs from the same weights.

    python benchmarks/parity_trl.py [CASE ...]        (ten minutes on two cores)

Full runs start from another model than the reference, so that log-ratios are away from zero. LoRA's start equal and
move apart. A step holds all pairs, so that TRL's own means over a micro-batch are means over the step. The loss and the
gradient's norm of each step are compared, and the largest relative difference is written to results/parity_trl.json.
beta is 0.1 on both sides, TRL's default, where a case does not say otherwise.

Where the two differ by design, `KNOWN` says why; these are compared with what the paper says in tests/unit/losses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import work

STEPS, PAIRS, RATE, MAX_LENGTH = 5, 4, 2e-4, 256
LORA = {"lora": "true", "lora_r": 4, "lora_alpha": 8}

# name: (dpo_ds's options, TRL's config; with "trainer" that of trl.experimental's cpo or orpo, else DPOConfig)
CASES: dict[str, tuple[dict, dict]] = {
    **{
        name: ({"loss": name}, {"loss_type": name})
        for name in ("sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
    },
    "exo_pair": ({"loss": "exo_pair"}, {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
    "robust": ({"loss": "robust"}, {"loss_type": "robust", "label_smoothing": 0.1}),
    "discopop": ({"loss": "discopop"}, {"loss_type": "discopop"}),
    "sigmoid_norm": ({"loss": "sigmoid_norm", "beta": 5.0}, {"loss_type": "sigmoid_norm", "beta": 5.0}),
    "sft": ({"loss": "sft"}, {"loss_type": "sft"}),
    "aot-smoothed": ({"loss": "aot", "label_smoothing": 0.2}, {"loss_type": "aot", "label_smoothing": 0.2}),
    "sum": (
        {"loss": "sigmoid,sft", "loss_weights": "0.8,0.3"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
    ),
    "forward_kl": ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js": ({"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    # TRL's coefficient is 1 - alpha of the paper's (Wang et al. 2023, table 1).
    "alpha": (
        {"f_divergence": "alpha", "f_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "ld": ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    "wpo": ({"wpo": "true"}, {"use_weighting": True}),
    "bco_pair": ({"loss": "bco_pair"}, {"loss_type": "bco_pair"}),
    "cdpo": ({"label_smoothing": 0.2}, {"loss_type": "sigmoid", "label_smoothing": 0.2}),
    "simpo": (
        {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
        {"trainer": "cpo", "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "cpo": ({"loss": "cpo", "cpo_alpha": 0.5}, {"trainer": "cpo", "loss_type": "sigmoid", "cpo_alpha": 0.5}),
    "orpo": ({"loss": "orpo", "orpo_lambda": 0.1}, {"trainer": "orpo"}),
}
KNOWN = {
    "bco_pair": "TRL leaves out the paper's reward shift, the running mean of the rewards (Jung et al. 2024)",
    "cdpo": "TRL ignores label_smoothing with its sigmoid loss; cDPO is -(1 - e) log sigmoid(h) - e log sigmoid(-h)",
    "orpo": "TRL's likelihood term is over the prompt's tokens, too",
}
FREE = {"sft", "simpo", "cpo", "orpo"}  # read no reference


def rows() -> list[dict]:
    """Short real pairs."""
    short = [row for row in work.read("hh") if sum(map(len, row.values())) < 400]
    return short[:PAIRS]


def start(folder: Path) -> tuple[Path, Path]:
    """The policy's first weights, and the reference's: the same with noise."""
    import torch
    from transformers import LlamaForCausalLM

    policy = work.make_model(folder / "policy", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = LlamaForCausalLM.from_pretrained(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "reference")
    work.tokenizer().save_pretrained(folder / "reference")
    return policy, folder / "reference"


def ours(folder: Path, names: list[str]) -> dict[str, list]:
    """{case: [(loss, gradient norm) of each step]}, full and LoRA."""
    from dpo_ds.config import parse_options
    from dpo_ds.engine import join
    from dpo_ds.runs.prepare import prepare
    from dpo_ds.train import train

    here, found = join.join(), {}
    for name in names:
        for kind in ("full", "lora"):
            options = {
                "model": folder / "policy", "dataset": folder / "pairs.jsonl", "max_length": MAX_LENGTH, "plan": "off",
                "truncation": "keep_start", "eval_pairs": 0, "output_dir": folder / f"{name}-{kind}", "export": "none",
                "cache_dir": folder / "cache", "seed": work.SEED, "global_batch_pairs": PAIRS, "max_steps": STEPS,
                "lr_scheduler": "constant", "warmup_ratio": 0, "learning_rate": RATE * (10 if kind == "lora" else 1),
                "precision": "fp32", "ds_config": "zero0_debug", **(LORA if kind == "lora" else {}), **CASES[name][0],
            }  # fmt: skip
            if name not in ("sft", "orpo"):  # have no beta
                options.setdefault("beta", 0.1)
            if name not in FREE:
                options |= {"reference_model": folder / "reference"} if kind == "full" else {}
            run = prepare(parse_options([f"--{key}={value}" for key, value in options.items()]), here)
            train(run, save=False)
            lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
            found[f"{name}-{kind}"] = [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]
    return found


def theirs(folder: Path, names: list[str]) -> dict[str, list]:
    """The same by TRL's trainers."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainers = {"dpo": (DPOTrainer, DPOConfig), "cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}
    words = AutoTokenizer.from_pretrained(folder / "policy")
    words.pad_token = words.eos_token
    words.bos_token = None  # GPT-2's tokenizer writes none, and the experimental trainers would
    data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder / "trl"))
    found = {}
    for name in names:
        for kind in ("full", "lora"):
            losses, norms = [], []
            wanted = dict(CASES[name][1])
            trainer, config_of = trainers[wanted.pop("trainer", "dpo")]

            class Exact(trainer):
                """Keeps each step's loss, which the log rounds."""

                def compute_loss(self, *args, losses=losses, **kwargs):
                    loss = super().compute_loss(*args, **kwargs)
                    losses.append(float(loss.detach()))
                    return loss

            class Norms(TrainerCallback):
                def on_log(self, args, state, control, logs, norms=norms, **kwargs):
                    if "grad_norm" in logs:
                        norms.append(float(logs["grad_norm"]))

            config = config_of(
                output_dir=str(folder / f"trl-{name}-{kind}"), per_device_train_batch_size=PAIRS, max_steps=STEPS,
                learning_rate=RATE * (10 if kind == "lora" else 1), lr_scheduler_type="constant", weight_decay=0.0,
                max_grad_norm=1.0, max_length=MAX_LENGTH, bf16=False, use_cpu=True, gradient_checkpointing=False,
                logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=work.SEED, **wanted,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
            reference = None
            if kind == "lora":
                linear = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
                adapters = LoraConfig(
                    task_type="CAUSAL_LM", r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"], lora_dropout=0.0,
                    target_modules=sorted(linear - {"lm_head"}),
                )  # fmt: skip
                torch.manual_seed(work.SEED)  # as dpo_ds/models/lora.py does
                model = get_peft_model(model, adapters)
            else:
                reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32)
            more = {"ref_model": reference} if trainer is DPOTrainer else {}
            Exact(
                model, args=config, train_dataset=data, processing_class=words, callbacks=[Norms()], **more
            ).train()  # fmt: skip
            found[f"{name}-{kind}"] = list(zip(losses, norms, strict=True))
    return found


def side(name: str, folder: Path, names: list[str]) -> dict[str, list]:
    """Runs one side in its own process."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", name, str(folder), *names], capture_output=True, text=True, cwd=work.ROOT
    )
    return work.required_result_of(done)


def compare(ours: dict[str, list], theirs: dict[str, list]) -> dict[str, dict]:
    """For each run the largest relative difference of losses and of gradient norms, and our curve."""
    table = {}
    for run, steps in ours.items():
        differences = [
            max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(column, column_there, strict=True))
            for column, column_there in zip(zip(*steps, strict=True), zip(*theirs[run], strict=True), strict=True)
        ]
        name = run.rpartition("-")[0]
        table[run] = {
            "loss off by": differences[0],
            "gradient norm off by": differences[1],
            "losses": [loss for loss, _ in steps],
            "losses of TRL": [loss for loss, _ in theirs[run]],
            **({"known": KNOWN[name]} if name in KNOWN else {}),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--output", type=Path, help="the JSON file; by default results/parity_trl.json, of all cases")
    asked = parser.parse_args()
    names = asked.cases or list(CASES)
    os.environ["PYTHONPATH"] = f"{work.ROOT}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start(folder)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
        table = compare(side("ours", folder, names), side("theirs", folder, names))
    for run, found in table.items():
        print(
            f"{run:20s} loss {found['loss off by']:.1e}  gradient norm {found['gradient norm off by']:.1e}", flush=True
        )
    file = asked.output or (work.RESULTS / "parity_trl.json" if names == list(CASES) else None)
    if file is not None:
        facts = {"machine": work.machine(), "steps": STEPS, "pairs": PAIRS, "runs": table}
        file.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        which, where, *some = sys.argv[2:]
        print("RESULT " + json.dumps({"ours": ours, "theirs": theirs}[which](Path(where), some)))
    else:
        main()
