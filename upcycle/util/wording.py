"""Numbers for people."""

from collections.abc import Sequence
from typing import Any


def short(number: int) -> str:
    """``134515008`` as ``134.5M``."""
    value, unit = float(number), ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.95 or unit == "P":
            break
        value /= 1000
    return f"{value:.1f}{unit}" if unit else str(number)


def size(number: int) -> str:
    """``134515008`` as ``134.5 MB``; rich's own would print ``1,000.0 kB`` and ``12 bytes``."""
    text = short(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def count(items: Sequence[Any], noun: str) -> str:
    """``2 layers`` for two items."""
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"
