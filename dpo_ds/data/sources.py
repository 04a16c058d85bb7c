"""Loads the rows of preference sets unchanged: from files, folders, the hub, or the embedded sample.

    sets = load_sources("a.jsonl:0.7,b/c:0.3", folder)

Rows stay on disk, memory-mapped, and are read in a stream: a set may be larger than memory. Rows of JSON are kept as
the text that they were, because they may differ in type: `fields` gives what a row says. data/rows/forms.py reads it.
"""

import glob
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from dpo_ds import hub
from dpo_ds.data.files import ENDINGS, RAW, Kept, as_stored, kind_of, loads, read_file, rewritten
from dpo_ds.errors import UserError, one_line

SAMPLE = "sample"
TRAIN_SPLITS = ("train_prefs", "train")
TEST_SPLITS = ("test_prefs", "validation", "test", "valid", "val", "dev", "eval", "evaluation")
PREFERRED_SPLITS = {"train": TRAIN_SPLITS, "eval": TEST_SPLITS}


@dataclass(frozen=True)
class Source:
    """One part of --dataset: what it is called, and its share of the training pairs if parts are mixed by weight."""

    name: str
    weight: float | None = None


@dataclass(frozen=True)
class Split:
    """Rows of a source. `columns` are all that any row has, also where `rows` keeps them as JSON text."""

    name: str
    rows: datasets.Dataset
    columns: list[str]


@dataclass(frozen=True)
class Loaded:
    """A source's rows, and those that it sets apart for tests: None if it has none, or for evaluation."""

    source: Source
    split: Split
    test: Split | None


def fields(row: dict[str, Any]) -> Any:
    """What a loaded row says, as data/rows/forms.py reads it."""
    return loads(row[RAW]) if RAW in row else row


def flag(role: str) -> str:
    """The option that names the data set for a role, "train" or "eval"."""
    return "--eval_dataset" if role == "eval" else "--dataset"


def load_sources(
    text: str, folder: Path, split: str = "auto", config: str | None = None, role: str = "train"
) -> list[Loaded]:
    """Loads each source that --dataset (or, for the role "eval", --eval_dataset) names.

    Rows are kept in `folder`, which the caller removes when they have been read. Raises UserError, with the remedy, if
    a source cannot be read or has no such split or config.
    """
    datasets.disable_progress_bars()
    datasets.disable_caching()  # `map` would write beside the user's data, which may be read-only
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, by dpo_ds
    try:
        sources = parse_sources(text)
        if config is not None and len(sources) > 1:
            raise UserError(
                f"{text} names {len(sources)} sets, and --dataset_config {config} says the config of one: name a file "
                "or a folder for each set that has several configs"
            )
        if role == "eval" and any(source.weight is not None for source in sources):
            raise UserError("weights mix training pairs: name the sets for evaluation without them")
        return [_load(source, folder, split, config, role) for source in sources]
    except UserError as error:
        raise UserError(f"{flag(role)} {error}") from None


# -------------------------------------------------------------------------------------------------- names and weights


def parse_sources(text: str) -> list[Source]:
    """The sources in `a.jsonl:0.7,b/c:0.3`. What exists under a name with a comma or a colon in it is that file.

    Raises UserError if a name is empty, or if weights are not all given, are not above 0 or do not sum to 1.
    """
    pieces, sources = text.split(","), []
    while pieces:
        # The longest join of pieces that is there; else the first piece.
        length = next((n for n in range(len(pieces), 1, -1) if _stands(",".join(pieces[:n]))), 1)
        sources.append(_parse_source(",".join(pieces[:length]).strip()))
        pieces = pieces[length:]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        missing = next(source.name for source in sources if source.weight is None)
        raise UserError(f"{text}: {missing} has no weight; give one to each set (name:0.5), or to none")
    if weights and abs(math.fsum(weights) - 1) > 1e-6:
        raise UserError(f"{text}: the weights sum to {math.fsum(weights):.6g}; they must sum to 1")
    return sources


