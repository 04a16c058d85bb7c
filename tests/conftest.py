"""What every test shares: an environment without a hub, and a folder of their own for DeepSpeed's compiled ops."""

import os
from pathlib import Path

# Before anything imports DeepSpeed or transformers; the launches of a test inherit both.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path("~/.cache/dpo_ds-tests/torch_extensions").expanduser()))
