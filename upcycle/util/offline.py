"""Whether anything may be downloaded."""

import os

VARIABLE = "UPCYCLE_OFFLINE"


def is_offline() -> bool:
    """Whether ``UPCYCLE_OFFLINE`` forbids downloads, of samples as well as from a hub.

    ``HF_HUB_OFFLINE`` is about the hub alone: samples come from the Python package index.
    """
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes", "on")