def _parse_source(text: str) -> Source:
    if not text:
        raise UserError("an empty name stands between the commas: name a hub id, a folder or a file")
    name, colon, end = text.rpartition(":")
    if not colon or "/" in end or _exists(text):
        return Source(text)
    try:
        weight = float(end)
    except ValueError:
        raise UserError(f"{text}: {end or 'nothing'} is not a weight; write name:0.5") from None
    if not name or not weight > 0 or not math.isfinite(weight):
        raise UserError(f"{text}: a weight must be above 0, as in name:0.5")
    return Source(name, weight)


def _stands(text: str) -> bool:
    """Whether a name, with or without a weight, is a file or a folder."""
    return _exists(text.strip()) or _exists(text.strip().rpartition(":")[0])


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except OSError:  # a name that is too long
        return False


# ------------------------------------------------------------------------------------------------------------ loading


def _load(source: Source, folder: Path, split: str, config: str | None, role: str) -> Loaded:
    sets = _splits(source.name, folder, config, role)
    name = _choose_split(source.name, [*sets], split, role)
    chosen = _read(source.name, name, sets)
    if len(chosen.rows) == 0:
        raise UserError(f"{source.name} holds no rows: name one that does")
    test = _test_split([*sets], name) if role == "train" else None
    held = _read(source.name, test, sets) if test is not None else None
    return Loaded(source, chosen, held if held is not None and len(held.rows) else None)


Reader = Callable[[], Kept]  # reads a split when it is wanted


def _read(source: str, name: str, sets: dict[str, Reader]) -> Split:
    kept = sets[name]()
    return Split(name, kept.rows, kept.columns)


def _splits(name: str, folder: Path, config: str | None, role: str) -> dict[str, Reader]:
    """A source's splits. Nothing is read before it is wanted, but for a file that holds several."""
    if name == SAMPLE:
        from dpo_ds.embedded import sample_file

        return _files([sample_file()], folder)
    path = Path(name).expanduser()
    if path.is_file():
        if config is not None:
            raise UserError(f"{name} is a file, which has no configs: leave out --dataset_config {config}")
        return _files([path], folder)
    if path.is_dir():
        return _folder(path, folder, config, role)
    if any(sign in name for sign in "*?["):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not found:
            raise UserError(f"{name} matches no file")
        return _files(found, folder)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or kind_of(path) is not None:
        raise UserError(f"{name} is not there: name a hub id, a folder or a file ({', '.join(ENDINGS)})")
    return _hub(name, config, role)


def _files(paths: Sequence[Path], folder: Path, kind: str | None = None) -> dict[str, Reader]:
    """The splits of files that are read as one set. A single JSON file may hold several."""
    parts: dict[str, list[Kept]] = {}
    for path in paths:
        for split, kept in read_file(path, folder, kind).items():
            parts.setdefault(split if len(paths) == 1 else "train", []).append(kept)
    return {split: lambda found=found: _joined(found, folder) for split, found in parts.items()}  # type: ignore[misc]


def _joined(parts: list[Kept], folder: Path) -> Kept:
    if len(parts) == 1:
        return parts[0]
    columns = [*dict.fromkeys(name for part in parts for name in part.columns)]
    if any(part.rows.features != parts[0].rows.features for part in parts):
        parts = [rewritten(part, folder) for part in parts]
    return Kept(datasets.concatenate_datasets([part.rows for part in parts]), columns)


def _joined_files(files: Sequence[str], kind: str, folder: Path) -> Kept:
    return next(iter(_files([Path(file) for file in files], folder, kind).values()))()


def _of(sets: dict) -> dict[str, Reader]:
    return {str(name): lambda rows=rows: as_stored(rows) for name, rows in sets.items()}  # type: ignore[misc]


