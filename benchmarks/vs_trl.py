"""dpo_ds against TRL's DPOTrainer, with the same model folder, pairs, order, batch and optimizer, in fp32.

    python benchmarks/vs_trl.py                      all three sets (about an hour on two cores, nearly all of it TRL's)
    python benchmarks/vs_trl.py --sets hh --rounds 1

Each run is a process. TRL's settings are tried once, on one step, and the fastest is used. Then TRL and dpo_ds take
turns. A step's time begins at the end of the step before. The first step is slower, and is left out on both sides. The
reference's forward counts on both sides, wherever it is computed. Medians of the rounds are printed as a table and
written to benchmarks/results/ with hardware and versions.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import work

HERE = Path(__file__).resolve().parent
TRL = list(itertools.product(("live", "precomputed"), ("recompute", "keep")))  # TRL's default is the first
OURS = ("precomputed", "live")  # dpo_ds's default is the first
PAIRS = {"hh": 64, "alpaca": 24, "long": 16}  # in steps of 8, of which the first is not timed
CURVES_AGREE = 1e-3
GOALS = {"hh": (15, 5), "alpaca": (6, 4), "long": (15, 5)}  # our speed over TRL's; TRL's memory over ours
FLOPS_GOAL = 0.6


def one(script: str, *words) -> dict:
    """Runs one process. Returns its measurements."""
    done = subprocess.run(
        [sys.executable, HERE / script, *map(str, words)], capture_output=True, text=True, cwd=work.ROOT
    )
    found = work.required_result_of(done)
    return {**found, "pairs/s": work.pairs_per_second(found)}


def runs(name: str, model: Path, pairs: int, rounds: int, folder: Path) -> dict:
    """All measurements of one set."""
    length = work.MAX_LENGTH[name]
    number = itertools.count()

    def ours(reference: str) -> dict:
        return one("one_ours.py", model, plain, length, folder / f"ours-{next(number)}", "--reference", reference)

    def trl(settings: tuple[str, str], file: Path) -> dict:
        return one("one_trl.py", model, file, length, folder / f"trl-{next(number)}", *settings)

    (folder / "few").mkdir()
    _, few = work.write_pairs(name, work.BATCH, folder / "few")
    tried = {"+".join(settings): trl(settings, few) for settings in TRL}
    best = tuple(max(tried, key=lambda settings: tried[settings]["pairs/s"]).split("+"))
    print(f"{name}: TRL on one step, pairs/s: " + ", ".join(f"{k} {v['pairs/s']:.3f}" for k, v in tried.items()))
    plain, ordered = work.write_pairs(name, pairs, folder)
    measured: dict[str, list] = {"trl": [], **{f"ours {kind}": [] for kind in OURS}}
    for turn in range(rounds):
        measured["trl"].append(trl(best, ordered))
        for kind in OURS:
            measured[f"ours {kind}"].append(ours(kind))
        speeds = ", ".join(f"{who} {found[-1]['pairs/s']:.3f}" for who, found in measured.items())
        print(f"{name}, round {turn + 1}: pairs/s: {speeds}", flush=True)
    return {"trl_settings": "+".join(best), "tried": tried, "rounds": measured, "pairs": pairs}


def summary(name: str, found: dict) -> dict:
    """Medians and ratios of one set."""
    rounds = found["rounds"]

    def median(who: str, key: str) -> float:
        return statistics.median(run[key] for run in rounds[who])

    ours = rounds[f"ours {OURS[0]}"][0]
    gap = max(
        abs(a - b)
        for kind in OURS
        for ours, theirs in zip(rounds[f"ours {kind}"], rounds["trl"], strict=True)
        for a, b in zip(ours["losses"], theirs["losses"], strict=True)
    )
    per_pair = {key: ours[key] / (found["pairs"] - work.BATCH) for key in ("flops", "response_tokens")}
    sides = {
        who: {
            "pairs/s": median(who, "pairs/s"),
            "response tokens/s": median(who, "pairs/s") * per_pair["response_tokens"],
            "peak memory": median(who, "peak_memory"),
            "cold start": median(who, "cold_start"),
        }
        for who in rounds
    }
    for kind in OURS:
        who = f"ours {kind}"
        sides[who] |= {
            "speed over TRL": statistics.median(
                a["pairs/s"] / b["pairs/s"] for a, b in zip(rounds[who], rounds["trl"], strict=True)
            ),
            "TRL's memory over it": sides["trl"]["peak memory"] / sides[who]["peak memory"],
            "of a large product's FLOPs": statistics.median(
                run["pairs/s"] * per_pair["flops"] / run["matmul"] for run in rounds[who]
            ),
        }
    return {"set": name, "trl_settings": found["trl_settings"], "loss gap": gap, **sides}


def as_markdown(sums: list[dict]) -> str:
    lines = [
        "| set | who | pairs/s | response tokens/s | ratio | peak memory | ratio | of matmul | cold start | loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one_set in sums:
        for who, side in ((who, side) for who, side in one_set.items() if isinstance(side, dict)):
            name = f"TRL, {one_set['trl_settings']}" if who == "trl" else who.replace("ours", "dpo_ds,")
            ratios = ("1", "1", "", "")
            if who != "trl":
                ratios = (
                    f"**{side['speed over TRL']:.1f}×**",
                    "**1/{:.1f}**".format(side["TRL's memory over it"]),
                    "{:.0%}".format(side["of a large product's FLOPs"]),
                    f"≤ {one_set['loss gap']:.0e}",
                )
            lines.append(
                f"| {one_set['set']} | {name} | {side['pairs/s']:.3f} | {side['response tokens/s']:,.0f} | "
                f"{ratios[0]} | "
                f"{side['peak memory'] / 2**20:,.0f} MiB | {ratios[1]} | {ratios[2]} | {side['cold start']:.1f} s | "
                f"{ratios[3]} |"
            )
    return "\n".join(lines)


def verdict(one_set: dict) -> list[str]:
    """The goals that were missed."""
    ours = one_set[f"ours {OURS[0]}"]
    speed, memory = GOALS[one_set["set"]]
    wanted = [
        ("speed over TRL", speed),
        ("TRL's memory over it", memory),
        ("of a large product's FLOPs", FLOPS_GOAL),
    ]
    missed = [f"{one_set['set']}: {key} {ours[key]:.2f}, goal {goal}" for key, goal in wanted if ours[key] < goal]
    if one_set["loss gap"] > CURVES_AGREE:
        missed.append(f"{one_set['set']}: losses differ by {one_set['loss gap']:.1e}, goal {CURVES_AGREE}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found, sums = {}, []
    with tempfile.TemporaryDirectory() as folder:
        model = work.make_model(Path(folder, "model"))
        for name in options.sets:
            place = Path(folder, name)
            place.mkdir()
            found[name] = runs(name, model, PAIRS[name], options.rounds, place)
            sums.append(summary(name, found[name]))
            work.RESULTS.mkdir(exist_ok=True)
            facts = {"machine": work.machine(), "summary": sums[-1], **found[name]}
            (work.RESULTS / f"vs_trl_{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(work.machine()) + "\n\n" + as_markdown(sums))
    for line in itertools.chain.from_iterable(map(verdict, sums)):
        print(f"goal missed: {line}")


if __name__ == "__main__":
    main()
