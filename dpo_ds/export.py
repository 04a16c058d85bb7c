"""Exports training weights to a plain Hugging Face folder: LoRA merged in, written layer by layer into shards.

    python -m dpo_ds.export --checkpoint runs/x/checkpoints/step-000100 --output_dir merged

No process ever holds more than a shard and a layer beyond its own partition. At the end of a run, the export reads the
live engine and the ranks take turns in writing shards. The command exports a checkpoint in one CPU process.
"""

import argparse
import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from dpo_ds import __version__, checksums
from dpo_ds.config import Options
from dpo_ds.engine.engine import Engine
from dpo_ds.engine.slices import SliceReader
from dpo_ds.engine.state import BUFFER, PREFIX, WEIGHT
from dpo_ds.errors import SaveFailed, UserError, files_of
from dpo_ds.files import follow_umask, move_aside, saving, scratch_folder, write_whole, writing
from dpo_ds.models import generation
from dpo_ds.models.files import fetch_weights, load_tokenizer, weights_hashes
from dpo_ds.models.find import find_model
from dpo_ds.models.lora import LanguageModel, add_lora, plain_model
from dpo_ds.models.model import Model, torch_dtype
from dpo_ds.ranks import collectives, console, world
from dpo_ds.runs import folders, manifest
from dpo_ds.runs.data import answer_end
from dpo_ds.runs.identity import FILES
from dpo_ds.runs.prepare import Run
from dpo_ds.secrets import masked, public_names

SHARD_BYTES = 5_000_000_000  # about transformers' own default