def _folder(path: Path, folder: Path, config: str | None, role: str) -> dict[str, Reader]:
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            if config is not None:
                raise UserError(f"{path} has no configs: leave out --dataset_config {config}")
            loaded = datasets.load_from_disk(str(path))
            return _of(loaded if isinstance(loaded, dict) else {"train": loaded})
        name = _choose_config(str(path), datasets.get_dataset_config_names(str(path)), config, role)
        builder = datasets.load_dataset_builder(str(path), name)
        found = builder.config.data_files or {}
        _require_all_kinds(path, [file for files in found.values() for file in files])
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in ("json", "csv"):
            return _of(datasets.load_dataset(str(path), name))
    except UserError:
        raise
    except Exception as error:  # datasets wraps what its readers raise, in many types
        raise UserError(f"{path} is a folder without data that `datasets` can read: {_cause(error)}") from None
    return {
        str(split): lambda files=files: _joined_files(files, kind, folder)  # type: ignore[misc]
        for split, files in found.items()
    }


def _require_all_kinds(path: Path, read: Sequence[str]) -> None:
    """Raises UserError if a folder holds a data file that is not read.

    `datasets` reads files of one kind alone, and those named after a split alone where there are some.
    """
    if (path / "README.md").is_file():  # it may say which files are meant
        return
    known = {Path(file).resolve() for file in read}
    kinds = {kind_of(file) for file in known}
    for file in sorted(path.rglob("*")):
        kind = kind_of(file) if file.suffix != ".json" and file.is_file() else None
        if kind is None or file.resolve() in known or _hidden(file.relative_to(path)):
            continue
        if kind not in kinds:
            raise UserError(f"{path} holds files of several kinds, one of them {file.name}: name those of one kind")
        raise UserError(
            f"{path} holds {file.name} beside files named after splits, which alone would be read: name files"
        )


def _hidden(file: Path) -> bool:
    """Whether `datasets` leaves out a file or its folder because of its name."""
    return any(part.startswith((".", "__")) for part in file.parts)


def _hub(name: str, config: str | None, role: str) -> dict[str, Reader]:
    hub.offline_if_unreachable()
    try:
        chosen = _choose_config(name, datasets.get_dataset_config_names(name), config, role)
        return _of(datasets.load_dataset(name, chosen))
    except UserError:
        raise
    except Exception as error:
        text = _cause(error)
        if "gated" in text.lower() or "401" in text or "403" in text:
            remedy = "it is gated or private: ask for access on its page, then set HF_TOKEN or run `hf auth login`"
        else:
            remedy = "check the id and the network, or download it elsewhere and name the folder or file"
        raise UserError(f"{name} is not a local file and cannot be read from the hub: {remedy}") from None


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


# --------------------------------------------------------------------------------------------------- configs and splits


def _choose_config(source: str, names: Sequence[str], config: str | None, role: str) -> str | None:
    """The config to read. None: the source has no names for its configs."""
    listed = ", ".join(names)
    if config is not None and role == "train":
        if config not in names:
            raise UserError(f"{source} has no config {config}; --dataset_config takes {listed or 'none'}")
        return config
    if len(names) <= 1 or "default" in names:
        return None if "default" in names or not names else names[0]
    if role == "eval":
        raise UserError(f"{source} has the configs {listed}: name a file or a folder of one of them")
    raise UserError(f"{source} has the configs {listed}: choose one with --dataset_config")


def _choose_split(source: str, names: Sequence[str], split: str, role: str) -> str:
    listed = ", ".join(names)
    if split != "auto" and role == "train":
        if split not in names:
            raise UserError(f"{source} has no split {split}; --dataset_split takes {listed}")
        return split
    for name in PREFERRED_SPLITS[role]:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    if role == "eval":
        raise UserError(f"{source} has the splits {listed}, none of which is called test: name a file of one of them")
    raise UserError(f"{source} has the splits {listed}: choose one with --dataset_split")


def _test_split(names: Sequence[str], chosen: str) -> str | None:
    """The split for tests that goes with a training split: test_sft with train_sft, test with train."""
    if not re.search(r"(^|_)train(_|$)", chosen):
        return None
    alike: Iterator[str] = (
        re.sub(r"(^|(?<=_))train", name, chosen) for name in ("test", "validation", "valid", "eval")
    )
    return next((name for name in [*alike, *TEST_SPLITS] if name in names), None)
