"""The pairs of a run: read and tokenised, mixed, and held out for evaluation."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_ds.config import Options, read_columns, template_variables
from dpo_ds.data.counts import Report, counted
from dpo_ds.data.encoder import Encoder, Tokenizing, end_token
from dpo_ds.data.held_out import families, held_out, shared
from dpo_ds.data.pairs import PairSet
from dpo_ds.data.template import prints_date
from dpo_ds.errors import UserError
from dpo_ds.files import scratch_folder
from dpo_ds.ranks import console
from dpo_ds.ranks.process import in_a_child
from dpo_ds.ranks.world import World

if TYPE_CHECKING:
    from dpo_ds.data.sources import Split

HELD_OUT, MOST_HELD_OUT = 0.05, 500  # of the pairs, and how many at most, unless --eval_pairs says otherwise
READING = "reading and tokenising the pairs"

Reports = list[tuple[str, Report]]  # of each source, with its name; places are the numbers in PairSet.sources


@dataclass(frozen=True)
class Tokenised:
    """What the child process hands back."""

    folder: Path  # of the PairSet
    weights: list[float] | None  # each source's share of the mix
    reports: Reports


@dataclass(frozen=True)
class Loaded:
    """The pairs of a run, and what became of the rows that they are from."""

    train: PairSet
    held_out: PairSet  # may be empty
    train_reports: Reports
    held_out_reports: Reports  # the same, if held-out pairs are from the training rows
    notes: list[str]  # what became of pairs after that: mixed, or left out of training


def load_pairs(options: Options, tokenizer: PreTrainedTokenizerBase, here: World, date: str) -> tuple[PairSet, PairSet]:
    """The tokenised training and held-out pairs. Says what was left out or changed.

    date: of the run's start, ISO, for chat templates that print it.
    """
    loaded = read_pairs(options, tokenizer, here, date)
    return loaded.train, loaded.held_out


def read_pairs(options: Options, tokenizer: PreTrainedTokenizerBase, here: World, date: str) -> Loaded:
    """The same, with the reports. Of the options, --max_length must be decided."""
    with console.working(READING):
        training, evaluation = in_a_child(READING, lambda: _tokenise(options, tokenizer, date), here.all_cores)
    for found in filter(None, (training, evaluation)):
        _say(found.reports)
    notes: list[str] = []

    def note(line: str) -> None:
        console.say(line)
        notes.append(line)

    train = PairSet.open(training.folder)
    held_out: PairSet | None = None
    if evaluation is not None:
        held_out = _first(PairSet.open(evaluation.folder), options, whole=options.eval_dataset is not None, note=note)
        whose = "--eval_dataset" if options.eval_dataset is not None else "its own test split"
        train = _without_shared(train, held_out, whose, note)  # before the mix, which has its shares of what is left
    if training.weights is not None:
        shares = [(name, weight) for (name, _), weight in zip(training.reports, training.weights, strict=True)]
        train = mixed(train, shares, options.seed, note)
    if not len(train):
        raise UserError("no training pair is left: the lines above say why")
    if evaluation is None or held_out is None:
        wanted = held_out_wanted(len(train), options.eval_pairs)
        train, held_out = hold_out(train, options.eval_pairs)
        if (said := far_from(wanted, len(held_out))) is not None:
            note(said)
        return Loaded(train, held_out, training.reports, training.reports, notes)
    return Loaded(train, held_out, training.reports, evaluation.reports, notes)


def _say(reports: Reports) -> None:
    for name, report in reports:
        for line in report.lines():
            console.say(f"{name}: {line}")


def read_dataset(
    options: Options, tokenizer: PreTrainedTokenizerBase, here: World, date: str
) -> tuple[PairSet, Reports]:
    """The pairs of --dataset for an evaluation, the first --eval_pairs if that is given, and what became of the rows.

    Where --dataset_split is auto, of a set with several splits its test split is read, if it has one. Raises UserError
    if no pair is left.
    """
    with console.working(READING):
        found = in_a_child(READING, lambda: _tokenise_dataset(options, tokenizer, date), here.all_cores)
    _say(found.reports)
    pairs = _first(PairSet.open(found.folder), options, whole=True, note=console.say)
    if not len(pairs):
        raise UserError(f"--dataset {options.dataset}: no pair is left to evaluate: the lines above say why")
    return pairs, found.reports


def mixed(pairs: PairSet, shares: list[tuple[str, float]], seed: int, note: Callable[[str], None]) -> PairSet:
    """The largest mix in which each source has its share of the pairs, and no pair is there twice.

    shares: each source's name and weight. Which pairs of a source are taken follows from the seed. Pairs of one prompt
    are taken one after another. `note` gets a line about each source.
    """
    counts = np.bincount(pairs.sources, minlength=len(shares))
    if not counts.all():
        raise UserError(
            f"no pair of {shares[int(counts.argmin())][0]} is left for the mix: leave it out, or its weight"
        )
    total = min(count / weight for count, (_, weight) in zip(counts, shares, strict=True))
    chosen = []
    for source, (name, weight) in enumerate(shares):
        taken = round(total * weight)
        if not taken:
            raise UserError(
                f"{name} has the weight {weight:g} in a mix of {round(total)} pairs, which is less than one pair: "
                "raise its weight, or leave it out"
            )
        own = np.flatnonzero(pairs.sources == source)
        _, group = np.unique(pairs.pair_groups[own], return_inverse=True)
        rank = np.random.default_rng([seed, source]).permutation(group.max(initial=-1) + 1)
        chosen.append(own[np.argsort(rank[group.reshape(-1)], kind="stable")][:taken])
        note(f"{name}: {len(chosen[-1])} of {len(own)} pairs are in the mix")
    return pairs.subset(np.sort(np.concatenate(chosen)))


def held_out_wanted(pairs: int, eval_pairs: int | None) -> int:
    """About how many of the training pairs are to be held out."""
    return eval_pairs if eval_pairs is not None else min(MOST_HELD_OUT, max(1, round(HELD_OUT * pairs)))


def far_from(wanted: int, held_out: int) -> str | None:
    """What is to be said if half as many pairs are held out as wanted, or twice as many; None if that is not so."""
    if wanted and not held_out:
        return "no pair is held out, because all prompts are variants of one: name an --eval_dataset to measure on"
    if wanted / 2 <= held_out <= wanted * 2:
        return None
    return (
        f"{counted(held_out, 'pair')} held out where about {wanted} were wanted: pairs of a prompt and its variants "
        "stay on one side; name an --eval_dataset to choose them yourself"
    )


def hold_out(train: PairSet, eval_pairs: int | None) -> tuple[PairSet, PairSet]:
    """Holds out some of the training pairs."""
    if eval_pairs == 0 or len(train) < 2:
        return train, train.subset([])
    if eval_pairs is not None and eval_pairs > len(train) / 2:
        raise UserError(
            f"--eval_pairs {eval_pairs} would hold out more than half of the {len(train)} pairs: lower it, or name an "
            "--eval_dataset"
        )
    fraction, most = (HELD_OUT, MOST_HELD_OUT) if eval_pairs is None else (1.0, eval_pairs)
    sizes = np.bincount(train.pair_groups, minlength=len(train.prompts))
    groups = held_out(train.prompt_hashes, families(train.prompt_keys), sizes, fraction, most)
    mask = groups[train.pair_groups]
    return train.subset(np.flatnonzero(~mask)), train.subset(np.flatnonzero(mask))


def _first(pairs: PairSet, options: Options, whole: bool, note: Callable[[str], None]) -> PairSet:
    """As many pairs as --eval_pairs asks for; by default all of an --eval_dataset (`whole`), or 500 of a split."""
    most = len(pairs) if whole else MOST_HELD_OUT
    most = most if options.eval_pairs is None else options.eval_pairs
    if most < len(pairs):
        note(f"the first {most} of {len(pairs)} held-out pairs are used; --eval_pairs takes more or fewer")
    return pairs.subset(np.arange(min(most, len(pairs))))


def _without_shared(train: PairSet, evaluation: PairSet, whose: str, note: Callable[[str], None]) -> PairSet:
    """The training pairs without those whose prompt is also among the held-out ones, which are `whose`."""
    if not len(evaluation):
        return train
    both = shared(train.prompt_keys, evaluation.prompt_keys)[train.pair_groups]
    if both.all():
        remedy = "name different data, or --eval_pairs 0"
        raise UserError(f"every prompt of --dataset is also in {whose}: {remedy}")
    if both.any():
        verb = "is" if both.sum() == 1 else "are"
        note(f"{counted(int(both.sum()), 'training pair')} {verb} left out: held-out pairs have the same prompts")
    return train.subset(np.flatnonzero(~both))


def _tokenise(options: Options, tokenizer: PreTrainedTokenizerBase, date: str) -> tuple[Tokenised, Tokenised | None]:
    """Tokenises what the run reads: the training sources, and the held-out ones if they are named or come with them.

    Runs in a child process, because `datasets` takes 90 MiB that the ranks do not need.
    """
    from dpo_ds.data.sources import load_sources

    with scratch_folder(Path(tempfile.gettempdir()), "dpo_ds-data") as folder:
        tempfile.tempdir = str(folder)  # `datasets` copies rows there, and does not remove them in a forked process
        read = _Reader(options, tokenizer, date)
        training = load_sources(options.dataset, folder, options.dataset_split, options.dataset_config)
        weights = [found.source.weight for found in training if found.source.weight is not None]
        train = read("train", [(found.source.name, found.split) for found in training], weights or None)
        if options.eval_dataset is not None:
            evaluation = load_sources(options.eval_dataset, folder, role="eval")
            return train, read("eval", [(found.source.name, found.split) for found in evaluation])
        tests = [(f"{found.source.name}, split {found.test.name}", found.test) for found in training if found.test]
        if not tests or options.eval_pairs == 0:
            return train, None
        return train, read("train", tests)


def _tokenise_dataset(options: Options, tokenizer: PreTrainedTokenizerBase, date: str) -> Tokenised:
    """Tokenises --dataset for `read_dataset`, in a child process."""
    from dpo_ds.data.sources import flag, load_sources

    role = "eval" if options.dataset_split == "auto" else "train"
    with scratch_folder(Path(tempfile.gettempdir()), "dpo_ds-data") as folder:
        tempfile.tempdir = str(folder)
        try:
            found = load_sources(options.dataset, folder, options.dataset_split, options.dataset_config, role)
        except UserError as error:
            raise UserError(str(error).replace(f"{flag(role)} ", f"{flag('train')} ", 1)) from error
        return _Reader(options, tokenizer, date)("train", [(each.source.name, each.split) for each in found])


def tokenizing_of(options: Options, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> Tokenizing:
    """How the run's options tokenise. date: ISO; it counts only for a chat template that prints it."""
    assert options.max_length is not None
    return Tokenizing(
        options.max_length,
        options.truncation,
        options.chat_template,
        options.min_prompt_tokens,
        template_variables(options),
        date if prints_date(tokenizer) else None,
    )


