"""The colours of boxes, by what they are: filling and edge, which differ in brightness, too."""

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


def kind_of(facts: dict[str, object]) -> str:
    """The key of the colours of a box."""
    return "missed" if "miss" in facts else str(facts["kind"])
