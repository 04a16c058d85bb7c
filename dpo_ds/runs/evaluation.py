"""Prepares an evaluation, before a weight is read: plans, finds both models, checks their tokens, reads the pairs."""

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_ds.config import Options, Planned, check
from dpo_ds.data.pairs import PairSet, require_holds
from dpo_ds.engine.requirements import require_nvme
from dpo_ds.engine.tiers import reference_config, swap_folders
from dpo_ds.errors import UserError, require_writable, said_of
from dpo_ds.losses.table import Settings, losses_of
from dpo_ds.models.adapter import find_adapter
from dpo_ds.models.files import fetch_weights, load_tokenizer
from dpo_ds.plan.footprint import ScoringFootprint
from dpo_ds.plan.refuse import for_run
from dpo_ds.ranks.collectives import one_after_another
from dpo_ds.ranks.world import World
from dpo_ds.runs import folders
from dpo_ds.runs.data import read_dataset, read_pairs
from dpo_ds.runs.loadable import Loadable, adapter_hashes_of, hashes_of, plan_and_find, require_same_tokens
from dpo_ds.runs.named import Named

# Of a run that is evaluated, unless the command line says otherwise: how pairs become tokens, and in which precision.
TOKENS = (
    *("precision", "max_length", "truncation", "min_prompt_tokens", "chat_template", "chat_template_kwargs"),
    "group_prompts",
)
# Likewise which pairs, if the command line names no --dataset.
PAIRS = (
    *("dataset", "dataset_split", "dataset_config", "columns", "pairs", "min_margin", "eval_dataset", "eval_pairs"),
    *("max_left_out", "seed"),
)


@dataclass(frozen=True)
class Side:
    """The policy or the reference of an evaluation."""

    named: Named
    options: Planned  # its plan's
    loadable: Loadable

    def with_weights(self, exported: Path | None = None) -> "Side":
        """The same with its weights and their hashes: those in `exported`, or its own, downloaded if needed."""
        with said_of(self.named.option):
            weights = exported or one_after_another(lambda: fetch_weights(self.loadable.model))
        hashes = hashes_of(self.loadable.model, weights, self.options)
        if self.loadable.adapter is not None:
            hashes |= adapter_hashes_of(self.loadable.adapter, self.options)
        return dataclasses.replace(self, loadable=dataclasses.replace(self.loadable, weights=weights, hashes=hashes))


@dataclass(frozen=True)
class Prepared:
    """An evaluation that is ready to start, but for its weights."""

    policy: Side
    reference: Side | None
    tokenizer: PreTrainedTokenizerBase
    pairs: PairSet
    sources: list[str]  # their names
    dataset: str  # in words


def like_its_run(policy: Named, options: Options, given: set[str]) -> Options:
    """The options with those of the policy's run, where it is known and the user has `given` no others.

    Raises UserError without pairs: if neither the user nor a run names them.
    """
    run = policy.options
    if "dataset" not in given and run is None:
        there = "" if Path(policy.model).expanduser().exists() else ", which is no folder here,"
        raise UserError(
            f"--dataset is needed: name the pairs on which {policy.option} {policy.model}{there} is evaluated"
        )
    if "dataset" in given and options.eval_dataset is not None:
        raise UserError("--eval_dataset is for training: here --dataset names the pairs to evaluate on")
    if run is None:
        return options
    if run.trust_remote_code and not options.trust_remote_code:
        raise UserError(f"{policy.option}: the run's model {run.model} brings its own code: add --trust_remote_code")
    names = [name for name in (*TOKENS, *(PAIRS if "dataset" not in given else ())) if name not in given]
    changed = options.replace(**{name: getattr(run, name) for name in names})
    check(changed)
    return changed


def beta_of(policy: Named, options: Options) -> float:
    """The factor of the rewards: --beta, else the run's if its loss compares with a reference, else DPO's."""
    if options.beta is not None or policy.options is None:
        return Settings().beta if options.beta is None else options.beta
    of_reference = [term for term in losses_of(policy.options) if term.loss.reference and term.loss.beta]
    return of_reference[0].settings.beta if of_reference else Settings().beta


def scoring(named: Named, options: Options) -> Options:
    """The options of a plan that only scores with this model."""
    nothing = ("adapter", "reference_model", "reference_adapter", "reference_table", "reference_update_every")
    plain = dict.fromkeys((*nothing, "reference_update_alpha", "ld_alpha", "sft_weight", "loss_weights", "beta"))
    return options.replace(
        **plain, model=named.model, lora=False, loss="sigmoid", reference="precomputed", router_aux_loss_coef="0"
    )


def prepare(policy: Named, reference: Named | None, options: Options, here: World, own_pairs: bool) -> Prepared:
    """Prepares the evaluation. Raises UserError, on every rank, for whatever cannot work.

    `here` is what join.join() returned. own_pairs: the held-out pairs of the policy's run, instead of --dataset.
    """
    one_after_another(lambda: require_writable("--cache_dir", Path(options.cache_dir).expanduser()))
    first = _side(policy, options, here)
    with said_of(policy.option):
        tokenizer = load_tokenizer(first.loadable.model)
    options = options.replace(max_length=first.options.max_length, precision=first.options.precision)
    other = None
    if reference is not None:
        other = _side(reference, options, here)
        with said_of(reference.option):
            theirs = load_tokenizer(other.loadable.model)
        require_same_tokens(tokenizer, theirs, reference.model)
    pairs, sources, dataset = one_after_another(lambda: _pairs(policy, options, tokenizer, here, own_pairs))
    longest = int(pairs.packed_lengths.max())
    for side in filter(None, (first, other)):
        require_holds(side.options, longest)
    return Prepared(first, other, tokenizer, pairs, sources, dataset)


def _side(named: Named, options: Options, here: World) -> Side:
    """A model with its plan, before its weights."""
    with said_of(named.option):
        planned, found = plan_and_find(lambda: for_run(scoring(named, options), ScoringFootprint), options, here)
    if used := swap_folders(reference_config(found.ds_config)):
        one_after_another(lambda: require_nvme(used))
    if (name := named.adapter) is not None:
        trusted = options.trust_remote_code
        adapter = one_after_another(lambda: find_adapter(named.option, name, named.model, trusted))
        found = dataclasses.replace(found, adapter=adapter)
    return Side(named, planned, found)


def _pairs(
    policy: Named, options: Options, tokenizer: PreTrainedTokenizerBase, here: World, own_pairs: bool
) -> tuple[PairSet, list[str], str]:
    """The pairs, the names of their sources, and which they are in words."""
    date = (policy.run and folders.started(policy.run)) or datetime.date.today().isoformat()
    if not own_pairs:
        pairs, reports = read_dataset(options, tokenizer, here, date)
        trained = policy.options is not None and policy.options.dataset == options.dataset
        dataset = options.dataset + (", which the run trained on in part" if trained else "")
        return pairs, [name for name, _ in reports], dataset
    loaded = read_pairs(options, tokenizer, here, date)
    if not len(loaded.held_out):
        raise UserError(f"the run of {policy.option} {policy.short} held out no pairs: name a --dataset")
    names = [name for name, _ in loaded.held_out_reports]
    return loaded.held_out, names, f"the held-out pairs of {options.eval_dataset or options.dataset}, as in the run"
