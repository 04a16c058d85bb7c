"""The cache of tokenised pairs: the same rows with the same tokenizer and options are tokenised only once."""

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ds.checksums import difference, is_sealed, measured, sealed
from dpo_ds.data.comparison import LeftOut
from dpo_ds.data.counts import Report
from dpo_ds.data.dialogue import as_text
from dpo_ds.data.encoded import Encoded
from dpo_ds.data.encoder import Encoder
from dpo_ds.data.held_out import KEYS, prompt_hash, prompt_keys
from dpo_ds.data.pairs import read_manifest
from dpo_ds.data.rows.forms import read_row
from dpo_ds.data.rows.row import Reading
from dpo_ds.data.sources import Split, fields
from dpo_ds.errors import files_of, one_line
from dpo_ds.files import scratch_folder
from dpo_ds.ranks import console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORMAT = 10  # raise it when the cached files change, or the code that decides their content
SMALL = 20_000  # rows; for fewer, starting processes costs more than it saves
BATCH = 1000  # rows that are in memory at a time


def tokenize_pairs(
    sources: Sequence[Split],
    encoder: Encoder,
    reading: Reading,
    join: bool,
    cache_folder: Path,
    num_proc: int | None = None,
) -> tuple[Path, list[Report]]:
    """Returns the cache folder of the sources' PairSet, and each source's report. Tokenises what is not there, or is
    damaged: each file is read once for its checksum.

    join: rows of one prompt become one group.
    """
    options = [asdict(encoder.options), asdict(reading), join]
    folder = cache_folder / _key([split.rows for split in sources], encoder.tokenizer, options)[:32]
    if folder.is_dir() and (problem := _damage(folder)):
        console.say(f"the tokenised pairs in {folder} are damaged ({problem}): they are made again")
        with files_of("--cache_dir", cache_folder):
            shutil.rmtree(folder)
    if not folder.is_dir():
        with files_of("--cache_dir", cache_folder), scratch_folder(cache_folder, folder.name) as partial:
            _Writer(partial, folder.name, join).write(sources, reading, encoder, num_proc)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster and made the same set
                    raise
    reports = [Report.read(report) for report in read_manifest(folder)["report"]]
    return folder, reports


