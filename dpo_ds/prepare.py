"""Everything before a model is loaded: options decided, files found, pairs checked and tokenised, the config filled.

All that a user can get wrong is found here, in seconds, as a ValueError with its remedy.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_ds import checkpoint, models, plan, world
from dpo_ds.config import Options
from dpo_ds.data.pairs import PairSet, held_out
from dpo_ds.data.steps import Schedule, too_small
from dpo_ds.nvme import require_compiler, require_nvme
from dpo_ds.scoring.twin import choose_kernel, require_exact
from dpo_ds.tiers import fill_tier, swap_folders


@dataclass(frozen=True)
class Run:
    """A run that can start: `options` has nothing left to decide."""

    options: Options
    model: models.Model
    weights: Path  # the folder from which the policy and the reference are loaded
    tokenizer: object
    ds_config: dict
    train_pairs: PairSet
    eval_pairs: PairSet  # may be empty
    schedule: Schedule
    attention: str  # the kernel
    resume_from: Path | None
    finished: bool  # an earlier start of this very run has come to its end

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)


def prepare(options: Options, ranks: int) -> Run:
    """Raises ValueError, in one line and on every rank, for whatever cannot work."""
    # The plan comes before any download; rank 0's machine stands for all.
    asked = options
    options = world.one_after_another(
        lambda: plan.for_run(options).options if world.from_environment().speaks else None
    )
    options = _name_things(world.from_rank_0(options))
    model = models.find_model(options.model, options.trust_remote_code)
    world.one_after_another(
        lambda: (
            world.from_environment().speaks and require_exact(options.model, model.config, options.trust_remote_code)
        )
    )
    kernel = world.one_after_another(lambda: _kernel(options, model) if world.from_environment().speaks else None)
    kernel = world.from_rank_0(kernel)
    tokenizer = models.load_tokenizer(model)
    ds_config = fill_tier(options.ds_config, options, model, ranks, torch.cuda.is_available())
    require_compiler(options.ds_config, ds_config, torch.cuda.is_available())
    if folders := swap_folders(ds_config):
        world.one_after_another(lambda: require_nvme(folders))
    checkpoint.check_folder(Path(options.output_dir), options)  # before any work goes into data
    train_pairs, eval_pairs = world.one_after_another(lambda: load_pairs(options, tokenizer))
    longest = max(int(pairs.packed_lengths.max()) for pairs in (train_pairs, eval_pairs) if len(pairs))
    if options.micro_batch_tokens < longest:
        raise ValueError(too_small(options.micro_batch_tokens, longest))
    if asked.micro_batch_tokens is None and not torch.cuda.is_available():
        # The plan has room for the longest pair that --max_length lets through; now the longest there is is known.
        options = options.replace(micro_batch_tokens=min(options.micro_batch_tokens, plan.tokens_on_cpu(longest)))
    schedule = Schedule.of(
        len(train_pairs), options.global_batch_pairs, options.epochs, options.max_steps, options.seed
    )
    if options.eval_every is None:
        options = options.replace(eval_every=max(1, schedule.steps // 10))
    weights = world.one_after_another(lambda: models.fetch_weights(model))
    identity = checkpoint.identity(options, train_pairs.digest, eval_pairs.digest)
    # Last, because it makes the folder this run's: a run that cannot start leaves nothing behind.
    found = checkpoint.open_folder(Path(options.output_dir), options, identity, ranks)
    return Run(
        options=options,
        model=model,
        weights=weights,
        tokenizer=tokenizer,
        ds_config=ds_config,
        train_pairs=train_pairs,
        eval_pairs=eval_pairs,
        schedule=schedule,
        attention=kernel,
        resume_from=found.resume_from,
        finished=found.finished,
    )


def _kernel(options: Options, model: models.Model) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = models.torch_dtype(options.precision)
    kernel, passed_over = choose_kernel(options.attention, model.config, dtype, device, options.trust_remote_code)
    for problem in passed_over:
        world.say(f"{problem}: {kernel} is used")
    return kernel


def _name_things(options: Options) -> Options:
    changes = {}
    if options.output_dir is None:
        changes["output_dir"] = str(
            Path("runs", f"{Path(options.model).name}-{Path(options.dataset).name.split('.')[0]}")
        )
    if options.generations is None:
        small = models.known_model(options.model, options.trust_remote_code).parameters < 1e9
        changes["generations"] = 3 if small else 0
    return options.replace(**changes)


def load_pairs(options: Options, tokenizer) -> tuple[PairSet, PairSet]:
    """The tokenised training and evaluation pairs. Says what was left out or changed."""
    sources = [(options.dataset, options.dataset_split, "train")]
    if options.eval_dataset is not None:
        sources.append((options.eval_dataset, "auto", "eval"))
    found = world.in_a_child(
        "reading and tokenising the pairs", lambda: [_tokenised(options, tokenizer, *source) for source in sources]
    )
    for (source, *_), (_, lines) in zip(sources, found, strict=True):
        for line in lines:
            world.say(f"{source}: {line}")
    train, *evaluation = (PairSet.open(folder) for folder, _ in found)
    if evaluation:
        (evaluation,) = evaluation
        most = len(evaluation) if options.eval_pairs is None else options.eval_pairs
        return train, evaluation.subset(range(min(most, len(evaluation))))
    if options.eval_pairs == 0 or len(train) < 2:
        return train, train.subset([])
    if options.eval_pairs is not None and options.eval_pairs > len(train) / 2:
        raise ValueError(
            f"--eval_pairs {options.eval_pairs} would hold out more than half of the {len(train)} pairs: lower it, or "
            "name an --eval_dataset"
        )
    fraction, most = (0.05, 500) if options.eval_pairs is None else (1.0, options.eval_pairs)
    mask = held_out(train.prompt_hashes, fraction, most)
    return train.subset((~mask).nonzero()[0]), train.subset(mask.nonzero()[0])


def _tokenised(options: Options, tokenizer, source: str, split: str, role: str) -> tuple[Path, list[str]]:
    """The folder of a source's tokenised pairs, and what its report says."""
    from dpo_ds.data.preferences import check_preferences, flag, load_preferences
    from dpo_ds.data.tokens import Tokenizing, tokenize_pairs

    rows = load_preferences(source, split, role)
    tokenizing = Tokenizing(options.max_length, options.truncation, options.chat_template)
    cache = Path(options.cache_dir).expanduser() / "tokens"
    try:
        rows, report = check_preferences(rows, options.max_left_out)
        return tokenize_pairs(rows, tokenizer, tokenizing, cache, report), report.lines()
    except ValueError as error:  # a run may read two sets
        raise ValueError(f"{flag(role)} {source}: {error}") from None
