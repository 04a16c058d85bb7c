"""A reference's log-probabilities as a Parquet file, to be carried to another machine: `dpo_ds.score --output FILE`
writes it, --reference_table FILE reads it.

A row for each answer, training pairs' first:
    answer    string         hash of its tokens, its prompt's, and which of them are learned (PairSet.answer_ids, hex)
    pairs     list<string>   the ids of the pairs that it is in
    length    int64          its learned tokens
    logps     list<float32>  their sum, or in a run of LD-DPO the value of each
The file's metadata holds, under "dpo_ds", what decided the values, a hash of them, and a checksum of all that.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_ds.checksums import is_sealed, sealed
from dpo_ds.data.pairs import PairSet
from dpo_ds.errors import UserError, files_of, one_line
from dpo_ds.scoring.sweep import Places

if TYPE_CHECKING:
    import pyarrow

FORMAT = 2  # 1 had no checksum of its facts
COLUMNS = ("answer", "pairs", "length", "logps")


def write_table(path: Path, sets: list[tuple[PairSet, np.ndarray]], facts: dict) -> None:
    """Writes the logps of these sets, as references give them. facts: what decided them, with the model's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    per_token = facts.get("values") == "tokens"
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for pairs, logps in sets:
        places, of_answer = Places.of_set(pairs, per_token), defaultdict(list)
        for n, answers in enumerate(pairs.pairs.tolist()):
            for answer in answers:
                of_answer[answer].append(pairs.pair_id(n))
        for answer, start in enumerate(places.starts.tolist()):
            columns["answer"].append(pairs.answer_ids[answer].tobytes().hex())
            columns["pairs"].append(of_answer[answer])
            columns["length"].append(int(pairs.learned_lengths[answer]))
            columns["logps"].append(logps[start : start + int(places.sizes[answer])])
    kinds = (pa.string(), pa.list_(pa.string()), pa.int64(), pa.list_(pa.float32()))
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in zip(COLUMNS, kinds, strict=True)})
    metadata = sealed({"format": FORMAT, **facts, "sha256": _digest(table)})
    table = table.replace_schema_metadata({"dpo_ds": json.dumps(metadata)})
    with files_of("--output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        pq.write_table(table, partial, write_page_checksum=True)
        partial.replace(path)


class TableFile:
    """A table that has been read. Raises UserError if it is damaged, or holds other values than a run needs."""

    def __init__(self, path: Path, precision: str, per_token: bool):
        self.path, self.per_token = path, per_token
        table = self._read()
        try:
            self.facts = json.loads((table.schema.metadata or {})[b"dpo_ds"])
            known = self.facts["format"] in (1, FORMAT) and set(COLUMNS) <= set(table.column_names)
        except (KeyError, ValueError, TypeError):
            known = False
        if not known:
            raise UserError(
                f"--reference_table {path} is no table of this version: write it with dpo_ds.score --output FILE"
            )
        sound = self.facts["format"] == 1 or is_sealed(self.facts)
        if not sound or self.facts.get("sha256") != _digest(table):
            raise UserError(f"--reference_table {path} does not match its own hash: copy it again")
        if self.facts.get("precision") != precision:
            raise UserError(
                f"--reference_table {path} was computed in {self.facts.get('precision')}, and this run is in "
                f"{precision}: score with --precision {precision}, or train in the table's"
            )
        if (self.facts.get("values") == "tokens") != per_token:
            has, needs = ("tokens", "answers") if not per_token else ("answers", "tokens")
            raise UserError(
                f"--reference_table {path} has the values of {has}, and this run needs those of {needs}: score with "
                "the same --ld_alpha as you train with"
            )
        logps = table["logps"].combine_chunks()
        self.values = logps.values.to_numpy(zero_copy_only=False)
        self.starts = logps.offsets.to_numpy()
        self.lengths = table["length"].to_numpy()
        self.rows = defaultdict(list)
        for row, answer in enumerate(table["answer"].to_pylist()):
            self.rows[answer].append(row)

    def _read(self) -> "pyarrow.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(self.path, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            said = one_line(error)
            raise UserError(f"--reference_table {self.path} cannot be read as Parquet: {said}; name a file") from None

    def logps(self, pairs: PairSet, needed: np.ndarray, title: str) -> np.ndarray:
        """The values of a set's answers, float32. Those that are neither `needed` nor there are NaN.

        needed: bool [answers]. Raises UserError if one of these is not in the table.
        """
        places = Places.of_set(pairs, self.per_token)
        found = np.full(places.total, np.nan, dtype=np.float32)
        seen: dict[str, int] = defaultdict(int)  # the same answer may be there twice, packed with others each time
        missing = 0
        for answer, start in enumerate(places.starts.tolist()):
            name = pairs.answer_ids[answer].tobytes().hex()
            rows = self.rows.get(name)
            if rows is None:
                missing += bool(needed[answer])
                continue
            row = rows[min(seen[name], len(rows) - 1)]
            seen[name] += 1
            values = self.values[self.starts[row] : self.starts[row + 1]]
            if len(values) != places.sizes[answer] or self.lengths[row] != pairs.learned_lengths[answer]:
                raise UserError(f"--reference_table {self.path}: answer {name} has another length here: score again")
            found[start : start + len(values)] = values
        if missing:
            raise UserError(
                f"--reference_table {self.path} has no values of {missing} of {needed.sum()} answers of the {title} "
                "pairs: score the same --dataset with the same --max_length, template and truncation"
            )
        return found


def _digest(table: "pyarrow.Table") -> str:
    """sha256 of a table's rows."""
    digest = hashlib.sha256()
    logps = table["logps"].combine_chunks()
    digest.update(np.ascontiguousarray(logps.values.to_numpy(zero_copy_only=False)).tobytes())
    digest.update(np.ascontiguousarray(table["length"].to_numpy()).tobytes())
    digest.update("\n".join(table["answer"].to_pylist()).encode())
    return digest.hexdigest()
