"""Reads one data file into rows on disk: JSON (lines, an array, an object of rows or of columns), CSV, Parquet, Arrow.

Files are read in a stream, so they may be larger than memory, but for a JSON file that is one object. Rows of JSON are
kept as text: Arrow would need one type for each column, and fills keys that are missing with nulls. Cells of a CSV file
stay text: an answer may be "4" or "NA".
"""

import csv
import dataclasses
import gzip
import json
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa

from dpo_ds.errors import FULL, UserError, one_line, reason_of

RAW = "json line"  # the only column of rows that are kept as JSON text
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
ZIPPED = ("json", "csv")  # kinds that may also end in .gz
ENDINGS = [*KINDS, ".jsonl.gz", ".csv.gz"]
BATCH_ROWS, BATCH_CHARACTERS = 10_000, 1 << 22  # rows are written in batches of at most so many
CHUNK = 1 << 20  # characters of a JSON array that are read at a time
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # keys of a JSON object that are splits
ROW_LISTS = ("data", "rows", "examples", "instances", "items", "dataset")  # keys of a JSON object that hold its rows


@dataclass(frozen=True)
class Kept:
    """Rows on disk, and the names of all their columns."""

    rows: datasets.Dataset
    columns: list[str]


def kind_of(path: Path) -> str | None:
    """What a file is by its name; None if it is none that we read."""
    zipped = path.suffix == ".gz"
    kind = KINDS.get(path.with_suffix("").suffix if zipped else path.suffix)
    return kind if not zipped or kind in ZIPPED else None


def read_file(path: Path, folder: Path, kind: str | None = None) -> dict[str, Kept]:
    """A file's rows by split; nearly always there is one, train. They are kept in `folder`.

    Raises UserError, naming the file and, where one row is at fault, the row.
    """
    kind = kind or kind_of(path)
    if kind is None:
        ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        raise UserError(f"{path} ends in {ending or 'nothing'}; it must be one of {', '.join(ENDINGS)}")
    if kind == "json":
        return _read_json(path, folder)
    if kind == "csv":
        return {"train": _read_table(path, folder)}
    try:
        rows = datasets.load_dataset(kind, data_files=str(path))["train"]
        rows.data.validate(full=True)  # Arrow's reader accepts bytes that are not text
    except Exception as error:  # datasets wraps what its readers raise, in many types
        raise UserError(f"{path} cannot be read as {kind}: {_cause(error)}") from None
    return {"train": as_stored(rows)}


