"""Whether the Hugging Face hub can be reached. Without this check, its clients retry for half a minute per file."""

import functools
import sys

PATIENCE = 10  # seconds


@functools.cache
def offline_if_unreachable() -> None:
    """Sends the hub one request per process. If it fails, the hub's clients use only their cache from then on, as with
    HF_HUB_OFFLINE=1, and report at once what is missing from it."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # its type depends on the HTTP library of the hub's client
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # datasets copies the setting when it is imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
