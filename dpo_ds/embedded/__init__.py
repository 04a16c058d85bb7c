"""The embedded default: a tiny GPT-2 and a preference set that need no network."""

from pathlib import Path

_HERE = Path(__file__).parent


def model_folder() -> Path:
    return _HERE / "tiny-gpt2"


def sample_file() -> Path:
    return _HERE / "sample.jsonl.gz"