def _require_space(error: Exception, folder: Path) -> None:
    """Raises UserError if the error is of rows that did not fit where they are kept."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise UserError(
            f"no space is left in {folder.parent} for the rows ({reason_of(error)}): set TMPDIR to a larger folder, or "
            "raise your limit (quota, ulimit -f)"
        ) from None


def as_stored(rows: datasets.Dataset) -> Kept:
    """Rows whose images, sound, video and pages are not decoded: nothing reads them, and one may be damaged."""
    for name, feature in rows.features.items():
        stored = _not_decoded(feature)
        if stored != feature:
            rows = rows.cast_column(name, stored)
    return Kept(rows, rows.column_names)


def _not_decoded(feature: Any) -> Any:
    if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video, datasets.Pdf)):
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _not_decoded(inner) for name, inner in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_not_decoded(feature.feature))
    return feature


def rewritten(kept: Kept, folder: Path) -> Kept:
    """The same rows as JSON text, so that they can stand beside rows of other types."""
    if kept.rows.column_names == [RAW]:
        return kept
    return Kept(_write_lines((json.dumps(row, default=str) for row in kept.rows), folder), kept.columns)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _open(path: Path, newline: str) -> IO[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    # Bytes that are no text are kept, so that the rows in which they stand can be named.
    file = opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return file  # type: ignore[return-value]  # text, because of "t"


# -------------------------------------------------------------------------------------------------------------- on disk


def _write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path) -> datasets.Dataset:
    """Rows as an Arrow file that is memory-mapped."""
    handle, name = tempfile.mkstemp(".arrow", dir=folder)
    with open(handle, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return datasets.Dataset.from_file(name)


def _write_lines(lines: Iterable[str], folder: Path) -> datasets.Dataset:
    schema = pa.schema([(RAW, pa.string())])
    return _write((pa.record_batch([batch], schema) for batch in _batches(lines, len)), schema, folder)


def _batches(rows: Iterable[Any], size: Any) -> Iterator[list]:
    batch: list = []
    held = 0
    for row in rows:
        batch.append(row)
        held += size(row)
        if len(batch) >= BATCH_ROWS or held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------- JSON


def _read_json(path: Path, folder: Path) -> dict[str, Kept]:
    try:
        with _open(path, "\n") as file:
            return {split: _keep_json(rows, folder) for split, rows in _json_splits(path, file)}
    except (OSError, EOFError, zlib.error) as error:
        _require_space(error, folder)
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def _keep_json(rows: Iterable[tuple[Any, str | None]], folder: Path) -> Kept:
    """Writes rows, each given as its value and, if it is at hand, its text."""
    columns: dict[str, None] = {}

    def lines() -> Iterator[str]:
        for value, text in rows:
            if isinstance(value, dict):
                columns.update(dict.fromkeys(value))
            if text is None or not _is_text(text):
                text = json.dumps(value)
            yield text

    kept = _write_lines(lines(), folder)
    return Kept(kept, [*columns])


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8; as JSON they are written as escapes
        return False
    return True


def _json_splits(path: Path, file: IO[str]) -> Iterator[tuple[str, Iterable[tuple[Any, str | None]]]]:
    """The splits of a JSON file with their rows: of lines, of an array, or of one object."""
    first = next((line for line in iter(lambda: file.readline(CHUNK), "") if line.strip()), "")
    array = first.lstrip().startswith("[")
    if not first.endswith("\n") and not array:  # an array on one line may be the whole file
        first += file.readline()
    second = next((line for line in file if line.strip()), "") if first.endswith("\n") else ""
    if not first:
        yield "train", []
    elif second and _loads(first) is not None:
        yield "train", _lines(path, file)
    elif array:
        yield "train", ((value, None) for value in _elements(path, _Text(file, first + second)))
    elif not second:
        yield from _object(path, first)
    elif first.strip().startswith("{") and path.name.removesuffix(".gz").endswith(".json"):
        yield from _object(path, first + second + file.read())
    else:
        yield "train", _lines(path, file)


def loads(text: str) -> Any:
    """What a row of JSON says. Of a key that an object has twice the last value counts; a column says that it was so.

    Raises ValueError if the text is not JSON.
    """
    decoder, twice = _decoder()
    return _with_columns(decoder.decode(text), twice)


def _decoder() -> tuple[json.JSONDecoder, dict[str, None]]:
    """A decoder, and the keys that it meets twice in an object."""
    twice: dict[str, None] = {}

    def built(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.update(dict.fromkeys(key for key in keys if keys.count(key) > 1))
        return found

    return json.JSONDecoder(object_pairs_hook=built), twice


def _with_columns(row: Any, twice: dict[str, None]) -> Any:
    """A row with a column for each key that it had twice. Nothing reads it, so the report names it."""
    return row | {f"{key} (given twice)": True for key in twice} if twice and isinstance(row, dict) else row


def _loads(text: str) -> Any:
    """What a text says as JSON; None if it is not JSON (or null)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(path: Path, file: IO[str]) -> Iterator[tuple[Any, str]]:
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), line.strip()
        except RecursionError:
            raise _too_deep(path, f"line {number}") from None
        except ValueError as error:
            raise _not_json(path, f"line {number}", error) from None


def _element(number: int) -> str:
    return f"row {number} (counted from 0)"


def _not_json(path: Path, which: str, error: ValueError) -> UserError:
    message = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
    return UserError(f"{path}: {which} is not JSON ({message}); correct or remove it")


def _too_deep(path: Path, which: str) -> UserError:
    return UserError(f"{path}: {which} has too many brackets within each other; correct or remove it")


