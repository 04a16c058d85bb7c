"""The exported model's generation_config.json: the base's own, which also stops at the token that answers end with."""

import json
import re
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig

FILE = "generation_config.json"
_ENDS = re.compile(r'("eos_token_id"\s*:\s*)(\[[^\]]*\]|null|-?\d+)')


def text_for(source: Path | None, config: PreTrainedConfig, end: int | None) -> str:
    """The file's text. source: the base's folder, if it has one here; end: the token that answers were trained to end
    with, None if no single token ends them.

    The base's file is kept byte for byte, but for eos_token_id. It is not read as transformers' GenerationConfig, which
    refuses to write some files of models on the hub (a temperature beside do_sample false, for one).
    """
    file = None if source is None else source / FILE
    text = file.read_text(encoding="utf-8") if file is not None and file.is_file() else _from(config)
    ends = ends_of(text)
    if end is None or end in ends:
        return text
    value = json.dumps([*ends, end] if ends else end)
    if _ENDS.search(text):
        return _ENDS.sub(lambda match: match[1] + value, text, count=1)
    return json.dumps({**json.loads(text), "eos_token_id": json.loads(value)}, indent=2) + "\n"


def folder_of(source: str) -> Path | None:
    """Where the file is of a model that is named by its folder or its hub id; None if it has none here."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    found = try_to_load_from_cache(source, FILE)
    return Path(found).parent if isinstance(found, str) else None


def _from(config: PreTrainedConfig) -> str:
    """For a base without the file: its config's tokens, as transformers takes them for such a model."""
    text = config.get_text_config()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(text, name, None) for name in names}
    return json.dumps({name: token for name, token in tokens.items() if token is not None}, indent=2) + "\n"


def ends_of(text: str) -> list[int]:
    """The tokens at which a generation_config.json stops."""
    return _listed(json.loads(text).get("eos_token_id"))


def ends_of_config(config: GenerationConfig | None) -> list[int]:
    """The tokens at which a loaded model's own generation stops."""
    return _listed(None if config is None else config.eos_token_id)


def _listed(ends: list[int] | int | None) -> list[int]:
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
