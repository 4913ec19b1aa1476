"""Writing JSON that every program reads, and reading JSON files."""

import json
import math
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError

MAX_BYTES = 2**28  # the largest index of a checkpoint is a tenth of it


def json_text(data: Any) -> str:
    """`data` as indented JSON; numbers that are not finite become null: JSON has none."""
    return json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"


def parsed(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, remedy: str = "copy or download it again") -> dict[str, Any]:
    """The object in a JSON file; `remedy` is what a message says to do about a damaged one.

    Raises:
        UsageError: it is not JSON, or not an object.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes are too many for it; {remedy}")
    try:
        data = parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}; {remedy}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a JSON object; {remedy}")
    return data


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