def answer_end(options: Options, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that answers end with in this run."""
    return end_token(tokenizer, tokenizing_of(options, tokenizer))


class _Reader:
    """Tokenises sources with the run's tokenizer and options."""

    def __init__(self, options: Options, tokenizer: PreTrainedTokenizerBase, date: str):
        from dpo_ds.data.rows.row import Reading

        self.options = options
        self.encoder = Encoder(tokenizer, tokenizing_of(options, tokenizer, date))
        markers = self.encoder.markers if self.encoder.template else None
        columns = read_columns(options.columns)
        self.reading = Reading(columns, options.pairs, options.min_margin, markers, self.encoder.ends)

    def __call__(self, role: str, splits: "list[tuple[str, Split]]", weights: list[float] | None = None) -> Tokenised:
        """The sources' pairs as one set. Raises UserError, naming the source, if its rows cannot be used."""
        from dpo_ds.data.cache import tokenize_pairs
        from dpo_ds.data.rows.forms import require_form
        from dpo_ds.data.sources import flag

        cache = Path(self.options.cache_dir).expanduser() / "tokens"
        for name, split in splits:
            with _named(f"{flag(role)} {name}"):
                require_form(split.columns, self.reading)
        read = [split for _, split in splits]
        folder, reports = tokenize_pairs(read, self.encoder, self.reading, self.options.group_prompts, cache)
        for (name, _), report in zip(splits, reports, strict=True):
            with _named(f"{flag(role)} {name}"):
                report.check(self.options.max_left_out)
        return Tokenised(folder, weights, [(name, report) for (name, _), report in zip(splits, reports, strict=True)])


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Names what a UserError is about, because a run may read several sources."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
