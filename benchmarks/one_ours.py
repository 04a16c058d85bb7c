"""One run of dpo_ds for vs_trl.py, through the package's own steps; prints its measurements as JSON.

python benchmarks/one_ours.py MODEL PAIRS.jsonl MAX_LENGTH OUTPUT_DIR [further options of dpo_ds.train]
"""

import json
import statistics
import sys
import time

import work


def main(model: str, pairs: str, max_length: str, output_dir: str, *more: str) -> dict:
    from dpo_ds import world
    from dpo_ds.config import parse_options

    options = parse_options(
        f"--model {model} --dataset {pairs} --max_length {max_length} --output_dir {output_dir} --eval_pairs 0 "
        f"--cache_dir {output_dir}/cache --truncation keep_start --seed {work.SEED} --export none --generations 0 "
        f"--global_batch_pairs {work.BATCH} --beta {work.BETA} --learning_rate {work.LEARNING_RATE} "
        "--lr_scheduler constant --warmup_ratio 0 --weight_decay 0 --max_grad_norm 1.0 --precision fp32".split()
        + list(more)
    )
    ranks = world.join().size
    import torch

    from dpo_ds import checkpoint, score
    from dpo_ds.engines import policy_engine
    from dpo_ds.flops import Flops, peak_of
    from dpo_ds.prepare import prepare
    from dpo_ds.references import references
    from dpo_ds.trainer import Trainer

    checkpoint.save = lambda *_: None  # the base weights of an 8B model would be written each time
    run = prepare(options, ranks)
    seconds, losses, cold, reference_seconds, matmul = [], [], [], [], []
    plain_scoring = score.score_all

    def score_all(*args, **more):
        """The pass over all pairs alone, as TRL's is timed: without loading the model."""
        began = time.perf_counter()
        try:
            return plain_scoring(*args, **more)
        finally:
            reference_seconds.append(time.perf_counter() - began)

    score.score_all = score_all
    with references(run) as reference:
        policy = policy_engine(run.weights, run.ds_config, run.options, run.attention, run.schedule.steps)
        trainer = Trainer(run, policy, *reference(policy))
        plain_step = trainer.step

        def step(number: int) -> dict:
            began = time.perf_counter()
            metrics = plain_step(number)
            seconds.append(time.perf_counter() - began)
            losses.append(metrics["loss"])
            cold.append(work.process_age())
            # Beside every step: a shared CPU's speed moves.
            matmul.append(0.0 if torch.cuda.is_available() else work.matmul_speed())
            return metrics

        trainer.step = step
        trainer.train()
    lengths = run.train_pairs.lengths
    later = [i for number in range(1, run.schedule.steps) for i in run.schedule.step(number)]
    flops = Flops(run.model, run.options.replace(reference="live"))  # wherever it is made
    peak = work.peak_memory()
    return {
        "pairs": len(run.train_pairs),
        "step_seconds": seconds,
        "losses": losses,
        "reference_seconds": sum(reference_seconds),
        "cold_start": cold[0],
        "peak_memory": peak,
        "gpu_memory": work.gpu_memory(),
        "peak_flops": peak_of(policy.device),
        "attention": run.attention,
        "response_tokens": int(lengths[later, 1:].sum()),
        "flops": flops.step(lengths[later]),
        "matmul": statistics.median(matmul),
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(*sys.argv[1:])))
