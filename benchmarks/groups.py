"""Several answers to one prompt: packed as a group, the same pairs one by one, and TRL's DPOTrainer on those.

    python benchmarks/groups.py [--rounds 2]

Real text of HH's, cut to 180 tokens a prompt and 325 an answer; four answers and their six pairs to each prompt. Each
run is a process of its own, and the three take turns. A step is four prompts: 24 pairs. Ratios, medians of the rounds,
are printed and written to benchmarks/results/.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["BENCH_PAIRS"] = "24"  # before work is imported: the pairs of a step, here and in the children
import work

HERE = Path(__file__).resolve().parent
PROMPT, ANSWER, ANSWERS = 180, 325, 4


def write_rows(prompts: int, folder: Path) -> tuple[Path, Path]:
    """The groups as rows with `responses` and `ranks`, and as rows of one pair each, in the same order."""
    words = work.tokenizer()
    text = itertools.chain.from_iterable(
        words(row["prompt"] + row["chosen"], verbose=False)["input_ids"] for row in work.read("hh")
    )
    groups, pairs = [], []
    for _ in range(prompts):
        prompt, *answers = (
            words.decode(list(itertools.islice(text, length))) for length in (PROMPT, *[ANSWER] * ANSWERS)
        )
        # A prompt in HH's style would be read as messages.
        prompt = "Text: " + " ".join(prompt.split())
        answers = [" " + " ".join(answer.split()) for answer in answers]
        groups.append({"prompt": prompt, "responses": answers, "ranks": list(range(1, ANSWERS + 1))})
        for chosen, rejected in itertools.combinations(answers, 2):
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    files = folder / "groups.jsonl", folder / "pairs.jsonl"
    for file, rows in zip(files, (groups, pairs), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def one(script: str, *words) -> dict:
    done = subprocess.run(
        [sys.executable, HERE / script, *map(str, words)], capture_output=True, text=True, cwd=work.ROOT
    )
    found = work.required_result_of(done)
    return {**found, "pairs/s": work.pairs_per_second(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=12, help="four make a step, and the first step is not timed")
    parser.add_argument("--without_trl", action="store_true")
    arguments = parser.parse_args()
    length = PROMPT + ANSWER + 16
    measured: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder, number = Path(place), itertools.count()
        model = work.make_model(folder / "model")
        groups, pairs = write_rows(arguments.prompts, folder)
        for _ in range(arguments.rounds):
            for who, file, more in (
                ("groups", groups, ["--pairs", "all"]),
                ("one by one", pairs, ["--group_prompts", "false"]),
            ):
                found = one("one_ours.py", model, file, length, folder / f"ours-{next(number)}", *more)
                measured.setdefault(who, []).append(found)
            if not arguments.without_trl:
                words = ("precomputed", "recompute")
                measured.setdefault("TRL", []).append(
                    one("one_trl.py", model, pairs, length, folder / f"trl-{next(number)}", *words)
                )
            print({who: round(runs[-1]["pairs/s"], 3) for who, runs in measured.items()}, flush=True)
    rows = []
    for who, runs in measured.items():
        ratio = statistics.median(a["pairs/s"] / b["pairs/s"] for a, b in zip(measured["groups"], runs, strict=True))
        speed, memory = (statistics.median(run[key] for run in runs) for key in ("pairs/s", "peak_memory"))
        rows.append({"who": who, "pairs/s": speed, "groups over it": ratio, "peak memory MiB": memory / 2**20,
                     "tokens": runs[0].get("tokens")})  # fmt: skip
        print(json.dumps(rows[-1]))
    facts = {"machine": work.machine(), "table": rows, "runs": measured}
    (work.RESULTS / "groups.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