def _damage(folder: Path) -> str | None:
    """What is wrong with a set of tokenised pairs; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if not is_sealed(manifest):
            return "manifest.json does not match its own checksum"
        if manifest["key"] != folder.name:
            return "they are those of other rows or options"
    except (OSError, ValueError, AttributeError) as error:
        return f"manifest.json: {one_line(error)}"
    return difference(folder, manifest["files"], manifest["files"])


def _key(sources: Sequence[datasets.Dataset], tokenizer: "PreTrainedTokenizerBase", options: list) -> str:
    """sha256 of everything that decides the tokens: rows, tokenizer, options."""
    digest = hashlib.sha256()
    facts = {
        "format": FORMAT,
        "options": options,
        "template": tokenizer.chat_template,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
    digest.update(json.dumps(facts, sort_keys=True, default=sorted).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(
        (backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode()
    )
    for rows in sources:
        for batch in rows.with_format("arrow").iter(batch_size=10_000):
            chunk = batch.combine_chunks().replace_schema_metadata(None)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, chunk.schema) as writer:
                writer.write_table(chunk)
            digest.update(sink.getvalue())
    return digest.hexdigest()


# A row of the data once it is encoded. Lists of lists are flat: `lengths` says where each sequence ends.
_FEATURES = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "tokens": datasets.List(datasets.Value("int32")),  # the prompt, then its answers
        "scored": datasets.List(datasets.Value("uint8")),  # of the answers' tokens; empty: all
        "lengths": datasets.List(datasets.Value("int32")),  # of the prompt and of each answer
        "answer_ids": datasets.List(datasets.Value("binary")),
        "pairs": datasets.List(datasets.Value("int32")),  # chosen, rejected, chosen, rejected, ...
        "pair_ids": datasets.List(datasets.Value("binary")),
        "weights": datasets.List(datasets.Value("float32")),
        "margins": datasets.List(datasets.Value("float32")),
        "prompt_hash": datasets.Value("binary"),
        "prompt_keys": datasets.Value("binary"),
        "left_out": datasets.Value("string"),
        "changed": datasets.List(datasets.Value("string")),
        "unused": datasets.List(datasets.Value("string")),
        "cut_prompt": datasets.Value("int32"),
        "gaps": datasets.List(datasets.Value("int32")),  # of the prompt: place, tokens, place, tokens
        "cut_answers": datasets.List(datasets.Value("int32")),
        "dropped_pairs": datasets.Value("int32"),
        "spare_answers": datasets.Value("int32"),
    }
)
# Of these, what the report counts.
COUNTED = [
    "row",
    "left_out",
    "changed",
    "unused",
    "cut_prompt",
    "cut_answers",
    "weights",
    "dropped_pairs",
    "spare_answers",
]


def _encode_batch(
    batch: dict[str, list], indices: list[int], reading: Reading, encoder: Encoder, columns: Sequence[str]
) -> dict[str, list]:
    """Reads and encodes a batch of rows. A row that is left out stays in place, without tokens.

    columns: of the whole set. A row of JSON that lacks one has null there, as it would have in a table.
    """
    absent = dict.fromkeys(columns)
    out: dict[str, list] = {name: [] for name in _FEATURES}
    comparisons, reasons = [], []
    for n in range(len(indices)):
        found = fields({key: column[n] for key, column in batch.items()})
        try:
            comparisons.append(read_row(absent | found if isinstance(found, dict) else found, reading))
            reasons.append("")
        except LeftOut as reason:
            reasons.append(_printable(str(reason)))
    encoded = iter(zip(comparisons, encoder.encode(comparisons), strict=True))
    for row, left_out in zip(indices, reasons, strict=True):
        facts: dict[str, Any] = {"row": row, "left_out": left_out}
        if not left_out:
            comparison, tokens = next(encoded)
            unused = dict.fromkeys([*comparison.unused, *tokens.unused])
            facts |= {"left_out": _printable(tokens.left_out), "unused": [*map(_printable, unused)]}
            if not tokens.left_out:
                text = comparison.text if comparison.text is not None else as_text(comparison.messages)
                facts |= _flat(tokens) | {
                    "prompt_hash": prompt_hash(text),
                    "prompt_keys": prompt_keys(comparison, text, tokens.prompt),
                    "changed": [*map(_printable, dict.fromkeys([*comparison.changed, *tokens.changed]))],
                    "dropped_pairs": len(comparison.pairs) - len(tokens.pairs),
                    "spare_answers": comparison.spare_answers,
                }
        for name, feature in _FEATURES.items():
            empty: list | int | bytes = [] if isinstance(feature, datasets.List) else 0
            if name in ("prompt_hash", "prompt_keys"):
                empty = b""
            out[name].append(facts.get(name, empty))
    return out


def _printable(text: str) -> str:
    """A line of the report. The data's own names and roles may hold bytes that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _flat(found: Encoded) -> dict:
    """An encoded row's tokens and pairs, as _FEATURES has them."""
    sequences = [found.prompt, *found.answers]
    masks = [
        [True] * len(answer) if scored is None else scored
        for answer, scored in zip(found.answers, found.scored, strict=True)
    ]
    partly = any(scored is not None for scored in found.scored)
    places = [(pair.chosen, pair.rejected) for pair in found.pairs]
    return {
        "tokens": [token for sequence in sequences for token in sequence],
        "scored": [int(learned) for mask in masks for learned in mask] if partly else [],
        "lengths": [len(sequence) for sequence in sequences],
        "answer_ids": [
            _id([found.prompt, answer], scored) for answer, scored in zip(found.answers, found.scored, strict=True)
        ],
        "pairs": [place for pair in places for place in pair],
        "pair_ids": [
            _id(
                [found.prompt, found.answers[chosen], found.answers[rejected]],
                None if not partly else [*masks[chosen], *masks[rejected]],
            )
            for chosen, rejected in places
        ],
        "weights": [pair.weight for pair in found.pairs],
        "margins": [float("nan") if pair.margin is None else pair.margin for pair in found.pairs],
        "cut_prompt": found.cut_prompt,
        "gaps": [number for gap in [*found.gaps, (0, 0), (0, 0)][:2] for number in gap],
        "cut_answers": found.cut_answers,
    }


