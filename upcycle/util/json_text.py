"""JSON that every program reads: Python's own would write numbers that JSON does not have."""

import json
import math
from typing import Any


def json_text(data: Any) -> str:
    """`data` as indented JSON; infinite numbers and those that are none become null."""
    return json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
