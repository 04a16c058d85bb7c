"""Preference pairs from a file, a folder or the hub, checked row by row: what cannot be used is counted, not lost.

A checked row has: `row` (its number in the source), `text` (the prompt as plain text), `messages` (the prompt as a
chat), `chosen` and `rejected`. `text + chosen` is the pair as plain text; in a chat a response is `chosen.strip()`.

Dialogues as text are in the style of Anthropic's HH ("\n\nHuman: ... \n\nAssistant: ..."), which is also how chats are
written for models without a chat template.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from dpo_ds import hub

SAMPLE = "sample"
FIRST_ROWS = 5  # how many row numbers a report names for each kind
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
TURN = re.compile(r"\n\n(Human|Assistant|System):")
PREFERRED_SPLITS = {"train": ("train_prefs", "train"), "eval": ("test_prefs", "validation", "test")}
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# An answer of "4" or "None" in a table is text like any other.
CSV = {"converters": dict.fromkeys(("prompt", "chosen", "rejected"), str), "keep_default_na": False}
RAW = "json line"  # the one column of a JSON file whose rows differ in type, each row as text

MISSING = "a field is missing"
WRONG_TYPE = "a field has the wrong type"
NOT_UNICODE = "a text is not valid Unicode"
EQUAL = "chosen and rejected are equal"
EMPTY = "a response is empty"
DIFFER = "the dialogues differ before the last answer"
NO_PROMPT = "chosen and rejected share no prompt"


@dataclass
class Report:
    """How many rows came, were left out, and were changed, each kind with the first row numbers of the source."""

    total: int
    max_left_out: float = 0.1
    left_out: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    changed: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.total - sum(count for count, _ in self.left_out.values())

    def lines(self) -> list[str]:
        lines = [f"{self.kept} of {self.total} pairs are used"]
        for verb, kinds in (("left out", self.left_out), ("changed", self.changed)):
            lines += [f"{count} {verb}: {kind} ({_named(count, rows)})" for kind, (count, rows) in kinds.items()]
        return lines

    def check(self) -> None:
        """Raises ValueError if nothing is left, or more is left out than may be."""
        left_out = self.total - self.kept
        if left_out and (self.kept == 0 or left_out / self.total > self.max_left_out):
            kinds = "; ".join(
                f"{count} x {kind} ({_named(count, rows)})" for kind, (count, rows) in self.left_out.items()
            )
            raise ValueError(
                f"{left_out} of {self.total} rows cannot be used: {kinds}; mend the data, or raise --max_left_out "
                f"(now {self.max_left_out}) if the rest will do"
            )


def _named(count: int, rows: Sequence[int]) -> str:
    return f"row{'s' if count > 1 else ''} {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"


def counted(found: Iterable[tuple[str, int]]) -> dict[str, tuple[int, list[int]]]:
    """{kind: (how many, the first row numbers)} of kinds and the rows they were found in; "" is no kind."""
    counts: dict[str, tuple[int, list[int]]] = {}
    for kind, row in found:
        if kind:
            count, first = counts.get(kind, (0, []))
            counts[kind] = (count + 1, [*first, int(row)] if len(first) < FIRST_ROWS else first)
    return counts


# ---------------------------------------------------------------------------------------------------------- loading


def load_preferences(source: str, split: str = "auto", role: str = "train") -> datasets.Dataset:
    """Rows as they are in the source: "sample", a file, a folder, or a hub id.

    Raises ValueError, with the remedy, if there is nothing to be had there, or no such split.
    """
    try:
        return _load(source, split, role)
    except ValueError as error:
        raise ValueError(f"{flag(role)} {error}") from None


def flag(role: str) -> str:
    """The option that names the set of that role, "train" or "eval"."""
    return "--eval_dataset" if role == "eval" else "--dataset"


def _load(source: str, split: str, role: str) -> datasets.Dataset:
    if source == SAMPLE:
        from dpo_ds.embedded import sample_file

        path = sample_file()
    else:
        path = Path(source).expanduser()
    datasets.disable_progress_bars()
    datasets.disable_caching()  # `map` would write beside the user's data, which may be read-only
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is told once, by us
    if path.is_file():
        sets = _load_file(path)
    elif path.is_dir():
        sets = _load_folder(path)
    elif source.startswith(("/", ".", "~")) or source.count("/") != 1 or path.suffix in LOADERS:
        raise ValueError(f"{source} is not there: name a hub id, a folder or a file ({_endings()})")
    else:
        sets = _load_hub(source)
    rows = _choose_split(source, sets, split, role)
    if len(rows) == 0:
        raise ValueError(f"{source} holds no rows: name one that does")
    return rows


def _endings() -> str:
    return ", ".join([*LOADERS, ".jsonl.gz"])


def _load_file(path: Path) -> dict:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in LOADERS:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}; it must be one of {_endings()}")
    kind = LOADERS[suffix]
    try:
        sets = datasets.load_dataset(kind, data_files=str(path), **(CSV if kind == "csv" else {}))
        for rows in sets.values():
            rows.data.validate(full=True)  # Arrow's reader takes bytes that are not text
        return sets
    except Exception as error:  # datasets wraps what its readers raise, in many types
        if kind == "json":
            return {"train": _load_mixed_json(path)}
        raise ValueError(f"{path} cannot be read as {kind}: {_cause(error)}") from None


def _load_mixed_json(path: Path) -> datasets.Dataset:
    """Arrow wants one type in a column; here every line is kept as text and looked at by itself."""
    reader = gzip.open if path.suffix == ".gz" else open
    try:
        with reader(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
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
        raise ValueError(f"{path}: row {number} is not JSON ({error.msg}); mend or remove it") from None


def _load_folder(path: Path) -> dict:
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded if isinstance(loaded, dict) else {"train": loaded}
        return datasets.load_dataset(str(path))
    except Exception as error:
        raise ValueError(f"{path} is a folder without data that `datasets` can read: {_cause(error)}") from None


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
        raise ValueError(f"{source} is no file here and cannot be read from the hub: {remedy}") from None


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def _choose_split(source: str, sets: dict, split: str, role: str) -> datasets.Dataset:
    if split != "auto":
        if split not in sets:
            raise ValueError(f"{source} has no split {split}; --dataset_split takes {', '.join(sets)}")
        return sets[split]
    for name in PREFERRED_SPLITS[role]:
        if name in sets:
            return sets[name]
    if len(sets) == 1:
        return next(iter(sets.values()))
    raise ValueError(f"{source} has the splits {', '.join(sets)}: choose one with --dataset_split")


# --------------------------------------------------------------------------------------------------------- checking


class _LeftOut(Exception):
    """A row that is no usable pair; its message is the kind."""


def check_preferences(rows: datasets.Dataset, max_left_out: float = 0.1) -> tuple[datasets.Dataset, Report]:
    """The usable rows in the form this module's docstring describes, and the report of the others.

    Raises ValueError if the columns are not a preference set's, nothing is usable, or more than `max_left_out` of the
    rows are not.
    """
    if rows.column_names != [RAW] and not {"chosen", "rejected"} <= set(rows.column_names):
        raise ValueError(
            f"it has the columns {', '.join(rows.column_names)}; a preference set has chosen and rejected, "
            "and prompt unless they are whole dialogues: rename them"
        )
    columns = [name for name in ("prompt", "chosen", "rejected", RAW) if name in rows.column_names]
    checked = rows.select_columns(columns).map(
        _check_batch,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        load_from_cache_file=False,
        features=_FEATURES,
    )
    kinds = checked["kind"][:]
    report = Report(len(rows), max_left_out, left_out=counted(zip(kinds, range(len(rows)), strict=True)))
    report.check()
    usable = np.flatnonzero([not kind for kind in kinds])
    return checked.select(usable).remove_columns("kind"), report


_MESSAGE = {"role": datasets.Value("string"), "content": datasets.Value("string")}
_FEATURES = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "text": datasets.Value("string"),
        "messages": [_MESSAGE],
        "chosen": datasets.Value("string"),
        "rejected": datasets.Value("string"),
        "kind": datasets.Value("string"),
    }
)


def _check_batch(batch: dict, indices: list[int]) -> dict:
    out: dict[str, list] = {name: [] for name in _FEATURES}
    for n, row in enumerate(indices):
        fields = json.loads(batch[RAW][n]) if RAW in batch else {key: column[n] for key, column in batch.items()}
        try:
            if not isinstance(fields, dict):
                raise _LeftOut(WRONG_TYPE)
            pair, kind = normalise(fields), ""
        except _LeftOut as reason:
            pair, kind = {"text": "", "messages": [], "chosen": "", "rejected": ""}, str(reason)
        for key, value in {"row": row, "kind": kind, **pair}.items():
            out[key].append(value)
    return out


def normalise(fields: dict) -> dict:
    """One row of any accepted form -> text, messages, chosen, rejected."""
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    prompt = fields.get("prompt")
    if chosen is None or rejected is None or ("prompt" in fields and prompt is None):
        raise _LeftOut(MISSING)
    if chosen == rejected:
        raise _LeftOut(EQUAL)
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair = _from_texts(prompt, chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        pair = _from_messages(prompt, _messages(chosen), _messages(rejected))
    else:
        raise _LeftOut(WRONG_TYPE)
    if not pair["chosen"].strip() or not pair["rejected"].strip():
        raise _LeftOut(EMPTY)
    if pair["chosen"] == pair["rejected"]:
        raise _LeftOut(EQUAL)
    return pair


def _from_texts(prompt, chosen: str, rejected: str) -> dict:
    if isinstance(prompt, str):
        return _pair(prompt, _as_messages(prompt), chosen, rejected)
    if isinstance(prompt, list):
        messages = _messages(prompt)
        if not messages:
            raise _LeftOut(NO_PROMPT)
        return _pair(as_text(messages), messages, f" {chosen.strip()}", f" {rejected.strip()}")
    if prompt is not None:
        raise _LeftOut(WRONG_TYPE)
    if TURN.match(chosen) and TURN.match(rejected):
        prompts = [text[: _last_answer(text)] for text in (chosen, rejected)]
        if prompts[0] != prompts[1]:
            raise _LeftOut(DIFFER)
        start, messages = len(prompts[0]), parse_dialogue(prompts[0])
        if not messages:  # no answer, or nothing before it
            raise _LeftOut(NO_PROMPT)
        return _pair(prompts[0], messages, chosen[start:], rejected[start:])
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (character by character is what is wanted)
    shared = re.sub(r"\s*\S*\Z", "", common)  # back to the end of a whole word
    if not shared:
        raise _LeftOut(NO_PROMPT)
    return _pair(shared, [{"role": "user", "content": shared}], chosen[len(shared) :], rejected[len(shared) :])


def _last_answer(text: str) -> int:
    """Where the last answer of an HH dialogue begins: right after its last "Assistant:", 0 if it has none."""
    at = text.rfind("\n\nAssistant:")
    return 0 if at < 0 else at + len("\n\nAssistant:")


def _from_messages(prompt, chosen: list[dict], rejected: list[dict]) -> dict:
    if isinstance(prompt, list):
        given = _messages(prompt)
    elif isinstance(prompt, str):
        given = _as_messages(prompt)
    elif prompt is None:
        given = []
    else:
        raise _LeftOut(WRONG_TYPE)
    if len(chosen) > 1 or len(rejected) > 1:  # they repeat the prompt, as UltraFeedback's do
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        repeated, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if isinstance(prompt, list) and repeated[: len(given)] != given:
            given = given + repeated
        else:
            given = repeated
    if len(chosen) != 1 or len(rejected) != 1:
        raise _LeftOut(DIFFER)
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise _LeftOut(WRONG_TYPE)
    if not given:
        raise _LeftOut(NO_PROMPT)
    return _pair(as_text(given), given, f" {chosen[0]['content'].strip()}", f" {rejected[0]['content'].strip()}")


def _messages(value: list) -> list[dict]:
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise _LeftOut(WRONG_TYPE)
        if message["role"] not in ROLES:
            raise _LeftOut(WRONG_TYPE)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _as_messages(prompt: str) -> list[dict]:
    return parse_dialogue(prompt) or [{"role": "user", "content": prompt}]


def _pair(text: str, messages: list[dict], chosen: str, rejected: str) -> dict:
    try:
        (text + chosen + rejected).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, or bytes that were not UTF-8
        raise _LeftOut(NOT_UNICODE) from None
    return {"text": text, "messages": messages, "chosen": chosen, "rejected": rejected}


def parse_dialogue(text: str) -> list[dict] | None:
    """The messages of a dialogue as text, without the open answer at its end; None if it is not one."""
    if not TURN.match(text):
        return None
    parts = TURN.split(text)[1:]
    names = {name: role for role, name in ROLES.items()}
    messages = [
        {"role": names[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def as_text(messages: list[dict]) -> str:
    """A chat as text, open for the next answer."""
    turns = [f"\n\n{ROLES[message['role']]}: {message['content']}" for message in messages]
    return "".join(turns) + "\n\nAssistant:"


def prompt_hash(text: str) -> bytes:
    """16 bytes of sha256: what the held-out choice goes by, the same for every model and tokenizer."""
    return hashlib.sha256(text.encode()).digest()[:16]
