"""The cache of tokenised pairs: the same rows with the same tokenizer and options are tokenised only once."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa

from dpo_ds.data.counts import Report, counted
from dpo_ds.data.encoder import Encoder, Tokenizing
from dpo_ds.data.pairs import read_manifest
from dpo_ds.data.rows import prompt_hash
from dpo_ds.errors import files_of
from dpo_ds.files import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # raise it when the cached files change, or the code that decides their content
SMALL = 20_000  # rows; for fewer, starting processes costs more than it saves


def tokenize_pairs(
    rows: datasets.Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    tokenizing: Tokenizing,
    cache_folder: Path,
    report: Report,
    num_proc: int | None = None,
) -> Path:
    """Returns the cache folder of the rows' PairSet, and tokenises them if it is not there. Adds counts to `report`.

    Raises UserError if all rows or too many are left out, together with those that the report already has.
    """
    encoder = Encoder(tokenizer, tokenizing)
    folder = cache_folder / _key(rows, tokenizer, tokenizing)[:32]
    if not folder.is_dir():
        with files_of("--cache_dir", cache_folder), scratch_folder(cache_folder, folder.name) as partial:
            _write(partial, rows, encoder, num_proc)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster and made the same set
                    raise
    manifest = read_manifest(folder)
    for counts, more in ((report.left_out, manifest["left_out"]), (report.changed, manifest["changed"])):
        counts.update({kind: (count, first) for kind, (count, first) in more.items()})
    report.check()
    return folder


def _key(rows: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", tokenizing: Tokenizing) -> str:
    """sha256 of everything that decides the tokens: rows, tokenizer, options."""
    digest = hashlib.sha256()
    facts = {
        "format": FORMAT,
        "options": asdict(tokenizing),
        "template": tokenizer.chat_template,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(
        (backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode()
    )
    for batch in rows.with_format("arrow").iter(batch_size=10_000):
        chunk = batch.combine_chunks().replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, chunk.schema) as writer:
            writer.write_table(chunk)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _write(folder: Path, rows: datasets.Dataset, encoder: Encoder, num_proc: int | None) -> None:
    if num_proc is None:
        num_proc = min(8, len(os.sched_getaffinity(0)))
    encoded = rows.map(
        _encode_batch,
        batched=True,
        fn_kwargs={"encoder": encoder},
        remove_columns=rows.column_names,
        features=_FEATURES,
        load_from_cache_file=False,
        num_proc=num_proc if len(rows) >= SMALL and num_proc > 1 else None,
        new_fingerprint=folder.name.partition("@")[0],
    )
    # Columns are streamed one by one: lists of a million rows would take half a GB.
    numbers = np.fromiter(_column(encoded, "row"), np.int64, len(encoded))
    left_out = counted(zip(_column(encoded, "left_out"), numbers, strict=True))
    kinds = ((kind, row) for row, found in zip(numbers, _column(encoded, "changed"), strict=True) for kind in found)
    changed = counted(kinds)
    lengths = np.fromiter(chain.from_iterable(_column(encoded, "lengths")), np.int32, 3 * len(encoded)).reshape(-1, 3)
    used = lengths.sum(axis=1) > 0
    lengths = lengths[used]
    total = int(lengths.sum(dtype=np.int64))
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.int32, shape=(total,))
    at = 0
    for batch in encoded.select_columns(["tokens"]).with_format("arrow").iter(batch_size=1000):
        values = pa.concat_arrays(batch["tokens"].chunks).flatten().to_numpy(zero_copy_only=False)
        tokens[at : at + len(values)] = values
        at += len(values)
    tokens.flush()
    ends = np.cumsum(lengths.sum(axis=1, dtype=np.int64))
    arrays = {
        "lengths": lengths,
        "starts": ends - lengths.sum(axis=1, dtype=np.int64),
        "rows": numbers[used],
        "pair_ids": _bytes(encoded, "pair_id")[used],
        "prompt_hashes": _bytes(encoded, "prompt_hash")[used],
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    manifest = {"pairs": len(lengths), "tokens": total, "left_out": left_out, "changed": changed}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


_FEATURES = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "tokens": datasets.List(datasets.Value("int32")),
        "lengths": datasets.List(datasets.Value("int32")),
        "pair_id": datasets.Value("binary"),
        "prompt_hash": datasets.Value("binary"),
        "left_out": datasets.Value("string"),
        "changed": datasets.List(datasets.Value("string")),
    }
)


def _encode_batch(rows: dict[str, list], encoder: Encoder) -> dict[str, list]:
    """Encodes a batch of rows. A row that is left out stays in place, without tokens."""
    out: dict[str, list] = {name: [] for name in _FEATURES}
    for row, text, pair in zip(rows["row"], rows["text"], encoder.encode(rows), strict=True):
        parts = [[], [], []] if pair["left_out"] else [pair["prompt"], pair["chosen"], pair["rejected"]]
        tokens, lengths = [token for part in parts for token in part], [len(part) for part in parts]
        out["row"].append(row)
        out["tokens"].append(tokens)
        out["lengths"].append(lengths)
        out["pair_id"].append(hashlib.sha256(np.array([*lengths, *tokens], dtype=np.int32).tobytes()).digest()[:16])
        out["prompt_hash"].append(prompt_hash(text))
        out["left_out"].append(pair["left_out"])
        out["changed"].append([] if pair["left_out"] else pair["changed"])
    return out


def _column(rows: datasets.Dataset, name: str) -> Iterator:
    """Yields one column's values, with 10,000 in memory at a time."""
    for batch in rows.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
        yield from batch[name].to_pylist()


def _bytes(rows: datasets.Dataset, name: str) -> np.ndarray:
    """A column whose values are 16 bytes each, as uint8 [n, 16]."""
    return np.fromiter(chain.from_iterable(_column(rows, name)), np.uint8, 16 * len(rows)).reshape(-1, 16)
