"""The main job: preference pairs in, a merged DPO checkpoint out.

deepspeed --num_gpus 8 -m dpo_ds.train --model meta-llama/Meta-Llama-3-70B-Instruct
python -m dpo_ds.train --model tiny-gpt2 --dataset sample
"""

from dpo_ds import world
from dpo_ds.config import parse_options


def main(argv: list[str]) -> None:
    with world.user_errors():
        options = parse_options(argv)
        if world.from_environment().speaks or options.plan == "only":
            world.quiet_start()
            from dpo_ds import plan

            planned = plan.for_run(options)
            if options.plan != "off":
                world.say(planned.table())
        else:
            world.let_rank_0_plan()
        if options.plan == "only":
            return
        ranks = world.join().size
        from dpo_ds.prepare import prepare

        run = prepare(options, ranks)
    train(run)


def train(run) -> dict:
    """Reference, policy, training, export, a look at what it writes now. Returns the summary."""
    from dpo_ds import evaluate, export, report
    from dpo_ds.engines import policy_engine
    from dpo_ds.references import references
    from dpo_ds.trainer import Trainer

    if run.finished:
        world.say(f"{run.folder} holds this run, finished: nothing to do (another --output_dir trains again)")
        return {}
    world.say(describe(run))
    with references(run) as reference:
        policy = policy_engine(run.weights, run.ds_config, run.options, run.attention, run.schedule.steps)
        trainer = Trainer(run, policy, *reference(policy))
        summary = trainer.train()
        if len(run.eval_pairs):
            evaluate.write_logps(run, trainer.eval_logps, trainer.eval_reference)
        if run.options.export == "merged":
            export.export_engine(run, policy, summary)
        policy.close()
    evaluate.show_generations(run)
    if world.from_environment().speaks:
        report.write_summary(run.folder, summary)
    world.wait_for_all()
    return summary


def describe(run) -> str:
    """One line: what is about to happen."""
    options = run.options
    how = f"LoRA r={options.lora_r}" if options.lora else "all weights"
    start = f", from {run.resume_from}" if run.resume_from else ""
    return (
        f"{options.model} ({run.model.parameters / 1e6:,.1f} M parameters, {how}), ZeRO stage "
        f"{run.ds_config['zero_optimization']['stage']}, {options.precision}, {run.attention} attention, "
        f"{world.from_environment().size} rank(s): "
        f"{run.schedule.steps} steps of {options.global_batch_pairs} of {len(run.train_pairs)} pairs, "
        f"{len(run.eval_pairs)} held out{start} -> {run.folder}"
    )


if __name__ == "__main__":
    world.run_main(main)
