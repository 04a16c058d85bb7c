"""A model that an engine can be built of: the checks that precede its weights, then the weights and their hashes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dpo_ds.config import Options, Planned
from dpo_ds.engine.tiers import fill_tier
from dpo_ds.errors import UserError, one_line
from dpo_ds.models.adapter import Adapter
from dpo_ds.models.files import weight_files, weights_hashes
from dpo_ds.models.find import find_model
from dpo_ds.models.headers import require_fit
from dpo_ds.models.model import Model, torch_dtype
from dpo_ds.plan.plan import Plan
from dpo_ds.ranks import console
from dpo_ds.ranks.collectives import on_rank_0
from dpo_ds.ranks.world import World
from dpo_ds.runs import folders
from dpo_ds.scoring.twin import choose_kernel, fused_problem, require_exact


@dataclass(frozen=True)
class Loadable:
    """A model with what an engine of it needs."""

    model: Model
    weights: Path  # the folder
    ds_config: dict  # the policy's: engine/tiers.py makes the reference's of it
    attention: str  # the kernel
    hashes: dict[str, str] = field(default_factory=dict)  # of its files and the adapter's, by name
    adapter: Adapter | None = None  # on its weights


def find_loadable(options: Planned, here: World) -> Loadable:
    """--model with its kernel and DeepSpeed config, before its weights are fetched. Raises UserError, on every rank, if
    it cannot be scored exactly, or if the config contradicts the options."""
    trusted = options.trust_remote_code
    model = find_model(options.model, trusted)
    on_rank_0(lambda: require_exact(options.model, model.config, trusted))
    kernel = on_rank_0(lambda: _kernel(options, model))
    ds_config = fill_tier(options.ds_config, options, model, here.size, torch.cuda.is_available())
    return Loadable(model, Path(model.source), ds_config, kernel)


def plan_and_find(plan: Callable[[], Plan], asked: Options, here: World) -> tuple[Planned, Loadable]:
    """The options of rank 0's plan, as far as they hold on this machine, and --model. asked: the user's options.

    Raises UserError, on every rank, for a plan that does not fit, and as fused_where_it_works and find_loadable do.
    """
    planned = fused_where_it_works(on_rank_0(lambda: plan().options), asked.fuse)
    return planned, find_loadable(planned, here)


def fused_where_it_works(planned: Planned, asked: str) -> Planned:
    """The options with --fuse on only if that is right on this machine. asked: what the user said.

    Raises UserError, on every rank, if the user said `on` and it is not.
    """
    if planned.fuse == "off":
        return planned

    def problem() -> str | None:
        model = find_model(planned.model, planned.trust_remote_code)
        with console.working("compiling the layers' small functions"):
            found = fused_problem(model.config, torch_dtype(planned.precision), _device(), planned.trust_remote_code)
        if found is not None and asked == "on":
            raise UserError(f"--fuse on: on this machine it {found}; leave it out")
        if found is not None:
            console.say(f"the layers' small functions are not compiled: that {found}")
        return found

    return planned if on_rank_0(problem) is None else planned.replace(fuse="off")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _kernel(options: Options, model: Model) -> str:
    device = _device()
    dtype = torch_dtype(options.precision)
    kernel, passed_over = choose_kernel(options.attention, model.config, dtype, device, options.trust_remote_code)
    for problem in passed_over:
        console.say(f"{problem}: {kernel} is used")
    return kernel


def require_same_tokens(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, name: str) -> None:
    """Raises UserError if a token id of the policy's stands for another token in the reference, or for none."""
    theirs = reference.get_vocab()
    for token, number in sorted(policy.get_vocab().items(), key=lambda entry: entry[1]):
        if theirs.get(token) != number:
            there = f"is {theirs[token]}" if token in theirs else "is missing"
            raise UserError(
                f"--reference_model {name} has other token ids: {one_line(repr(token))} is {number} in --model, but "
                f"{there} there; take a reference of the same family"
            )


def hashes_of(model: Model, folder: Path, options: Planned) -> dict[str, str]:
    """Rank 0's hashes of a model's files, on every rank. Raises UserError, on every rank, for weights that are not
    those of the model's config, or not finite, or no longer those that a run has exported."""
    if folders.is_merged(folder) and (problem := folders.merged_damage(folder.resolve().parent, None)):
        raise UserError(f"{folder} {problem}: its run's command exports it again; a copy elsewhere is taken as it is")
    cache = Path(options.cache_dir).expanduser()

    def checked() -> dict[str, str]:
        require_fit(model, weight_files(folder))
        return weights_hashes(folder, cache, options.trust_remote_code)

    return on_rank_0(checked)


def adapter_hashes_of(adapter: Adapter, options: Planned) -> dict[str, str]:
    """Likewise of an adapter's files."""
    return on_rank_0(lambda: adapter.hashes(Path(options.cache_dir).expanduser()))
