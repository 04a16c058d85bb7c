"""Prepares a run, before a model is loaded: decides options, finds files, checks and tokenises pairs, fills the config.

Mistakes of the user's are found here, in seconds, and raised as UserError with the remedy.
"""

import datetime
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_ds.config import Decided, Options, Planned
from dpo_ds.data.pairs import PairSet, require_holds
from dpo_ds.data.steps import Schedule
from dpo_ds.engine.requirements import require_compiler, require_nvme
from dpo_ds.engine.tiers import swap_folders
from dpo_ds.errors import UserError, require_writable, said_of
from dpo_ds.files import sha256_of
from dpo_ds.losses.table import losses_of
from dpo_ds.models.adapter import Adapter, find_adapter
from dpo_ds.models.files import fetch_weights, load_tokenizer
from dpo_ds.models.find import known_model
from dpo_ds.models.model import Model
from dpo_ds.plan.choose import choose, tokens_on_cpu
from dpo_ds.plan.machine import Machine
from dpo_ds.plan.plan import Plan
from dpo_ds.plan.refuse import for_run
from dpo_ds.ranks import console
from dpo_ds.ranks.collectives import on_rank_0, one_after_another
from dpo_ds.ranks.world import World
from dpo_ds.runs import folders
from dpo_ds.runs.data import read_pairs
from dpo_ds.runs.identity import PARENT, hash_of, identity
from dpo_ds.runs.loadable import (
    Loadable,
    adapter_hashes_of,
    find_loadable,
    hashes_of,
    plan_and_find,
    require_same_tokens,
)
from dpo_ds.runs.lock import Lock
from dpo_ds.runs.shared import require_shared
from dpo_ds.runs.table_file import TableFile

# How far a micro-batch may grow for a group of many answers. A longer group is split.
MOST_GROWTH = 4


@dataclass(frozen=True)
class GivenTable:
    """A reference's logps from --reference_table, as references give them: float32."""

    training: np.ndarray  # NaN for answers that are not in the schedule
    held_out: np.ndarray
    weights: dict[str, str]  # the hashes of the files that they were computed with


@dataclass(frozen=True)
class Run:
    """A run that is ready to start."""

    options: Decided
    model: Model
    weights: Path  # the folder from which the policy and the reference are loaded
    tokenizer: PreTrainedTokenizerBase
    ds_config: dict
    train_pairs: PairSet
    eval_pairs: PairSet  # may be empty
    dropped_pairs: int  # of training, because truncation made their answers equal
    schedule: Schedule
    attention: str  # the kernel
    adapter: Adapter | None  # that the policy starts from
    reference: Loadable  # the policy's own start, or another
    table: GivenTable | None  # --reference_table
    identity: dict  # what makes another start the same run; empty without a claim
    resume_from: Path | None
    finished: bool  # an earlier start of this run has finished it
    lock: Lock | None  # on the run's folder; None without a claim

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    @property
    def hash(self) -> str:
        """What names the run in its checkpoints."""
        return hash_of(self.identity)

    @property
    def own_checkpoint(self) -> Path | None:
        """The checkpoint from which the run goes on, if it is its own: --resume may name another run's."""
        found = self.resume_from
        return found if found is not None and folders.is_own(self.folder, found) else None

    @property
    def began_elsewhere(self) -> bool:
        """Whether its first start was from another run's checkpoint, which --resume must name at each start."""
        return self.identity.get(PARENT) is not None

    @property
    def keeps_optimizer(self) -> bool:
        """Whether Adam's state comes from the checkpoint. Only the first start from another run's can leave it out."""
        return self.options.resume_optimizer or self.own_checkpoint is not None

    @property
    def starts_equal(self) -> bool:
        """Whether the policy is the same model as the reference before the first step."""
        if self.table is not None:
            return self.table.weights == self.reference.hashes
        start = None if self.adapter is None else self.adapter.folder
        if self.options.reference == "base":
            return start is None
        of_reference = None if self.reference.adapter is None else self.reference.adapter.folder
        return self.options.reference != "none" and self.options.reference_model is None and start == of_reference


