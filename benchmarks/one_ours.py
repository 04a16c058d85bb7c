"""One run of dpo_ds for vs_trl.py, by the package's own steps. Prints its measurements as JSON.

python benchmarks/one_ours.py MODEL PAIRS.jsonl MAX_LENGTH OUTPUT_DIR [further options of dpo_ds.train]
"""

import json
import statistics
import sys
import time

import work

from dpo_ds.engine import join


def main(model: str, pairs: str, max_length: str, output_dir: str, *more: str) -> dict:
    from dpo_ds.config import parse_options

    options = parse_options(
        f"--model {model} --dataset {pairs} --max_length {max_length} --output_dir {output_dir} --eval_pairs 0 "
        f"--cache_dir {output_dir}/cache --truncation keep_start --seed {work.SEED} --export none --generations 0 "
        f"--global_batch_pairs {work.BATCH} --beta {work.BETA} --learning_rate {work.LEARNING_RATE} "
        "--lr_scheduler constant --warmup_ratio 0 --weight_decay 0 --max_grad_norm 1.0 --precision fp32".split()
        + list(more)
    )
    here = join.join()
    import torch

    from dpo_ds.models.flops import Flops, peak_of
    from dpo_ds.reports.watcher import Watcher
    from dpo_ds.runs.prepare import prepare
    from dpo_ds.scoring import sweep
    from dpo_ds.train import train

    class Timer(Watcher):
        """Each step's seconds and loss."""

        def __init__(self):
            self.seconds, self.losses, self.cold, self.matmul = [], [], [], []
            self.began = 0.0

        def step_begins(self, step: int) -> None:
            self.began = time.perf_counter()

        def step_ended(self, metrics: dict) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            self.losses.append(metrics["loss"])
            self.cold.append(work.process_age())
            # After every step, because a shared CPU's speed changes.
            self.matmul.append(0.0 if torch.cuda.is_available() else work.matmul_speed())

    run = prepare(options, here)
    reference_seconds = []
    plain_pass = sweep.score_answers

    def timed_pass(*words):
        """Times a pass over pairs without the loading of the model, as TRL's is timed."""
        began = time.perf_counter()
        try:
            return plain_pass(*words)
        finally:
            reference_seconds.append(time.perf_counter() - began)

    sweep.score_answers = timed_pass
    timer = Timer()
    train(run, [timer], save=False)  # a checkpoint of an 8B model would hold its base weights too
    # Without the first step, which is not timed.
    lengths = [run.train_pairs.lengths(run.schedule.step(number)) for number in range(1, run.schedule.steps)]
    flops = Flops(run.model, run.options.replace(reference="live"))  # counts the reference's forward in any case
    peak = work.peak_memory()
    return {
        "pairs": len(run.train_pairs),
        "step_seconds": timer.seconds,
        "losses": timer.losses,
        "reference_seconds": sum(reference_seconds),
        "cold_start": timer.cold[0],
        "peak_memory": peak,
        "gpu_memory": work.gpu_memory(),
        "peak_flops": peak_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "attention": run.attention,
        "response_tokens": sum(int(answers.sum()) for _, answers, _ in lengths),
        "tokens": sum(int(prompts.sum() + answers.sum()) for prompts, answers, _ in lengths),
        "flops": sum(flops.step(*of_step) for of_step in lengths),
        "matmul": statistics.median(timer.matmul),
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(*sys.argv[1:])))
