"""Loads preference rows unchanged from their source: a file, a folder, the hub, or the embedded sample."""

import gzip
import json
import zlib
from pathlib import Path

import datasets

from dpo_ds import hub
from dpo_ds.errors import UserError

SAMPLE = "sample"
PREFERRED_SPLITS = {"train": ("train_prefs", "train"), "eval": ("test_prefs", "validation", "test")}
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# pandas would read an answer of "4" or "None" as a number or a missing value; here it is text.
CSV = {"converters": dict.fromkeys(("prompt", "chosen", "rejected"), str), "keep_default_na": False}
RAW = "json line"  # the only column of a JSON file whose rows differ in type: each row as text


def load_preferences(source: str, split: str = "auto", role: str = "train") -> datasets.Dataset:
    """Loads the rows of "sample", a file, a folder, or a hub id.

    Raises UserError, with the remedy, if the source cannot be read or has no such split.
    """
    try:
        return _load(source, split, role)
    except UserError as error:
        raise UserError(f"{flag(role)} {error}") from None


def flag(role: str) -> str:
    """The option that names the data set for a role, "train" or "eval"."""
    return "--eval_dataset" if role == "eval" else "--dataset"


def _load(source: str, split: str, role: str) -> datasets.Dataset:
    if source == SAMPLE:
        from dpo_ds.embedded import sample_file

        path = sample_file()
    else:
        path = Path(source).expanduser()
    datasets.disable_progress_bars()
    datasets.disable_caching()  # `map` would write beside the user's data, which may be read-only
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, by dpo_ds
    if path.is_file():
        sets = _load_file(path)
    elif path.is_dir():
        sets = _load_folder(path)
    elif source.startswith(("/", ".", "~")) or source.count("/") != 1 or path.suffix in LOADERS:
        raise UserError(f"{source} is not there: name a hub id, a folder or a file ({_endings()})")
    else:
        sets = _load_hub(source)
    rows = _choose_split(source, sets, split, role)
    if len(rows) == 0:
        raise UserError(f"{source} holds no rows: name one that does")
    return rows


def _endings() -> str:
    return ", ".join([*LOADERS, ".jsonl.gz"])


def _load_file(path: Path) -> dict:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in LOADERS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; it must be one of {_endings()}")
    kind = LOADERS[suffix]
    try:
        sets = datasets.load_dataset(kind, data_files=str(path), **(CSV if kind == "csv" else {}))
        for rows in sets.values():
            rows.data.validate(full=True)  # Arrow's reader accepts bytes that are not text
        return sets
    except Exception as error:  # datasets wraps what its readers raise, in many types
        if kind == "json":
            return {"train": _load_mixed_json(path)}
        raise UserError(f"{path} cannot be read as {kind}: {_cause(error)}") from None


def _load_mixed_json(path: Path) -> datasets.Dataset:
    """Loads JSON whose rows differ in type: Arrow needs one type per column, so each row is kept as text."""
    reader = gzip.open if path.suffix == ".gz" else open
    try:
        with reader(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        # Not splitlines(), which also splits at characters that JSON allows within a string.
        rows = [_json(path, number, line) for number, line in enumerate(filter(str.strip, text.split("\n")))]
    return datasets.Dataset.from_dict({RAW: [json.dumps(row) for row in rows]})


def _json(path: Path, number: int, line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: row {number} is not JSON ({error.msg}); correct or remove it") from None


def _load_folder(path: Path) -> dict:
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded if isinstance(loaded, dict) else {"train": loaded}
        return datasets.load_dataset(str(path))
    except Exception as error:
        raise UserError(f"{path} is a folder without data that `datasets` can read: {_cause(error)}") from None


def _load_hub(source: str) -> dict:
    hub.offline_if_unreachable()
    try:
        return datasets.load_dataset(source)
    except Exception as error:
        text = _cause(error)
        if "gated" in text.lower() or "401" in text or "403" in text:
            remedy = "it is gated or private: ask for access on its page, then set HF_TOKEN or run `hf auth login`"
        else:
            remedy = "check the id and the network, or download it elsewhere and name the folder or file"
        raise UserError(f"{source} is not a local file and cannot be read from the hub: {remedy}") from None


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def _choose_split(source: str, sets: dict, split: str, role: str) -> datasets.Dataset:
    if split != "auto":
        if split not in sets:
            raise UserError(f"{source} has no split {split}; --dataset_split takes {', '.join(sets)}")
        return sets[split]
    for name in PREFERRED_SPLITS[role]:
        if name in sets:
            return sets[name]
    if len(sets) == 1:
        return next(iter(sets.values()))
    raise UserError(f"{source} has the splits {', '.join(sets)}: choose one with --dataset_split")