class _Text:
    """A file's text, of which a part is in memory."""

    def __init__(self, file: IO[str], text: str):
        self.file, self.text, self.at, self.ended = file, text, 0, False

    def more(self) -> None:
        """Reads on. The part grows with what has not been used, so that a long row is not tried too often."""
        self.text = self.text[self.at :]
        self.at = 0
        read = self.file.read(max(CHUNK, len(self.text)))
        self.ended = not read
        self.text += read

    def skip(self, signs: str) -> str:
        """Skips blanks and the given signs; returns the sign that follows, or "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in signs:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def _elements(path: Path, text: _Text) -> Iterator[Any]:
    """The elements of a JSON array, one by one."""
    decoder, twice = _decoder()
    blanks = " \t\r\n"
    text.skip(blanks)
    text.at += 1
    number = 0
    while (sign := text.skip(blanks + ",")) != "]":
        try:
            if not sign:
                raise ValueError("the array does not end")
            twice.clear()
            value, end = decoder.raw_decode(text.text, text.at)
            if end == len(text.text) and not text.ended:  # a number may go on
                raise ValueError("cut")
        except RecursionError:
            raise _too_deep(path, _element(number)) from None
        except ValueError as error:
            if text.ended:
                raise _not_json(path, _element(number), error) from None
            text.more()
            continue
        text.at = end
        number += 1
        yield _with_columns(value, twice)
    text.at += 1
    if text.skip(blanks):
        raise UserError(
            f"{path}: more follows the array, which ends after {_element(number - 1)}: write one array, or lines"
        )


def _object(path: Path, text: str) -> Iterator[tuple[str, Iterable[tuple[Any, str | None]]]]:
    """The rows of a file that is one JSON value: an object of splits, of rows, of columns, or one row."""
    decoder, twice = _decoder()
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise _too_deep(path, "the object") from None
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _not_json(path, f"line {line}", error) from None
    if twice:  # half of the rows may stand under it
        raise UserError(f"{path} has the key {next(iter(twice))} twice in an object: remove one of them")
    if not isinstance(value, dict):
        yield "train", [(value, None)]
        return
    splits = {name: rows for name, rows in value.items() if name in SPLITS and _is_rows(rows)}
    if splits and len(splits) == len(value):
        for name, rows in splits.items():
            yield name, [(row, None) for row in rows]
        return
    held = [name for name in (*ROW_LISTS, *SPLITS) if _is_rows(value.get(name))]
    if len(held) == 1:
        rows = value[held[0]]
    else:
        rows = _from_columns(value)
    yield "train", [(row, None) for row in rows]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _from_columns(value: dict) -> list[dict]:
    """The rows of an object that holds a list for each column, or (as pandas writes) an object of row numbers.

    A row by itself holds lists too, but of messages.
    """
    columns = list(value.values())
    if columns and all(isinstance(column, dict) and [*column] == [*columns[0]] and column for column in columns):
        if all(number.isdigit() for number in columns[0]):
            return [{name: column[number] for name, column in value.items()} for number in columns[0]]
    same = all(isinstance(column, list) and len(column) == len(columns[0]) and column for column in columns)
    if same and columns and not any(isinstance(entry, dict) for column in columns for entry in column):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


# ------------------------------------------------------------------------------------------------------------------ CSV


def _read_table(path: Path, folder: Path) -> Kept:
    """A table of text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with _open(path, "") as file:
            table = csv.reader(file, delimiter=_separator(path, file), strict=True)
            # pandas leaves the heading of its row numbers blank, and calls it so when it reads it back.
            names = [name.strip() or f"Unnamed: {n}" for n, name in enumerate(next(table, []))]
            if not names:
                raise UserError(f"{path} cannot be read as csv: it is empty")
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise UserError(f"{path} cannot be read as csv: its heading has {double} twice")
            schema = pa.schema([(name, pa.string()) for name in names])
            batches = _batches(_cells(path, table, len(names)), lambda row: sum(map(len, row)))
            written = (pa.record_batch([*map(list, zip(*batch, strict=True))], schema) for batch in batches)
            return Kept(_write(written, schema, folder), names)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        _require_space(error, folder)
        raise UserError(f"{path} cannot be read as csv: {one_line(error)}") from None


def _separator(path: Path, file: IO[str]) -> str:
    """A comma or, by the file's name, a tab; another sign if the heading is one name with that, and several with this.

    A comma is also a decimal point, so spreadsheets write semicolons in many countries.
    """
    own = "\t" if ".tsv" in path.suffixes else ","
    heading = file.readline()
    file.seek(0)
    names = {sign: len(next(csv.reader([heading], delimiter=sign), [])) for sign in (own, ";", "\t", ",", "|")}
    return own if names[own] > 1 else max(names, key=lambda sign: names[sign])


def _cells(path: Path, table: Any, columns: int) -> Iterator[Sequence[str]]:
    """table: a csv.reader, whose line_num is the number of the line that it has read last."""
    filled = (row for row in table if row)
    while True:
        try:
            row = next(filled, None)
        except csv.Error as error:
            raise UserError(f"{path}: line {table.line_num} cannot be read as csv: {error}; correct it") from None
        if row is None:
            return
        if len(row) != columns:
            cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
            raise UserError(f"{path}: line {table.line_num} has {cells}, but the heading has {columns}; correct it")
        if not all(map(_is_text, row)):
            raise UserError(f"{path} cannot be read as csv: line {table.line_num} is not UTF-8; save it as UTF-8")
        yield row