def prepare(options: Options, here: World, plan: Plan | None = None, claim: bool = True) -> Run:
    """Prepares the run. Raises UserError, on every rank, for whatever cannot work.

    `here` is what join.join() returned. `plan` is rank 0's plan, if it has been made already. Without `claim`, the
    run's folder is not touched: for commands that need a run's pairs and models, but do not train.
    """
    # The plan comes before any download. It is made for rank 0's machine.
    planned, policy = plan_and_find(lambda: plan or for_run(options), options, here)
    folder = _folder_of(planned)
    model, ds_config = policy.model, policy.ds_config
    tokenizer = load_tokenizer(model)
    require_compiler(planned.ds_config, ds_config, torch.cuda.is_available())
    if used := swap_folders(ds_config):
        if planned.reference_update_every is not None:
            raise UserError(
                f"--reference_update_every reads weights that --ds_config {planned.ds_config} keeps on NVMe: take a "
                "tier that offloads to cpu, or leave --reference_update_every out"
            )
        one_after_another(lambda: require_nvme(used))
    other = _other_reference(planned, tokenizer, here) if planned.reference_model is not None else None
    adapter, of_reference = one_after_another(lambda: _adapters(planned))
    if claim:
        folders.check_folder(folder, planned)  # before any work goes into data
        require_shared(folder)
    one_after_another(lambda: require_writable("--cache_dir", Path(planned.cache_dir).expanduser()))
    date = on_rank_0(lambda: folders.started(folder) or datetime.date.today().isoformat())
    loaded = one_after_another(lambda: read_pairs(planned, tokenizer, here, date))
    train_pairs, eval_pairs = loaded.train, loaded.held_out
    longest = max(int(pairs.packed_lengths.max()) for pairs in (train_pairs, eval_pairs) if len(pairs))
    require_holds(planned, longest)
    if options.micro_batch_tokens is None:
        # The plan assumed pairs as long as --max_length allows. Now the data's groups are known.
        longest = max(int(pairs.group_limits.max()) for pairs in (train_pairs, eval_pairs) if len(pairs))
        free = options.recomputed_layers is None and options.gradient_checkpointing != "off"
        most = model.layers if free else planned.recomputed_layers
        tokens, recomputed = on_rank_0(lambda: _sizes_for(longest, planned, most))
        scored = options.scoring_tokens or (
            max(tokens, planned.scoring_tokens) if torch.cuda.is_available() else tokens
        )
        planned = planned.replace(micro_batch_tokens=tokens, scoring_tokens=scored, recomputed_layers=recomputed)
    schedule = Schedule.of(
        train_pairs.pair_groups, planned.global_batch_pairs, planned.epochs, planned.max_steps, planned.seed
    )
    for pairs in (train_pairs, eval_pairs):
        require_data(planned, pairs)
    table, digest = None, None
    if planned.reference_table is not None:
        table, digest = one_after_another(lambda: _given_table(planned, train_pairs, eval_pairs, schedule))
    decided = planned.decided(
        output_dir=planned.output_dir or str(folder),
        eval_every=planned.eval_every if planned.eval_every is not None else max(1, schedule.steps // 10),
        generations=planned.generations if planned.generations is not None else _generations(planned),
    )
    _require_judged(decided, len(eval_pairs))
    with console.working("fetching the weights"):
        weights = one_after_another(lambda: fetch_weights(model))
        reference = replace(policy, weights=weights)
        if other is not None:
            reference = replace(other, weights=one_after_another(lambda: _fetch_reference(other.model)))
    with console.working("hashing the weights"):
        files = {"--model": hashes_of(model, weights, decided)}
        of_weights = files["--model"]
        if other is not None:
            of_weights = files["--reference_model"] = hashes_of(other.model, reference.weights, decided)
        if adapter is not None:
            files["--adapter"] = adapter_hashes_of(adapter, decided)
        if of_reference is not None:
            of_adapter = adapter_hashes_of(of_reference, decided)
            of_weights = of_weights | of_adapter
            if decided.reference_adapter is not None:
                files["--reference_adapter"] = of_adapter
        reference = replace(reference, hashes=of_weights, adapter=of_reference)
    if digest is not None:
        files["--reference_table"] = {Path(str(decided.reference_table)).name: digest}
    found = folders.Found(resume_from=None, finished=False)
    if claim:
        this_run = identity(decided, ds_config, train_pairs.digest, eval_pairs.digest, date, files)
        # This comes last because it writes to the folder: a run that cannot start leaves nothing behind.
        found = folders.open_folder(folder, decided, this_run, schedule.steps)
    return Run(
        options=decided,
        model=model,
        weights=weights,
        tokenizer=tokenizer,
        ds_config=ds_config,
        train_pairs=train_pairs,
        eval_pairs=eval_pairs,
        dropped_pairs=sum(report.equal_once_cut for _, report in loaded.train_reports),
        schedule=schedule,
        attention=policy.attention,
        adapter=adapter,
        reference=reference,
        table=table,
        identity=found.run,
        resume_from=found.resume_from,
        finished=found.finished,
        lock=found.lock,
    )


def _require_judged(options: Decided, held_out: int) -> None:
    """Raises UserError if --keep_best is given and some checkpoints would have no evaluation."""
    if options.keep_best is None:
        return
    if options.keep_last is None:
        raise UserError("--keep_best without --keep_last keeps all checkpoints: add --keep_last 2, or leave it out")
    if not held_out:
        raise UserError("--keep_best needs held-out pairs: give --eval_dataset, or --eval_pairs above 0")
    if options.save_every and (not options.eval_every or options.save_every % options.eval_every):
        raise UserError(
            f"--keep_best needs an evaluation at each checkpoint, but --save_every is {options.save_every} and "
            f"--eval_every {options.eval_every}: make --save_every a multiple of it"
        )


def require_data(options: Options, pairs: PairSet) -> None:
    """Raises UserError if the pairs lack what the run's losses read of them."""
    for term in losses_of(options):
        if term.loss.margins and (unusable := int((~(pairs.margins > 0)).sum())):  # NaN: not known
            raise UserError(
                f"--loss {term.name} reads by how much a chosen answer is better, but {unusable} of {len(pairs)} pairs "
                "have no margin above 0: name its column with --columns margin=..., or leave these rows out"
            )
        if not term.loss.weighted and len(np.unique(pairs.weights)) > 1:
            raise UserError(
                f"--loss {term.name} sorts a step's pairs, so they cannot be weighted: remove the column weight, or "
                "choose another loss"
            )
        largest = int(np.bincount(pairs.pair_groups).max(initial=0))
        if term.loss.scope == "group" and largest > options.global_batch_pairs:
            _, in_rows = np.unique([pairs.sources, pairs.rows], axis=1, return_counts=True)
            alone = ", or add --group_prompts false" if in_rows.max() <= options.global_batch_pairs else ""
            raise UserError(
                f"--loss {term.name} reads whole rankings, but a prompt has {largest} pairs, more than a step: raise "
                f"--global_batch_pairs to {largest}{alone}"
            )


def _other_reference(options: Planned, tokenizer: PreTrainedTokenizerBase, here: World) -> Loadable:
    """--reference_model, before its weights are fetched. Raises UserError if it cannot score the policy's tokens."""
    assert options.reference_model is not None
    with said_of("--reference_model"):
        found = find_loadable(options.replace(model=options.reference_model), here)
        found.model.max_length(options.max_length)
        require_same_tokens(tokenizer, load_tokenizer(found.model), options.reference_model)
    return found


def _given_table(options: Planned, training: PairSet, held_out: PairSet, schedule: Schedule) -> tuple[GivenTable, str]:
    """--reference_table's values, and the file's hash. Raises UserError if they are of other pairs or another kind."""
    path = Path(str(options.reference_table)).expanduser()
    file = TableFile(path, options.precision, options.ld_alpha is not None)
    needed = np.isin(np.arange(len(training.answers)), training.pairs[schedule.visited()])
    table = GivenTable(
        file.logps(training, needed, "training"),
        file.logps(held_out, np.ones(len(held_out.answers), dtype=bool), "held-out"),
        file.facts["weights"],
    )
    return table, sha256_of(path)


def _adapters(options: Planned) -> tuple[Adapter | None, Adapter | None]:
    """The adapters that the policy starts from, and that the reference has on its weights."""
    policy = reference = None
    if options.adapter is not None:
        policy = find_adapter("--adapter", options.adapter, options.model, options.trust_remote_code)
    if options.reference_adapter is not None:
        base = options.reference_model or options.model
        reference = find_adapter("--reference_adapter", options.reference_adapter, base, options.trust_remote_code)
    elif options.reference in ("precomputed", "live") and options.reference_model is None:
        reference = policy
    return policy, reference


def _fetch_reference(model: Model) -> Path:
    with said_of("--reference_model"):
        return fetch_weights(model)


def _sizes_for(longest: int, planned: Planned, most: int) -> tuple[int, int]:
    """The micro-batch's tokens for data whose longest group has so many: enough not to split it, if they fit; and how
    many layers then recompute their activations, `most` at most.

    On CPU no more than that, since larger micro-batches are not faster there.
    """
    tokens, recomputed = planned.micro_batch_tokens, planned.recomputed_layers
    if longest <= tokens:
        return tokens if torch.cuda.is_available() else min(tokens, tokens_on_cpu(longest)), recomputed
    larger = planned.replace(micro_batch_tokens=min(longest, MOST_GROWTH * tokens))
    for count in dict.fromkeys((recomputed, most)):
        if planned.plan == "off" or choose(larger.replace(recomputed_layers=count), Machine.of(planned)).fits:
            more = f", with {count} layers recomputed" if count != recomputed else ""
            tokens, recomputed = larger.micro_batch_tokens, count
            console.say(f"micro-batches of {tokens} tokens, so that a prompt's answers share one{more}")
            break
    if longest > tokens:
        console.say(f"prompts whose answers need micro-batches of more than {tokens} tokens are split over several")
    return tokens, recomputed


def _folder_of(options: Options) -> Path:
    """The run's folder, by default one named after the model and the first data set."""
    if options.output_dir is not None:
        return Path(options.output_dir)
    first = Path(re.split("[,:]", options.dataset)[0]).name.split(".")[0]
    first = re.sub(r"[*?\[\]]", "x", first)  # a glob's signs
    return Path("runs", f"{Path(options.model).name}-{first}")


def _generations(options: Options) -> int:
    """How many answers to show by default: small models give them in seconds."""
    return 3 if known_model(options.model, options.trust_remote_code).parameters < 1e9 else 0
