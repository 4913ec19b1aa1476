"""One comparison of a verification: what was measured, and what was allowed."""

from typing import Any

Check = dict[str, Any]

END_TO_END = "end to end"
LAYER_CHECKS = {
    "relative": "layer",
    "all_experts_relative": "layer with all experts (K = N)",
    "distinct_experts_relative": "layer with distinct experts",
}


def check(what: str, error: float, allowed: float) -> Check:
    """A comparison as plain data; an error that is not a number fails."""
    return {"what": what, "error": error, "allowed": allowed, "passed": bool(error <= allowed)}
