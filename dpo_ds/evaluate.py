"""Evaluates a model on preference pairs, against a reference where one is known.

    python -m dpo_ds.evaluate --model runs/x --dataset held_out.jsonl
    python -m dpo_ds.evaluate --model runs/x/merged --reference_model openai-community/gpt2 --dataset held_out.jsonl

A model is a hub id, a Hugging Face folder, a peft adapter, a run's folder or one of its checkpoints. Without --dataset,
a run is evaluated on its own held-out pairs. It takes the options of dpo_ds.train.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.config import Options, Parser, given, parse_options
from dpo_ds.errors import UserError, files_of
from dpo_ds.ranks import console, world

if TYPE_CHECKING:  # a command that refuses its options must not wait for these imports
    import numpy as np

    from dpo_ds.reports.comparison import About
    from dpo_ds.reports.figures import Judged
    from dpo_ds.runs.evaluation import Prepared, Side
    from dpo_ds.runs.named import Named

REPORT = "evaluation.json"
WEIGHTS = "weights-"  # folders of a checkpoint's weights begin so


def parse(argv: list[str]) -> tuple[argparse.Namespace, Options]:
    """This command's own options, and those of dpo_ds.train."""
    parser = Parser(
        prog="python -m dpo_ds.evaluate",
        usage="%(prog)s --model MODEL [--reference_model MODEL] [--dataset DATASET] [--name value …]",
        description="Evaluates a model on preference pairs. A model is a hub id, a Hugging Face folder, a peft "
        "adapter, a run's folder or a checkpoint of it.",
        epilog="All options of dpo_ds.train may follow; --generations is the number of prompts to answer, 0 for none.",
        allow_abbrev=False,
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Of the sampled answers (default: 1.0).")
    parser.add_argument("--top_p", type=float, default=0.95, help="Sample from the likeliest tokens that sum to this.")
    parser.add_argument("--answer_tokens", type=int, default=96, help="Tokens of an answer, at most (default: 96).")
    own, rest = parser.parse_known_args(argv)
    if not (own.temperature > 0 and math.isfinite(own.temperature)):
        raise UserError(f"--temperature is {own.temperature}, but must be more than 0; greedy answers are shown anyway")
    if not 0 < own.top_p <= 1:
        raise UserError(f"--top_p is {own.top_p}, but must be above 0 and at most 1")
    if own.answer_tokens < 1:
        raise UserError(f"--answer_tokens is {own.answer_tokens}, but must be 1 or more; --generations 0 shows none")
    return own, parse_options(rest, "evaluate")


def main(argv: list[str]) -> None:
    own, options = parse(argv)
    from dpo_ds.runs.named import named, reference_for

    policy = named("--model", options.model, options.adapter)
    reference = reference_for(policy, options)
    from dpo_ds.engine import join

    join.quiet_start()
    from dpo_ds.runs.evaluation import like_its_run

    own_pairs = "dataset" not in given(argv)
    options = like_its_run(policy, options, given(argv))
    if options.plan == "only":
        show_plans([policy, reference], options)
        return
    evaluate(own, options, policy, reference, own_pairs)


def show_plans(models: "list[Named | None]", options: Options) -> None:
    """Prints the plan of each model: they are loaded one after the other."""
    from dpo_ds.plan.footprint import ScoringFootprint
    from dpo_ds.plan.refuse import show
    from dpo_ds.runs.evaluation import scoring

    for model in dict.fromkeys(model.model for model in models if model is not None):
        show(scoring(next(m for m in models if m and m.model == model), options), console.say, ScoringFootprint)


def evaluate(
    own: argparse.Namespace, options: Options, policy: "Named", reference: "Named | None", own_pairs: bool
) -> None:
    """Scores the pairs with each model, and writes and prints the report."""
    from dpo_ds.engine import join
    from dpo_ds.plan.machine import require_here
    from dpo_ds.ranks.collectives import on_rank_0, wait_for_all
    from dpo_ds.references.table import Wanted, tables
    from dpo_ds.runs.evaluation import beta_of, prepare

    require_here(options)
    here = join.join()
    folder = folder_of(options, policy)
    on_rank_0(lambda: claim(folder))
    prepared = prepare(policy, reference, options, here, own_pairs)
    about = about_of(prepared, beta_of(policy, options))
    console.say(f"model: {about.policy}")
    console.say(f"reference: {about.reference or 'none is known, so the model is judged by its own likelihood'}")
    with contextlib.ExitStack() as held:
        sides = [held.enter_context(weights_of(side, folder)) for side in (prepared.policy, prepared.reference) if side]
        logps = []
        for side, role in zip(sides, ("the model", "the reference"), strict=False):
            (scored,) = tables(side.loadable, side.options, role, [Wanted.all_of(f"{role}: pairs", prepared.pairs)])
            logps.append(scored)
        if here.speaks:
            report(folder, prepared, sides, about, logps)
            generate(folder, own, options, sides, prepared, about)
        wait_for_all()


def folder_of(options: Options, policy: "Named") -> Path:
    """Where the report goes: --output_dir, by default runs/evaluations/<model>."""
    if options.output_dir is not None:
        return Path(options.output_dir)
    return Path("runs", "evaluations", policy.short.replace(", step ", "-step-"))


def claim(folder: Path) -> None:
    """Raises UserError if the report's folder holds something else."""
    with files_of("--output_dir", folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder} is a file; name a folder")
        # What a killed evaluation of a checkpoint leaves is ours.
        found = [path.name for path in folder.iterdir() if not path.name.startswith(WEIGHTS)] if folder.is_dir() else []
        if found and REPORT not in found:
            raise UserError(f"--output_dir {folder} holds files of something else: name an empty or new folder")


@contextlib.contextmanager
def weights_of(side: "Side", folder: Path) -> "Iterator[Side]":
    """The side with its weights. A checkpoint's are exported into the report's folder, and removed at the end."""
    from dpo_ds.export import export_checkpoint
    from dpo_ds.ranks.collectives import wait_for_all

    if side.named.checkpoint is None:
        yield side.with_weights()
        return
    place, speaks = folder / f"{WEIGHTS}{side.named.option.strip('-')}", world.from_environment().speaks
    if speaks:
        shutil.rmtree(place, ignore_errors=True)
    wait_for_all()
    try:
        with console.working("reading the checkpoint"):
            export_checkpoint(side.named.checkpoint, place, side.named.option)
        yield side.with_weights(place)
        wait_for_all()
    finally:
        if speaks:
            shutil.rmtree(place, ignore_errors=True)


def about_of(prepared: "Prepared", beta: float) -> "About":
    from dpo_ds.reports.comparison import About

    policy = prepared.policy.named
    reference = None if prepared.reference is None else prepared.reference.named
    return About(
        policy=policy.what,
        policy_short=policy.short,
        reference=None if reference is None else reference.what,
        reference_short=None if reference is None else reference.short,
        dataset=prepared.dataset,
        beta=beta,
    )


def judged_of(prepared: "Prepared", logps: "list[np.ndarray]", beta: float) -> "Judged":
    """What the figures are made of. logps: of each model's answers, float32 [A]."""
    from dpo_ds.reports.figures import Judged

    pairs = prepared.pairs
    policy, *reference = (scored[pairs.pairs] for scored in logps)
    return Judged(
        policy=policy,
        reference=reference[0] if reference else None,
        lengths=pairs.learned_lengths[pairs.pairs],
        weights=pairs.weights,
        prompts=pairs.pair_groups,
        beta=beta,
    )


def report(folder: Path, prepared: "Prepared", sides: "list[Side]", about: "About", logps: "list[np.ndarray]") -> None:
    """Writes evaluation.json, .md, .png and the pairs' own values, and prints the table."""
    from dpo_ds.files import write_whole
    from dpo_ds.reports import comparison, figures
    from dpo_ds.reports.evaluation import write_logps

    judged = judged_of(prepared, logps, about.beta)
    found = figures.evaluate(judged, prepared.pairs.sources, prepared.sources)
    facts = {
        **dataclasses.asdict(about),
        "precision": prepared.policy.options.precision,
        "pairs_digest": prepared.pairs.digest,
        "weights": {side.named.option: side.loadable.hashes for side in sides},
    }
    with files_of("--output_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "evaluation.md", comparison.as_markdown(found, about))
        (folder / "evaluation.png").write_bytes(comparison.picture(found, judged, about))
        write_logps(folder / "evaluation.jsonl", prepared.pairs, logps[0], logps[1] if len(logps) > 1 else None)
        write_whole(folder / REPORT, json.dumps({**facts, **figures.as_json(found)}, indent=1))
    console.say(f"on {about.dataset}:\n\n{comparison.table(found.all)}\n")
    console.say(f"the report is in {folder}: evaluation.md, .png, .json and .jsonl")


def generate(
    folder: Path, own: argparse.Namespace, options: Options, sides: "list[Side]", prepared: "Prepared", about: "About"
) -> None:
    """Writes generations.md: answers of each model to the first prompts, greedy and sampled."""
    from dpo_ds.files import write_whole
    from dpo_ds.reports.answers import GREEDY, Answers, Way, text_of
    from dpo_ds.reports.comparison import Generated, side_by_side
    from dpo_ds.runs.data import answer_end

    count = options.generations
    if count is None:
        count = 3 if all(side.loadable.model.parameters < 1e9 for side in sides) else 0
    numbers = range(min(count, len(prepared.pairs.prompts)))
    if not numbers:
        return
    prompts = [prepared.pairs.prompt(n).tolist() for n in numbers]
    ways = [GREEDY, Way("sampled", own.temperature, own.top_p, options.seed)]
    end = answer_end(prepared.policy.options, prepared.tokenizer)
    answers = []
    with console.working("answering prompts"):
        for side in sides:
            model, adapter = side.loadable, side.loadable.adapter
            generator = Answers(
                prepared.tokenizer, end, model.model.context, options.trust_remote_code, own.answer_tokens
            )
            answers.append(generator.of(model.weights, prompts, None if adapter is None else adapter.folder, ways))
    found = [
        Generated(
            text_of(prepared.tokenizer, prompts[n]),
            {way.name: [of_model[at][n] for of_model in answers] for at, way in enumerate(ways)},
        )
        for n in numbers
    ]
    how = f"Greedy, and sampled with temperature {own.temperature:g}, top_p {own.top_p:g} and seed {options.seed}; "
    how += f"at most {own.answer_tokens} tokens. Line breaks are shown as blanks."
    with files_of("--output_dir", folder):
        write_whole(folder / "generations.md", side_by_side(found, about, how))
    console.say(f"answers side by side: {folder / 'generations.md'}")


if __name__ == "__main__":
    console.run_main(main)
