"""What must not leave the machine, or stay in a run's files: tokens, passwords, and where things lie on a disk."""

import re
from pathlib import Path

SECRETS = (
    (re.compile(r"(?<=://)[^/@\s]+@"), ""),  # a name and a password in an address
    (re.compile(r"([?&](?:\w*token|\w*key|sig|signature|password)=)[^&\s]+", re.I), r"\1***"),
    (re.compile(r"\b(?:hf|sk|ghp|github_pat)_\w{16,}"), "***"),
)
# A folder may be called hf_models_converted. What is surely a secret is stricter: no words, but letters and digits.
SURE = re.compile(
    r"(?<=://)[^/@\s]+:[^/@\s]+@|[?&](?:\w*token|\w*key|sig|signature|password)=[^&\s]{8,}"
    r"|\b(?:hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|sk-[A-Za-z0-9_-]{30,})",
    re.I,
)
SECRET_KEYS = re.compile(r"(api_?key|token|password|secret)$", re.I)  # of settings


def masked(text: str) -> str:
    """A text without what looks like a secret in a path or an address."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


def holds_secret(text: str) -> bool:
    """Whether a text surely holds a token or a password."""
    return SURE.search(text) is not None


def public_names(text: str) -> str:
    """Hub ids as they are, and files and folders of this machine by their last name alone. `text` may list several,
    each with a weight: a/b:0.5,/home/me/c.jsonl:0.5."""
    return ",".join(_public_name(piece) for piece in text.split(","))


def _public_name(piece: str) -> str:
    name, colon, weight = piece.partition(":")
    path = Path(name).expanduser()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.exists():
        name = path.resolve().name
    return masked(name + colon + weight)
