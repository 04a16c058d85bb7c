"""The main job: preference pairs in, a merged DPO checkpoint out.

deepspeed --num_gpus 8 -m dpo_ds.train --model meta-llama/Meta-Llama-3-70B-Instruct
python -m dpo_ds.train --model tiny-gpt2 --dataset sample
"""

import contextlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_ds.config import Options, parse_options, trackers_of
from dpo_ds.losses.table import losses_of
from dpo_ds.ranks import collectives, console, hang, process, world

if TYPE_CHECKING:  # a command that refuses its options must not wait for these imports
    from dpo_ds.plan.plan import Plan
    from dpo_ds.reports.watcher import Watcher
    from dpo_ds.runs.prepare import Run


def main(argv: list[str]) -> None:
    console.outlive_readers()
    options = parse_options(argv)
    losses_of(options)
    if trackers_of(options) and options.plan not in ("only", "measure") and world.from_environment().speaks:
        from dpo_ds.reports.trackers import require_trackers

        require_trackers(options)
    if options.plan == "only":
        make_plan(options)
        return
    from dpo_ds.plan.machine import require_here

    require_here(options)
    plan = make_plan(options)
    from dpo_ds.engine import join

    if options.plan == "measure":
        from dpo_ds.runs.measure import measure

        console.say(measure(options, join.join(), plan).as_line())
        return
    from dpo_ds.runs.prepare import prepare

    train(prepare(options, join.join(), plan))


def make_plan(options: Options) -> "Plan | None":
    """Makes and prints the plan on rank 0. Returns None on the other ranks, which wait for it if cores are few."""
    if not world.from_environment().speaks and options.plan != "only":
        process.let_rank_0_plan()
        return None
    from dpo_ds.engine import join
    from dpo_ds.plan.refuse import for_run, show

    join.quiet_start()
    if options.plan == "only":
        return show(options, console.say)
    plan = for_run(options)
    if options.plan != "off":
        console.say(plan.as_markdown())
    return plan


def train(run: "Run", watchers: "Sequence[Watcher]" = (), save: bool = True) -> dict:
    """Runs everything after preparation: reference, policy, training, export, sample answers. Returns the summary.

    `watchers` are added to the run's own. Without `save`, no checkpoint is written (for benchmarks). At the end, other
    processes may use the run's folder.
    """
    try:
        if run.finished:
            console.say(
                f"this run is finished in {run.folder}: nothing to do (give another --output_dir to train again)"
            )
            return {}
        with hang.watched(run.folder, run.options.hang_minutes):
            return _train(run, watchers, save)
    finally:
        if run.lock is not None:
            run.lock.release()


def _train(run: "Run", watchers: "Sequence[Watcher]", save: bool) -> dict:
    from dpo_ds.doctor.curve import CurveReader
    from dpo_ds.doctor.pairs import examine
    from dpo_ds.engine.build import policy_engine
    from dpo_ds.export import export_engine, rehearse
    from dpo_ds.files import write_whole, writing
    from dpo_ds.plan import seconds
    from dpo_ds.references.kinds import reference_of
    from dpo_ds.reports.evaluation import write_logps
    from dpo_ds.reports.progress import watchers_of
    from dpo_ds.reports.record import finite, last_metrics
    from dpo_ds.trainer import Trainer

    speaks = world.from_environment().speaks
    console.say(describe(run))
    mean = math.ceil(run.train_pairs.packed_lengths.sum() / len(run.train_pairs))
    expected = seconds.of_run(run.model, run.options, mean) if speaks else None
    if expected is not None:
        console.say(f"estimated for pairs of {mean:,} tokens: {seconds.of_pairs(expected, len(run.train_pairs))}")
    curve = CurveReader(run.options)
    with contextlib.closing(reference_of(run)) as reference:
        with console.working("loading the policy"):
            policy = policy_engine(
                run.weights, run.ds_config, run.options, run.attention, run.schedule.steps, run.adapter
            )
        rehearse(run, policy)
        reference.attach(policy)
        a_step = None if expected is None else expected.step().seconds
        watching = [*watchers_of(run.folder, run.options, [curve], run.own_checkpoint, a_step), *watchers]
        trainer = Trainer(run, policy, reference, watching, save)
        trainer.begin()
        findings = examine(run, reference.known()) if speaks else []
        outcome = trainer.train()
        # A start that only had to export has trained no step, but the record has the last one's metrics.
        metrics = last_metrics(run.folder) | outcome.metrics
        if len(run.eval_pairs) and speaks:
            file = run.folder / "evaluation.jsonl"
            with writing(file):
                write_logps(file, run.eval_pairs, outcome.policy_logps, outcome.reference_logps)
        if run.options.export == "merged":
            export_engine(run, policy, metrics)
        policy.close()
    if speaks:
        generate(run)
        found = [finding.as_json() for finding in (*findings, *curve.findings)]
        summary = {**finite(metrics), "clipped_share": curve.clipped, "findings": found}
        with writing(run.folder / "summary.json"):
            write_whole(run.folder / "summary.json", json.dumps(summary, indent=1))
    collectives.wait_for_all()
    return metrics


def generate(run: "Run") -> None:
    """Shows answers to the first held-out prompts before and after training, if --generations and the export are on."""
    from dpo_ds.files import writing
    from dpo_ds.reports.answers import Answers
    from dpo_ds.reports.evaluation import show_generations
    from dpo_ds.runs.data import answer_end

    count = min(run.options.generations, len(run.eval_pairs))
    merged = run.folder / "merged"
    if count and merged.is_dir():
        prompts = [run.eval_pairs.pair(n)[0].tolist() for n in range(count)]
        end = answer_end(run.options, run.tokenizer)
        answers = Answers(run.tokenizer, end, run.model.context, run.options.trust_remote_code)
        with console.working("answering held-out prompts"), writing(run.folder / "generations.md"):
            adapter = None if run.adapter is None else run.adapter.folder
            show_generations(run.folder / "generations.md", answers, prompts, run.weights, merged, adapter)


def describe(run: "Run") -> str:
    """The line that says what is about to run."""
    options = run.options
    how = f"LoRA r={options.lora_r}" if options.lora else "all weights"
    how += f" from {options.adapter}" if options.adapter else ""
    losses = " + ".join(f"{term.weight:g} {term.name}".removeprefix("1 ") for term in losses_of(options))
    start = f", from {run.resume_from}" if run.resume_from else ""
    return (
        f"{options.model} ({run.model.parameters / 1e6:,.1f} M parameters, {how}), loss {losses}, ZeRO stage "
        f"{run.ds_config['zero_optimization']['stage']}, {options.precision}, {run.attention} attention, "
        f"{'compiled small functions, ' if options.fuse == 'on' else ''}"
        f"{world.from_environment().size} rank(s): "
        f"{run.schedule.steps} steps of {options.global_batch_pairs} of {len(run.train_pairs)} pairs, "
        f"{len(run.eval_pairs)} held out{start} -> {run.folder}"
    )


if __name__ == "__main__":
    console.run_main(main)