# (names in the training model, whether this rank wants them) -> the whole tensors, or none if this rank wants none
Fetch = Callable[[list[str], bool], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Tensor:
    """A tensor to export: a parameter or buffer unchanged, or a weight to merge with its adapter."""

    name: str  # in the plain model
    source: str  # in the training model
    bytes: int
    adapter: tuple[str, str, float, bool] | None = None  # down, up (lora_A, lora_B), scaling, transposed (Conv1D)

    @property
    def sources(self) -> list[str]:
        return [self.source, *(self.adapter[:2] if self.adapter else ())]

    def merge(self, fetched: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensor in its own dtype; with an adapter, weight + scaling * up @ down, computed in fp32."""
        weight = fetched[self.source]
        if self.adapter is None:
            return weight
        down, up, scaling, transposed = self.adapter
        update = scaling * (fetched[up].float() @ fetched[down].float())
        return (weight.float() + (update.t() if transposed else update)).to(weight.dtype)


def layers(model: LanguageModel, itemsize: int) -> Iterator[list[Tensor]]:
    """Yields the tensors to export, one transformer layer at a time; tensors outside the layers come one by one.

    `model` is a causal LM or peft's wrapper of one, live (partitioned or not) or on the meta device.
    """
    group: list[Tensor] = []
    previous = None
    for tensor in _tensors(model, itemsize):
        layer = re.match(r"(.*?\.\d+)\.", tensor.name)
        key = layer.group(1) if layer else tensor.name
        if group and key != previous:
            yield group
            group = []
        group.append(tensor)
        previous = key
    yield group


def _tensors(model: LanguageModel, itemsize: int) -> Iterator[Tensor]:
    adapters = {}
    wrapped = hasattr(model, "get_base_model")
    for name, module in model.named_modules() if wrapped else ():
        if getattr(module, "lora_A", None):
            (adapter,) = module.lora_A
            adapters[f"{name}.base_layer.weight"] = (
                f"{name}.lora_A.{adapter}.weight",
                f"{name}.lora_B.{adapter}.weight",
                module.scaling[adapter],
                getattr(module, "fan_in_fan_out", False),
            )
    persistent = model.state_dict(keep_vars=True).keys()
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]
    for source, tensor in named:  # tied parameters come once, under their first name
        if ".lora_" in source:
            continue
        name = source.removeprefix("base_model.model.").replace(".base_layer.", ".") if wrapped else source
        size = getattr(tensor, "ds_numel", tensor.numel()) * (
            itemsize if tensor.is_floating_point() else tensor.itemsize
        )
        yield Tensor(name, source, size, adapters.get(source))


def write_weights(model: LanguageModel, fetch: Fetch, folder: Path, itemsize: int, rank: int, ranks: int) -> None:
    """Writes model-0000k-of-0000n.safetensors and the index. Every rank calls this; shard k is written by rank k modulo
    the number of ranks."""
    plan: list[list[list[Tensor]]] = [[]]  # shards of layers
    filled = 0
    for layer in layers(model, itemsize):
        size = sum(tensor.bytes for tensor in layer)
        if plan[-1] and filled + size > SHARD_BYTES:
            plan.append([])
            filled = 0
        plan[-1].append(layer)
        filled += size
    plain = plain_model(model)
    for number, shard in enumerate(plan):
        own = number % ranks == rank
        tensors: dict[str, torch.Tensor] = {}
        for layer in shard:
            fetched = fetch([source for tensor in layer for source in tensor.sources], own)
            if own:
                merged = {tensor.name: tensor.merge(fetched) for tensor in layer}
                hub = revert_weight_conversion(plain, merged)  # back to the hub's names: fused experts are split again
                # Split experts are views of one block, which safetensors refuses to store.
                tensors |= {name: tensor.contiguous().clone() for name, tensor in hub.items()}
        if own:
            file = folder / _shard_name(number, len(plan))
            save_file(tensors, file, metadata={"format": "pt"})
            follow_umask(file)
    collectives.wait_for_all()
    if rank == 0:
        _write_index(folder, len(plan))


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(folder: Path, count: int) -> None:
    if count == 1:
        return
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    total = 0
    for number in range(count):
        name = _shard_name(number, count)
        with safe_open(folder / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        total += (folder / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


@dataclass(frozen=True)
class Papers:
    """All that a Hugging Face folder holds beside the weights."""

    config: PreTrainedConfig
    architecture: str  # the class of the model
    dtype: torch.dtype
    generation: str  # the text of generation_config.json
    tokenizer: PreTrainedTokenizerBase
    card: str  # the text of README.md

    def write(self, folder: Path) -> None:
        config = copy.deepcopy(self.config)
        config.dtype, config.architectures = self.dtype, [self.architecture]
        config.save_pretrained(folder)
        write_whole(folder / generation.FILE, self.generation)
        self.tokenizer.save_pretrained(folder)
        write_whole(folder / "README.md", self.card)


def papers_of(run: Run, model: LanguageModel, summary: dict, stage: int) -> Papers:
    """The papers of a run's merged model."""
    plain, options = plain_model(model), run.options
    end = answer_end(options, run.tokenizer)
    return Papers(
        plain.config,
        type(plain).__name__,
        torch_dtype(options.precision),
        generation.text_for(run.weights, plain.config, end),
        run.tokenizer,
        model_card(options, summary, run.train_pairs.digest, stage),
    )


def rehearse(run: Run, policy: Engine) -> None:
    """Writes the papers once into a folder that goes again, before the first step: a config or a tokenizer that cannot
    be saved must not be found out at the end of the run."""

    def write() -> None:
        with writing(run.folder), scratch_folder(run.folder, "rehearsal") as folder:
            papers_of(run, policy.model, {}, policy.stage).write(folder)

    if run.options.export == "merged":
        collectives.on_rank_0(write)


def write_folder(model: LanguageModel, fetch: Fetch, folder: Path, papers: Papers, run: Run | None = None) -> None:
    """Writes the Hugging Face folder under another name and renames it at the end, so it is never incomplete.

    run: whose folder it is, to write the manifest to. Raises SaveFailed, on every rank, if a file cannot be written.
    """
    here = world.from_environment()
    partial = folder.with_name(folder.name + ".partial")
    try:
        collectives.on_rank_0(lambda: _make_anew(partial, folder))
        with saving(folder):
            write_weights(model, fetch, partial, papers.dtype.itemsize, here.rank, here.size)
        collectives.on_rank_0(lambda: _write_papers(papers, partial, folder))
        files = manifest.measure(partial, folder)
        collectives.on_rank_0(lambda: _complete(partial, folder, files, run))
    except SaveFailed:
        if here.speaks:  # what half of an export took is what the next one needs
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_anew(partial: Path, folder: Path) -> None:
    with saving(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)


def _write_papers(papers: Papers, partial: Path, folder: Path) -> None:
    with saving(folder):
        papers.write(partial)


def _complete(partial: Path, folder: Path, files: checksums.Files, run: Run | None) -> None:
    """Writes the manifest and gives the folder its name."""
    with saving(folder):
        if run is not None:
            record = checksums.sealed({"run": run.hash, FILES: files})
            write_whole(run.folder / folders.MERGED, json.dumps(record, indent=1))
        partial.rename(folder)


def export_engine(run: Run, policy: Engine, summary: dict) -> Path:
    """Exports a live policy to the run's merged/ folder, by all ranks together."""
    folder = run.folder / "merged"
    if collectives.on_rank_0(folder.exists):
        problem = folders.merged_damage(run.folder, run.hash)
        if problem is None:
            console.say(f"{folder} is there already from an earlier start of this run, and is kept")
            return folder
        aside = collectives.on_rank_0(lambda: move_aside(folder))
        console.say(f"{folder} cannot be used: it {problem}; it is now called {aside.name}")
    with console.working("writing the merged checkpoint"):
        papers = papers_of(run, policy.model, summary, policy.stage)
        with writing(folder):
            write_folder(policy.model, policy.weights(), folder, papers, run)
    console.say(f"merged checkpoint: {folder}")
    return folder


def export_checkpoint(source: Path, folder: Path, option: str = "--checkpoint") -> Path:
    """Exports a training checkpoint, which the user named with `option`. Raises UserError if `source` is no checkpoint
    or `folder` exists."""
    from transformers import AutoModelForCausalLM

    if folder.exists():
        raise UserError(f"--output_dir {folder} is there already: name a new folder")
    if reason := folders.damage(source, run=None):
        raise folders.unusable(option, source, reason)
    facts = folders.describe(source)
    options = folders.options_of(facts["options"], f"{option} {source}")
    found = find_model(options.model, options.trust_remote_code)
    dtype, reader = torch_dtype(options.precision), SliceReader(source, PREFIX)
    if options.lora:
        model = _adapted_base(found, options, facts["identity"][FILES]["--model"])
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found.config, trust_remote_code=options.trust_remote_code)
    # Only what was frozen is the base's: what was trained and is missing must be an error.
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def fetch(names: list[str], wanted: bool) -> dict[str, torch.Tensor]:
        whole = {}
        for name in names:
            kind = BUFFER if f"{BUFFER}/model.{name}" in reader else WEIGHT
            stored = f"{kind}/model.{name}"
            tensor = frozen[name].detach() if name in frozen and stored not in reader else reader.whole(stored)
            whole[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return whole

    tokenizer, plain = load_tokenizer(found), plain_model(model)
    end = answer_end(options, tokenizer)
    papers = Papers(
        plain.config,
        type(plain).__name__,
        dtype,
        generation.text_for(generation.folder_of(found.source), plain.config, end),
        tokenizer,
        model_card(options, {"step": facts["step"]}, None, facts["stage"]),
    )
    with files_of("--output_dir", folder):
        write_folder(model, fetch, folder, papers)
    return folder


def _adapted_base(found: Model, options: Options, hashes: dict[str, str]) -> LanguageModel:
    """The base that LoRA adapters were trained on, with new adapters on it: a checkpoint does not hold frozen weights.

    hashes: of the base's files when the run began. Raises UserError if they have changed.
    """
    folder, cache = fetch_weights(found), Path(options.cache_dir).expanduser()
    if weights_hashes(folder, cache, options.trust_remote_code) != hashes:
        raise UserError(
            f"{options.model} has changed since the adapters were trained on it: put the old files back to export them"
        )
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch_dtype(options.precision),
        trust_remote_code=options.trust_remote_code,
        use_safetensors=True,
    )
    return add_lora(base, options)


# Where things lie on this machine: nothing to a reader of the card.
PLACES = ("output_dir", "cache_dir", "nvme_path", "resume", "reference_table")
# Options that name models, data or files, by hub id or by a path of this machine.
NAMED = ("model", "dataset", "eval_dataset", "reference_model", "adapter", "reference_adapter", "ds_config")


def model_card(options: Options, summary: dict, digest: str | None, stage: int) -> str:
    """The text of the exported README.md: the model, the data, the options and the final metrics. It holds no path of
    this machine."""
    values = {name: value for name, value in vars(options).items() if value is not None and name not in PLACES}
    values |= {name: public_names(values[name]) for name in NAMED if name in values}
    values = {name: masked(value) if isinstance(value, str) else value for name, value in values.items()}
    numbers = [f"| {key} | {value:.6g} |" for key, value in summary.items() if isinstance(value, (int, float))]
    settings = [f"| {key} | {value} |" for key, value in values.items()]
    head = ["---", f"base_model: {values['model']}", "library_name: transformers", "tags: [dpo, dpo_ds]", "---"]
    trusted = (
        "It was trained with `--trust_remote_code`: loading it runs Python code that came with "
        f"`{values['model']}`. Read that code first."
    )
    text = [
        f"# {Path(values['model']).name}, aligned with DPO",
        "",
        f"`{values['model']}` trained on `{values['dataset']}` by dpo_ds {__version__} (ZeRO stage {stage}).",
        *([trusted] if options.trust_remote_code else []),
        *([f"Training pairs' digest: `{digest}`."] if digest else []),
        "",
        *(["| at the end | |", "|---|---|", *numbers, ""] if numbers else []),
        "| option | |",
        "|---|---|",
        *settings,
        "",
    ]
    return "\n".join([*head, *text])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m dpo_ds.export", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's checkpoints/step-… folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="the new Hugging Face folder")
    arguments = parser.parse_args(argv)
    folder = export_checkpoint(arguments.checkpoint, arguments.output_dir)
    console.say(f"merged checkpoint: {folder}")


if __name__ == "__main__":
    console.run_main(main)
