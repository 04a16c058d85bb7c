"""Shows that a change moved nothing: compares loss curves, exported bytes and `plan --all` of two checkouts.

    python benchmarks/same_behaviour.py record CHECKOUT FILE     makes twenty runs of that checkout; about five minutes
    python benchmarks/same_behaviour.py compare FILE FILE        ends with exit code 1 if a number or a byte differs

Only the public commands are used, so the two checkouts may differ inside. The first recording makes the tiny models
in --models; later recordings use them. Bind each recording to one core (`taskset -c 0 python …`): with several threads,
sums in older checkouts have no fixed order.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CURVES = ("loss", "rewards/margins", "grad_norm", "learning_rate", "eval/loss", "aux_loss")
MIXTRAL = "Mixtral-8x7B-Instruct-v0.1"
COMMON = ("--dataset=sample --max_steps=5 --global_batch_pairs=8 --learning_rate=4e-4 --max_length=96 --eval_pairs=6 "
          "--generations=0 --host_memory=20").split()  # fmt: skip
# Runs besides those of the twelve twins on one rank: (name, model, ranks, options).
OTHERS = (
    ("two ranks, ZeRO-3", "gpt2", 2, ["--ds_config=zero3_standard"]),
    ("two ranks, ZeRO-2", "Meta-Llama-3-8B-Instruct", 2, ["--ds_config=zero2_small"]),
    ("ZeRO-3, optimizer on the host", "Qwen2-7B-Instruct", 1, ["--ds_config=zero3_offload_large"]),
    ("LoRA, base reference", "Meta-Llama-3-8B-Instruct", 1, ["--lora", "--reference=base", "--lora_dropout=0.1"]),
    ("LoRA on the head, two ranks", "Yi-34B-Chat", 2,
     ["--lora", "--lora_targets=q_proj,lm_head", "--ds_config=zero3_standard"]),
    ("live reference, recomputed", "gpt2", 1, ["--reference=live", "--gradient_checkpointing=on"]),
    ("bf16", "Meta-Llama-3-8B-Instruct", 1, ["--precision=bf16", "--ds_config=zero2_small"]),
    ("router loss, two ranks", MIXTRAL, 2, ["--router_aux_loss_coef=model", "--ds_config=zero3_standard"]),
)  # fmt: skip


def environment(checkout: Path) -> dict:
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "RANK", "WORLD_"))}
    tests = checkout / "tests"
    return {**keep, "PYTHONPATH": f"{checkout}:{tests}:{tests / 'tools'}", "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def execute(checkout: Path, *words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], env=environment(checkout), cwd=checkout, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{checkout}: {words} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def make_twins(checkout: Path, models: Path) -> list[str]:
    script = (
        "import sys, tiny; from pathlib import Path\n"
        "for name in tiny.TWELVE: tiny.make(name, Path(sys.argv[1], name.rpartition('/')[2]))"
    )
    if not models.is_dir():
        partial = models.with_name(models.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        execute(checkout, "-c", script, partial)
        partial.rename(models)
    return sorted(path.name for path in models.iterdir())


def facts_of(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = {key: [line[key] for line in lines if key in line] for key in CURVES}
    # The model card is left out, because it names the run's folder.
    merged = sorted(path for path in (run / "merged").rglob("*") if path.is_file() and path.suffix != ".md")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in merged}
    return {"curves": {key: values for key, values in curves.items() if values}, "merged": hashes}


def record(checkout: Path, models: Path) -> dict:
    twins = make_twins(checkout, models)
    found = {"runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, model, ranks, options) in enumerate([(twin, twin, 1, []) for twin in twins] + list(OTHERS)):
            out = Path(folder, str(number))
            start = ["-m", "dpo_ds.train"]
            if ranks > 1:
                port = 20_000 + os.getpid() % 9_000 + number  # two recordings may run side by side
                start = ["-m", "dpo_ds.deepspeed_command", "--num_gpus", ranks, "--master_port", port, *start]
            execute(checkout, *start, f"--model={models / model}", f"--output_dir={out}",
                    f"--cache_dir={folder}/cache", *COMMON, *options)  # fmt: skip
            found["runs"][name] = facts_of(out)
            print(f"{name}: {found['runs'][name]['curves']['loss'][-1]}", flush=True)
    found["plan"] = execute(checkout, "-m", "dpo_ds.plan", "--all").splitlines()
    return found


def compare(one: dict, other: dict) -> list[str]:
    wrong = []
    for name in one["runs"].keys() | other["runs"].keys():
        first, second = one["runs"].get(name, {}), other["runs"].get(name, {})
        wrong += [f"{name}: {part} differ" for part in ("curves", "merged") if first.get(part) != second.get(part)]
    return wrong + ([] if one["plan"] == other["plan"] else ["plan --all differs"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("paths", nargs=2, type=Path)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir(), "dpo_ds-twins"))
    options = parser.parse_args()
    if options.what == "record":
        checkout, file = (path.resolve() for path in options.paths)
        file.write_text(json.dumps(record(checkout, options.models.resolve()), indent=1))
        return 0
    one, other = (json.loads(path.read_text()) for path in options.paths)
    wrong = compare(one, other)
    print("\n".join(wrong) or f"{len(one['runs'])} runs and the plan's table are the same")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
