"""What makes two starts the same run: everything that decides the curve, and nothing else.

Pairs, weights and the optimizer's constants count by their content, wherever they come from. Ranks, micro-batches, ZeRO
stage, paths and what is logged or saved may differ from start to start.
"""

import hashlib
import json

from dpo_ds.config import NOT_IDENTITY, Options
from dpo_ds.errors import UserError

FILES = "files"  # {option: {file: sha256}}
PARENT = "parent"  # of a run that began from another's checkpoint: that run, the step, whether Adam's state was kept
TRAIN, EVAL, OPTIMIZER = "train_digest", "eval_digest", "optimizer"

# Options that decide the pairs: they count by the digests of the pairs that come of them.
OF_PAIRS = frozenset(
    {"dataset", "dataset_split", "dataset_config", "columns", "pairs", "min_margin", "eval_dataset", "eval_pairs"}
    | {"group_prompts", "truncation", "min_prompt_tokens", "chat_template", "chat_template_kwargs", "max_left_out"}
)
# Options that name files, which count by their hashes, or that do not decide the curve. They are recorded for readers.
FREE = frozenset(
    {"model", "adapter", "reference_model", "reference_adapter", "reference_table", "trust_remote_code"}
    | {"ds_config", "gradients", "micro_batch_tokens", "scoring_tokens", "gradient_checkpointing", "recomputed_layers"}
    | {"date"}
)
# What a run that begins from another run's checkpoint may change.
CHANGEABLE = frozenset({"learning_rate", "lr_scheduler", "warmup_ratio", "epochs", "max_steps"})
# Keys of a config's optimizer that say how it is computed, or that an option sets.
HOW = frozenset({"lr", "weight_decay", "torch_adam", "fused", "foreach", "capturable", "fp32_optimizer_states"})


def identity(
    options: Options, ds_config: dict, train: str, held_out: str, date: str, files: dict[str, dict[str, str]]
) -> dict:
    """What a run's folder records of it: options, the optimizer's constants, the digests of its pairs, its files.

    date: see folders.started. files: the hashes of the files that each option names, {option: {file: sha256}}.
    """
    values = {key: value for key, value in vars(options).items() if key not in NOT_IDENTITY}
    adam = ds_config["optimizer"]
    constants = {key: value for key, value in adam.get("params", {}).items() if key not in HOW}
    of_adam = {"type": adam["type"], **constants}
    return {**values, OPTIMIZER: of_adam, TRAIN: train, EVAL: held_out, "date": date, FILES: files}


def hash_of(run: dict) -> str:
    """What names a run in its checkpoints: the hash of what decides its curve."""
    given = {key: value for key, value in run.items() if value is not None and key not in OF_PAIRS | FREE}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:32]


def require_same(folder: object, before: dict, now: dict) -> None:
    """Raises UserError, with what differs, if a folder's run is not this one."""
    if different := differences(before, now):
        raise UserError(
            f"--output_dir {folder} holds another run ({'; '.join(different.values())}): name another folder, or make "
            "the options agree to go on with that run"
        )
    if changed := _changed_files(before, now):
        raise UserError(
            f"--output_dir {folder} holds a run that began with other files of {changed} changed since, so it would go "
            "on from one model and compare with another: put the old files back, or name another folder to begin again"
        )


def allowed_changes(checkpoint: object, before: dict, now: dict) -> list[str]:
    """What a run that begins from another run's checkpoint changes, in words. Raises UserError if it may not."""
    different = differences(before | {PARENT: None}, now | {PARENT: None})
    if refused := [said for key, said in different.items() if key not in CHANGEABLE]:
        raise UserError(
            f"--resume {checkpoint} is of another run ({'; '.join(refused)}): only --learning_rate, --lr_scheduler, "
            "--warmup_ratio, --epochs and --max_steps may be changed; make the others agree"
        )
    if changed := _changed_files(before, now):
        raise UserError(f"--resume {checkpoint} is of a run with other files of {changed} differs: name the same files")
    return list(different.values())


def differences(before: dict, now: dict) -> dict[str, str]:
    """What decides the curve and differs, but for files: {key: in words}."""
    keys = [key for key in dict.fromkeys((*now, *before)) if key not in OF_PAIRS | FREE | {FILES, PARENT, OPTIMIZER}]
    found = {key: _said(key, before, now) for key in keys if before.get(key) != now.get(key)}
    if others := [whose for key, whose in ((TRAIN, "training"), (EVAL, "held-out")) if found.pop(key, None)]:
        options = [_said(name, before, now) for name in sorted(OF_PAIRS) if before.get(name) != now.get(name)]
        found[TRAIN] = "; ".join(options) if options else f"the {' and the '.join(others)} pairs are others"
    old, new = before.get(OPTIMIZER) or {}, now.get(OPTIMIZER) or {}
    for key in dict.fromkeys((*new, *old)):
        if old.get(key) != new.get(key):
            found[key] = f"the optimizer's {_said(key, old, new)}"
    if before.get(PARENT) != now.get(PARENT):
        found[PARENT] = "it began from a checkpoint of another run, or with another --resume"
    return found


def _said(key: str, before: dict, now: dict) -> str:
    there, here = ("not given" if run.get(key) is None else run[key] for run in (before, now))
    return f"{key} is {there} there and {here} here"


def _changed_files(before: dict, now: dict) -> str | None:
    """The first option whose files differ, and which: "--model: model.safetensors"; None if they are the same."""
    old, new = before.get(FILES) or {}, now[FILES]
    for option in dict.fromkeys((*new, *old)):
        there, here = old.get(option, {}), new.get(option, {})
        changed = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return f"{option}: {changed[0]}{more}"
    return None
