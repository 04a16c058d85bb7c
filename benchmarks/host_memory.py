"""The host memory of an optimizer that is there, in each form that its gradients can have, by real runs on two ranks.

    python benchmarks/host_memory.py [--sizes 78 155 334]

A run trains on the tier of large models, but with small sub-groups, with weights in bf16 and sums in fp32. It saves a
checkpoint, and a second start resumes it. Measured is each rank's own memory (tests/tools/memory.py), mapped files not
counted, summed over the ranks: what stays between two steps, the peak, and the peak of the start that resumes. On CPU,
the "GPU" is host memory as well. Beside them stand the plan's bytes by role. Written to results/host_memory.json and
.png.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import work

sys.path.insert(0, str(work.ROOT / "tests" / "tools"))

import launching

# millions of parameters: (hidden size, intermediate size, layers)
SIZES = {78: (768, 2048, 6), 155: (768, 2048, 18), 334: (1024, 2816, 24)}
FORMS = ("deepspeed", "host", "gpu", "gpu_bf16")
RANKS, GROUP = 2, 10**7  # ranks; parameters of a sub-group


def argv(place: Path, size: int, form: str, **more: object) -> list[str]:
    options = {
        "model": place / str(size), "dataset": "sample", "ds_config": place / "tier.json", "output_dir": place / form,
        "cache_dir": place / "cache", "loss": "simpo", "max_steps": 2, "save_every": 2, "keep_last": 1,
        "global_batch_pairs": 8, "max_length": 64, "micro_batch_tokens": 256, "eval_pairs": 0, "export": "none",
        "precision": "bf16", "gradients": form, "lr_scheduler": "constant", "warmup_ratio": 0, **more,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def started(words: list[str], folder: Path) -> dict[str, int]:
    """Bytes of all ranks in one start."""
    found = launching.measured(RANKS, words, folder)
    return {key: sum(rank[key] for rank in found) for key in ("state", "peak")}


def planned(place: Path, size: int, form: str) -> dict[str, int]:
    """The plan's bytes of what stays, by role."""
    from dpo_ds.config import parse_options
    from dpo_ds.plan.choose import choose
    from dpo_ds.plan.machine import GIB, Machine

    plan = choose(parse_options(argv(place, size, form)), Machine(RANKS, RANKS, None, 64 * GIB))
    return {
        part.what: part.bytes
        for part in plan.parts
        if part.where == "host" and part.when == "always" and part.what != "processes"
    }


def measure(size: int, form: str, place: Path) -> dict:
    first = started(argv(place, size, form), place / form)
    resumed_in, checkpoint = place / f"{form}-resumed", place / form / "checkpoints" / "step-000002"
    words = argv(place, size, form, resume=checkpoint, output_dir=resumed_in, max_steps=4)
    resumed = started(words, resumed_in)
    for folder in (place / form, resumed_in):
        shutil.rmtree(folder)
    return {
        "size": size,
        "form": form,
        "planned": planned(place, size, form),
        "stays": first["state"],
        "peak": first["peak"],
        "peak of a resumed start": resumed["peak"],
    }


def plot(rows: list[dict], parameters: dict[int, int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(parameters), figsize=(4 * len(parameters), 4), sharey=True, squeeze=False)
    roles = list(dict.fromkeys(role for row in rows for role in row["planned"]))
    for axis, (size, count) in zip(axes[0], parameters.items(), strict=True):
        of_size = [row for row in rows if row["size"] == size]
        forms, below = [row["form"] for row in of_size], [0.0] * len(of_size)
        for role in roles:
            heights = [row["planned"].get(role, 0) / count for row in of_size]
            axis.bar(forms, heights, bottom=below, label=role)
            below = [sum(pair) for pair in zip(below, heights, strict=True)]
        for key, mark in (("stays", "o"), ("peak", "^"), ("peak of a resumed start", "v")):
            axis.plot(forms, [row[key] / count for row in of_size], mark, color="black", fillstyle="none", label=key)
        axis.set_title(f"{count / 1e6:.0f} M parameters")
    axes[0][0].set_ylabel("bytes a parameter")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(work.RESULTS / "host_memory.png", dpi=110, bbox_inches="tight")


def main() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_ds.engine.tiers import load_tier

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    arguments = parser.parse_args()
    rows, parameters = [], {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            hidden, intermediate, layers = SIZES[size]
            shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
            work.make_model(place / str(size), **shape)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place / str(size)))
            parameters[size] = sum(parameter.numel() for parameter in model.parameters())
            del model
            config = load_tier("zero3_offload_large")
            config["zero_optimization"]["sub_group_size"] = GROUP
            (place / "tier.json").write_text(json.dumps(config))
            for form in arguments.forms:
                rows.append(measure(size, form, place))
                count = parameters[size]
                stays, peak = rows[-1]["stays"] / count, rows[-1]["peak"] / count
                print(
                    f"{size} M, {form}: bytes a parameter planned {sum(rows[-1]['planned'].values()) / count:.2f}, "
                    f"stay {stays:.2f}, peak {peak:.2f}, resumed {rows[-1]['peak of a resumed start'] / count:.2f}",
                    flush=True,
                )
                result = {"machine": work.machine(), "parameters": parameters, "ranks": RANKS, "runs": rows}
                (work.RESULTS / "host_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, parameters)


if __name__ == "__main__":
    main()
