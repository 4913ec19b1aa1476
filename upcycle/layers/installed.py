"""What the description of a layer may name that packages of others bring: see CONTRIBUTING.md."""

from functools import partial

from upcycle.layers.config import OTHER_KINDS
from upcycle.pointwise import OPS
from upcycle.util.registry import load_installed

ROUTERS, ACTIVATIONS = "upcycle.routers", "upcycle.activations"


def find_installed() -> None:
    """Look in entry points for routers and activations that upcycle does not have."""
    OTHER_KINDS.find = partial(load_installed, ROUTERS)
    OPS.find = partial(load_installed, ACTIVATIONS)
