"""What a user may name as a model to evaluate: a hub id, a Hugging Face folder, a peft adapter, a run, a checkpoint.

    policy = named("--model", "runs/x/checkpoints/step-000100")
    reference = reference_for(policy, options)

Only small JSON files are read here. A mistake is a UserError with its remedy.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_ds import hub
from dpo_ds.config import Options
from dpo_ds.errors import UserError, one_line
from dpo_ds.models.adapter import CONFIG as ADAPTER_CONFIG
from dpo_ds.runs.folders import checkpoints, describe, is_merged, options_of, read_record


@dataclass(frozen=True)
class Named:
    """A model that the user named, and what else is known about it."""

    option: str  # that names it
    what: str  # in words: what is used
    short: str  # a name for tables and pictures
    model: str  # the folder or hub id with its config and tokenizer, and its weights unless there is a checkpoint
    adapter: str | None = None  # a peft adapter on these weights
    checkpoint: Path | None = None  # of a run: its weights are read from there
    run: Path | None = None  # the folder of the run that it is from
    options: Options | None = None  # that run's
    base: str | None = None  # what it was trained from, if only that is known


def named(option: str, name: str, adapter: str | None = None) -> Named:
    """The model that `option` names, with an adapter on it if one is given as well."""
    found = _named(option, name)
    if adapter is None:
        return found
    if found.adapter is not None or found.checkpoint is not None:
        raise UserError(f"{option} {name} holds adapters already, so {adapter} cannot be added: name the base model")
    return replace(found, adapter=adapter, what=f"{name} with the adapter {adapter}", short=Path(adapter).name)


def _named(option: str, name: str) -> Named:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        base = _base_on_hub(option, name)
        return Named(option, name, Path(name).name, name) if base is None else _adapter(option, name, base)
    if (folder / "checkpoint.json").is_file():
        return _checkpoint(option, folder)
    if folder.suffix == ".partial" or (folder / "state-0.safetensors").is_file():
        raise UserError(f"{option} {name} is an unfinished checkpoint: name another one of its run")
    if (folder / "run.json").is_file():
        return _run(option, folder)
    if (folder / "config.json").is_file():
        return _folder(option, folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(option, name, _base_of(option, folder / ADAPTER_CONFIG))
    return Named(option, name, folder.name, name)  # no model: find_model says so


def _checkpoint(option: str, folder: Path) -> Named:
    facts = describe(folder)
    run = folder.resolve().parents[1]
    if not (folder / "state-0.safetensors").is_file():
        raise UserError(f"{option} {folder} lacks its state-0.safetensors: copy the checkpoint again")
    options = options_of(facts.get("options"), f"{option} {folder}")
    return Named(
        option,
        f"step {facts['step']} of the run {run.name}, from {folder}",
        f"{run.name}, step {facts['step']}",
        options.model,
        checkpoint=folder,
        run=run if (run / "run.json").is_file() else None,
        options=options,
    )


def _run(option: str, folder: Path) -> Named:
    """A run's merged folder, or while there is none its newest checkpoint."""
    if (folder / "merged" / "config.json").is_file():
        return _folder(option, folder / "merged")
    if found := checkpoints(folder):
        return _checkpoint(option, found[-1])
    raise UserError(
        f"{option} {folder} is a run without a complete checkpoint: wait for its end, or train with --save_every"
    )


def _folder(option: str, folder: Path) -> Named:
    """A Hugging Face folder: a run's merged one, one that dpo_ds.export wrote, or any other."""
    run = folder.resolve().parent
    if is_merged(folder):
        options = options_of(read_record(run), f"{option} {folder}")
        return Named(option, str(folder), run.name, str(folder), run=run, options=options)
    return Named(option, str(folder), folder.resolve().name, str(folder), base=_base_of_card(folder / "README.md"))


def _adapter(option: str, name: str, base: str) -> Named:
    if not Path(base).expanduser().exists() and (base.startswith(("/", "./", "../", "~")) or base.count("/") > 1):
        raise UserError(
            f"{option} {name} is an adapter of {base}, which is not there: name its base with --model BASE --adapter "
            f"{name}"
        )
    return Named(option, f"{base} with the adapter {name}", Path(name).name, base, adapter=name)


def _base_of(option: str, file: Path) -> str:
    """The base that an adapter's config names."""
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{option} {file.parent}: its {file.name} is damaged ({one_line(error)}): copy it again"
        ) from None
    if not base:
        raise UserError(
            f"{option} {file.parent} is an adapter that does not say of which model: name it with --model BASE "
            f"--adapter {file.parent}"
        )
    return str(base)


def _base_on_hub(option: str, name: str) -> str | None:
    """The base of an adapter on the hub; None for anything else, and for what cannot be read."""
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import hf_hub_download

    hub.offline_if_unreachable()
    try:
        hf_hub_download(name, "config.json")
    except Exception:  # its type depends on the HTTP library of the hub's client
        try:
            return _base_of(option, Path(hf_hub_download(name, ADAPTER_CONFIG)))
        except UserError:
            raise
        except Exception:
            return None
    return None


def _base_of_card(card: Path) -> str | None:
    """The base that a model card names, if dpo_ds wrote the card (export.model_card)."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    base = re.search(r"^base_model: (.+)$", text, re.M)
    return base[1] if base and re.search(r"^tags: .*\bdpo_ds\b", text, re.M) else None


# ---------------------------------------------------------------------------------------------------- the reference


def reference_for(policy: Named, options: Options) -> Named | None:
    """What the policy is compared with: what the options name, else what it was trained from. None: nothing.

    The text in `what` says why it was taken.
    """
    if options.reference_model is not None:
        return named("--reference_model", options.reference_model, options.reference_adapter)
    if options.reference_adapter is not None:
        if policy.checkpoint is not None or policy.options is not None:
            raise UserError(
                f"--reference_adapter {options.reference_adapter} needs its base: add --reference_model BASE"
            )
        return named("--reference_model", policy.model, options.reference_adapter)
    if options.reference == "none":
        return None
    if (found := _default(policy)) is None:
        return None
    base = Path(found.model).expanduser()
    if not base.exists() and found.model.startswith(("/", ".", "~")):
        raise UserError(
            f"{policy.what} was trained from {found.model}, which is not there: name it with --reference_model, or "
            "add --reference none to compare with nothing"
        )
    return found


def _default(policy: Named) -> Named | None:
    """What a policy was trained from, if that is known."""
    run = policy.options
    if run is not None:
        other = run.reference_model
        adapter = run.reference_adapter
        if adapter is None and other is None and run.reference != "base":
            adapter = run.adapter
        moved = ", as it was before it moved" if run.reference_update_every is not None else ""
        unnamed = run.reference == "none" or run.reference_table is not None
        why = "what the run began with" if unnamed else f"the run's reference{moved}"
        return _because(named("--reference_model", other or run.model, adapter), why)
    if policy.adapter is not None:
        return _because(named("--reference_model", policy.model), "the adapter's base")
    if policy.base is not None:
        return _because(named("--reference_model", policy.base), "named as its base in its README.md")
    return None


def _because(found: Named, why: str) -> Named:
    return replace(found, what=f"{found.what} ({why})")
