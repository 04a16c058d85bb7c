"""A model's files: its tokenizer and its safetensors weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from dpo_ds.errors import UserError, files_of, one_line
from dpo_ds.files import remembered_sha256
from dpo_ds.models.find import unreadable
from dpo_ds.models.model import Model
from dpo_ds.models.values import require_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


def load_tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """The model's tokenizer. Raises UserError if it cannot be loaded, has no EOS token or has too many tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.source, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers reads the user's files, so any error is about them
        text = one_line(error)
        raise UserError(
            f"--model {model.name} has no tokenizer that loads; put the tokenizer's files into its folder: {text}"
        ) from error
    if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
        raise UserError(f"--model {model.name}: its tokenizer's chat_template is no text; correct or remove it")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {model.name}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--model {model.name}: its tokenizer knows {len(tokenizer)} tokens, but its config's vocab_size is only "
            f"{vocabulary}: resize the embeddings and save the model first"
        )
    return tokenizer


def fetch_weights(model: Model) -> Path:
    """The folder with the weights, downloaded if needed. Raises UserError if a file is missing or damaged."""
    folder = Path(model.source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            folder = Path(snapshot_download(model.source, allow_patterns=[*WEIGHT_FILES, *OTHER_FILES]))
        except (OSError, HfHubHTTPError) as error:
            raise unreadable(model.name, model.source, error) from error
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):  # reads only the header
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged or cannot be read ({one_line(error)}): copy it again") from None
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises UserError if there are none or some are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged ({type(error).__name__} {one_line(error)}): copy it again") from None
        if outside := next((name for name in names if ".." in Path(name).parts or Path(name).is_absolute()), None):
            raise UserError(f"{index} names a file outside its folder, {outside}: copy the folder again")
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {missing[0]} is in the index but not there ({len(missing)} missing): copy the folder again"
        )
    if not files:
        others = sorted(file.name for file in folder.glob("*.bin"))
        instead = f", only {others[0]}" if others else ""
        raise UserError(
            f"{folder} holds no safetensors weights{instead}; save the model with save_pretrained, which writes them"
        )
    return files


def weights_hashes(folder: Path, cache: Path, code: bool = False) -> dict[str, str]:
    """The sha256 of the files that decide what a model computes, by name: config, weights, and its code if that runs.

    Hashes of large files are kept in `cache`, so a file is read again only after it changed. Raises UserError if a
    weight is not finite: this is where each file is read first.
    """
    weights = weight_files(folder)
    files = [folder / "config.json", *weights, *(sorted(folder.glob("*.py")) if code else [])]
    hashes = {}
    with files_of("--cache_dir", cache):
        for file in files:
            hashes[file.name] = remembered_sha256(file, cache / "hashes")
            if file in weights:  # its content is in memory now
                require_finite(file, cache / "hashes")
    return hashes
