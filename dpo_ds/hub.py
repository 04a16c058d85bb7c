"""The Hugging Face hub, where a machine may have none: its clients retry for half a minute, with a line for each."""

import functools
import sys

PATIENCE = 10  # seconds


@functools.cache
def offline_if_unreachable() -> None:
    """Asks the hub for a sign of life, once a process; without one, its clients use what is in their cache from here
    on, as with HF_HUB_OFFLINE=1, and say at once what is not."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of whichever HTTP library the hub's client is built on
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # else it takes over what it finds when it is imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
