"""What is written in a box, in words and lines, and how much room it takes."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len

from upcycle.util.untrusted import printable
from upcycle.util.wording import short

Style = Literal["name", "fact", "path", "miss"]
# Pixels: the height of a line, and the width of a letter, which is at most that of DejaVu Sans.
HEIGHT = {"name": 17.0, "fact": 15.0, "path": 14.0, "miss": 15.0}
LETTER = {"name": 8.0, "fact": 6.6, "path": 6.1, "miss": 6.6}
PADDING = 9.0
TIMES = "\N{MULTIPLICATION SIGN}"
LONGEST = 46  # letters of a line
MOST_LINES = 4  # of a reason
NO_SPACE = ("\ufffe", "\uffff")  # of no use in XML
LAYERS = {"ffn": "FFN", "bottleneck": "bottleneck", "head": "head", "moe": "MoE"}
FACTS = {
    "pattern": "path",
    "count": "times",
    "operations": "operations",
    "ops": "what runs",
    "weights": "weights",
    "parameters": "parameters",
    "shape": "result",
    "dtype": "type",
    "placement": "placement",
    "source": "line",
    "miss": "no FFN",
}


@dataclass(frozen=True)
class Line:
    """A line of text, and how it looks."""

    text: str
    style: Style

    @property
    def width(self) -> float:
        """In pixels, about."""
        return cell_len(self.text) * LETTER[self.style]


def clean(text: object) -> str:
    """The text without what cannot be shown, or not be written in XML."""
    found = printable(str(text))
    for letter in NO_SPACE:
        found = found.replace(letter, repr(letter)[1:-1])
    return found


def lines_of(facts: Mapping[str, Any], frame: Mapping[str, Any]) -> list[Line]:
    """The lines in a box.

    Args:
        facts: the attributes of the node.
        frame: those of the frame that it is in.
    """
    lines = [Line(name_of(facts, frame), "name")]
    if facts["kind"] in LAYERS and "d_model" in facts:
        words = layer_words(facts)
        words[0] = words[0].removeprefix(f"{lines[0].text}: ")
        lines += [Line(text, "fact") for text in words]
        path = _cut(facts["pattern"])
        lines += [Line(path, "path")] if path and path != lines[0].text else []
    elif facts["operations"] > 1 or facts["kind"] == "module":
        words = [f"{facts['operations']} operation{'s' if facts['operations'] > 1 else ''}"]
        if facts["kind"] == "operations" and lines[0].text != _cut(facts["ops"]):
            words[0] += " of its own"
        words += [f"{short(facts['weights'])} weights"] if "weights" in facts else []
        lines.append(Line(", ".join(words), "fact"))
    elif "outside" in facts:
        place = _within(facts["path"], frame)
        lines += [Line(_cut(place), "path")] if place else []
        lines += [Line(_shape(facts), "fact")] if "shape" in facts else []
    elif facts["kind"] == "input" and "shape" in facts:
        lines.append(Line(_shape(facts), "fact"))
    if "miss" in facts:
        for reason in clean(facts["miss"]).splitlines()[:2]:
            wrapped = textwrap.wrap(f"no FFN: {reason}", LONGEST, max_lines=MOST_LINES)
            lines += [Line(text, "miss") for text in wrapped]
    return lines


def name_of(facts: Mapping[str, Any], frame: Mapping[str, Any]) -> str:
    """What a box is called: its module within the frame, or what it runs."""
    if facts["kind"] in ("input", "output") or "outside" in facts:
        name = facts["ops"]
    elif facts["kind"] == "operations":
        several = len(facts["ops"]) > LONGEST // 2
        name = _within(facts["path"], frame) or "between" if several else facts["ops"]
    else:
        name = _within(facts["path"], frame) or LAYERS.get(facts["kind"], "the model")
    inner = facts["count"] // frame.get("count", 1)
    return _cut(name) + (f"  {TIMES} {inner}" if inner > 1 else "")


def layer_words(facts: Mapping[str, Any]) -> list[str]:
    """What an FFN or an MoE layer is, in one or two lines."""
    kind = LAYERS[facts["kind"]]
    if facts["kind"] == "moe":
        shared = f", {facts['shared']} shared neurons" if facts.get("shared") else ""
        top = f"top {facts['top_k']}, " if "top_k" in facts else ""
        first = f"{kind}: {facts['num_experts']} experts of {facts['width']} neurons{shared}"
        return [first, _cut(f"{top}router: {facts['router']}")]
    several = f"{facts['expansions']} {TIMES} " if facts["expansions"] > 1 else ""
    widths = f"{facts['d_model']} → {several}{facts['d_ff']} → {facts['d_out']}"
    return [f"{kind}: {widths}, {clean(facts['activation'])}"]


def title_of(facts: Mapping[str, Any]) -> str:
    """All that is known of a box, one fact for each line."""
    lines = layer_words(facts) if "d_model" in facts else []
    lines += [
        f"{words}: {clean(facts[name])}"
        for name, words in FACTS.items()
        if name in facts and facts[name] not in ("", 1)
    ]
    return "\n".join(lines)


def frame_words(facts: Mapping[str, Any], outer: Mapping[str, Any]) -> list[Line]:
    """The title of a frame, which may be in an `outer` one."""
    several = f"  {TIMES} {facts['times']}" if facts["times"] > 1 else ""
    name = _within(facts["title"], {"path": outer.get("title", "")}) or LAYERS[facts["kind"]]
    lines = [Line(_cut(name, 2 * LONGEST) + several, "name")]
    return lines + [Line(text, "fact") for text in (layer_words(facts) if "kind" in facts else ())]


def _shape(facts: Mapping[str, Any]) -> str:
    return clean(f"{facts['shape'].replace('x', f' {TIMES} ')} {facts['dtype']}")


def _within(path: str, frame: Mapping[str, Any]) -> str:
    """The path, from that of the frame on."""
    outer = frame.get("path", "")
    if outer and (path == outer or path.startswith(f"{outer}.")):
        return path[len(outer) :].lstrip(".")
    return path


def _cut(text: object, most: int = LONGEST) -> str:
    """The text with its middle left out if it is long: both ends of a path matter."""
    found = clean(text).replace("\n", " ")
    if len(found) <= most:
        return found
    return f"{found[: most // 2 - 1]}…{found[-(most // 2) :]}"
