"""The colours of boxes, by what they are: filling and edge."""

from collections.abc import Mapping

COLOURS = {
    "ffn": ("#cfe3f6", "#1d69a8"),
    "bottleneck": ("#fbe6b5", "#a3720b"),
    "head": ("#e6d9f4", "#7247a8"),
    "moe": ("#cdebd5", "#1f7a43"),
    "missed": ("#fdeae3", "#c04a1d"),
    "input": ("#e9ecf0", "#7d8793"),
    "output": ("#e9ecf0", "#7d8793"),
    "operations": ("#ffffff", "#aab2bc"),
    "module": ("#f6f7f9", "#aab2bc"),
}
DARK = {
    "ffn": ("#173a5a", "#6bb3ee"),
    "bottleneck": ("#4a3a10", "#e0b04a"),
    "head": ("#3a2a55", "#b896e8"),
    "moe": ("#17402a", "#63c088"),
    "missed": ("#4a2317", "#ff9a6b"),
    "input": ("#2a3038", "#8b95a1"),
    "output": ("#2a3038", "#8b95a1"),
    "operations": ("#14171b", "#56606b"),
    "module": ("#1e2329", "#56606b"),
}


def kind_of(facts: Mapping[str, object]) -> str:
    """The key of the colours of a box."""
    return "missed" if "miss" in facts else str(facts["kind"])