def _id(sequences: list[list[int]], scored: list[bool] | None) -> bytes:
    numbers = [*map(len, sequences), *(token for sequence in sequences for token in sequence)]
    content = np.array(numbers, dtype=np.int32).tobytes()
    if scored is not None and not all(scored):
        content += np.array(scored, dtype=np.uint8).tobytes()
    return hashlib.sha256(content).digest()[:16]


@dataclass
class _Writer:
    """Writes the arrays of a PairSet. Tokens go to the disk as they come; the rest is a few dozen bytes a row."""

    folder: Path
    key: str  # what decides the tokens
    join: bool
    columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    total: int = 0  # tokens so far
    partly: bool = False  # whether a token of an answer is not learned

    def write(self, sources: Sequence[Split], reading: Reading, encoder: Encoder, num_proc: int | None) -> None:
        reports = []
        with open(self.folder / "tokens.int32", "wb") as tokens, open(self.folder / "scored.uint8", "wb") as scored:
            for number, split in enumerate(sources):
                report = Report(len(split.rows))
                for batch in _encoded(split, reading, encoder, num_proc, f"{self.folder.name[:32]}-{number}"):
                    for facts in batch.select(COUNTED).to_pylist():
                        report.add(facts)
                    self._add(batch, number, tokens, scored)
                reports.append(report)
        if not self.partly:
            (self.folder / "scored.uint8").unlink()
        arrays = self._arrays()
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array)
        manifest = {
            "key": self.key,
            "pairs": len(arrays["pairs"]),
            "answers": len(arrays["answers"]),
            "groups": len(arrays["prompts"]),
            "tokens": self.total,
            "report": [report.saved() for report in reports],
            "files": measured(self.folder, sorted(path.name for path in self.folder.iterdir())),
        }
        (self.folder / "manifest.json").write_text(json.dumps(sealed(manifest), indent=1))

    def _add(self, batch: pa.Table, source: int, tokens: IO[bytes], scored: IO[bytes]) -> None:
        """Adds the rows of a batch that are used. Numbers of rows and answers count from the first batch on."""
        values = _flat_numbers(batch, "tokens", np.int32)
        tokens.write(values.tobytes())
        row_lengths = batch["lengths"].to_pylist()
        used = [n for n, lengths in enumerate(row_lengths) if lengths]
        self._score(batch, row_lengths, len(values), scored)
        lengths = _flat_numbers(batch, "lengths", np.int64)
        starts = self.total + np.cumsum(lengths) - lengths
        self.total += len(values)
        sizes = np.array([len(row_lengths[n]) for n in used], dtype=np.int64)  # of prompt and answers
        prompts = np.cumsum(sizes) - sizes  # their places among the sequences
        sequences = np.stack([starts, lengths], axis=1)
        first_row, first_answer = (sum(map(len, self.columns[name])) for name in ("prompts", "answers"))
        is_answer = np.ones(len(lengths), dtype=bool)
        is_answer[prompts] = False
        answers_before = first_answer + np.cumsum(sizes - 1) - (sizes - 1)
        pairs_of = [len(batch["pair_ids"][n]) for n in used]
        kept = batch.take(pa.array(used, pa.int64()))
        pairs = _flat_numbers(kept, "pairs", np.int64).reshape(-1, 2)
        added = {
            "prompts": sequences[prompts],
            "prompt_hashes": _bytes(kept["prompt_hash"], 16),
            "prompt_keys": _bytes(kept["prompt_keys"], 16 * KEYS).reshape(-1, KEYS, 16),
            "prompt_gaps": _flat_numbers(kept, "gaps", np.int32).reshape(-1, 2, 2),
            "answers": sequences[is_answer],
            "answer_cuts": _flat_numbers(kept, "cut_answers", np.int32),
            "answer_rows": first_row + np.repeat(np.arange(len(used)), sizes - 1),
            "answer_ids": _bytes(pc.list_flatten(kept["answer_ids"]), 16),
            "pairs": pairs + np.repeat(answers_before, pairs_of)[:, None],
            "rows": np.repeat(_flat_numbers(kept, "row", np.int64), pairs_of),
            "sources": np.full(len(pairs), source),
            "weights": _flat_numbers(kept, "weights", np.float32),
            "margins": _flat_numbers(kept, "margins", np.float32),
            "pair_ids": _bytes(pc.list_flatten(kept["pair_ids"]), 16),
        }
        for name, array in added.items():
            self.columns[name].append(array)

    def _score(self, batch: pa.Table, row_lengths: list[list[int]], tokens: int, scored: IO[bytes]) -> None:
        """Writes which tokens are learned: those of answers, less what a row's mask leaves out."""
        learned = np.ones(tokens, dtype=np.uint8)
        at = 0
        for mask, lengths in zip(batch["scored"], row_lengths, strict=True):
            end = at + sum(lengths)
            if len(mask):
                learned[at + lengths[0] : end] = mask.values.to_numpy()
                self.partly = True
            at = end
        scored.write(learned.tobytes())

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the PairSet: rows of one prompt joined, each answer once, pairs in their groups' order."""
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        rows = np.arange(len(columns["prompts"]), dtype=np.int64)
        first, group_of_row = _numbered(columns["prompt_keys"][:, 0] if self.join else rows[:, None])
        of_answer = group_of_row[columns["answer_rows"]]
        # The same answer to the same prompt is there once.
        marks = np.concatenate([of_answer[:, None].view(np.uint8).reshape(-1, 8), columns["answer_ids"]], axis=1)
        first_answer, number = _numbered(marks)
        by_group = np.argsort(of_answer[first_answer], kind="stable")
        place = np.empty(len(by_group), dtype=np.int64)
        place[by_group] = np.arange(len(by_group))
        answers = first_answer[by_group]
        pairs = place[number][columns["pairs"]]
        order = np.argsort(of_answer[columns["pairs"][:, 0]], kind="stable")
        return {
            **{name: columns[name][first] for name in ("prompts", "prompt_gaps", "prompt_hashes", "prompt_keys")},
            **{name: columns[name][answers] for name in ("answers", "answer_cuts", "answer_ids")},
            "answer_groups": of_answer[answers],
            "pairs": pairs[order],
            **{name: columns[name][order] for name in ("rows", "sources", "weights", "margins", "pair_ids")},
        }


def _encoded(split: Split, reading: Reading, encoder: Encoder, num_proc: int | None, name: str) -> Iterator[pa.Table]:
    """Yields the encoded rows, in batches."""
    if num_proc is None:
        num_proc = min(8, len(os.sched_getaffinity(0)))
    rows = split.rows
    encoded = rows.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"encoder": encoder, "reading": reading, "columns": split.columns},
        remove_columns=rows.column_names,
        features=_FEATURES,
        load_from_cache_file=False,
        num_proc=num_proc if len(rows) >= SMALL and num_proc > 1 else None,
        new_fingerprint=name,
    )
    yield from encoded.with_format("arrow").iter(batch_size=BATCH)


def _numbered(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers equal rows alike, in the order in which they first appear: the place of each number's first row, and the
    number of every row."""
    width = content.shape[1] * content.itemsize
    whole = np.ascontiguousarray(content).view(f"V{width}").reshape(-1)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    return first[order], number[inverse.reshape(-1)]


def _flat_numbers(batch: pa.Table, name: str, dtype: type) -> np.ndarray:
    column = batch[name].combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).astype(dtype)


def _bytes(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A column whose values are `width` bytes each, as uint8 [n, width]."""
    return np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint8).reshape(-1, width)
