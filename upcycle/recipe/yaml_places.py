"""YAML as plain data that remembers the line and column of every key and value.

Scalars are read by the core schema of YAML 1.2, so ``1e-5`` is a number and ``no`` is text. Anchors
and tags are refused: a recipe needs neither, and without them a file is what it looks like.
"""

# ruamel.yaml has places, too, but saves little: most of this lists mistakes and serves --set.

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
_MARKS = tuple("*&!%@`")  # what begins with one is something else in YAML
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold
COMMAND_LINE = sys.maxsize  # line number of a place on the command line: after every file


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written; places sort in reading order, the command line last."""

    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Problem:
    """One mistake: its place, the dotted key it belongs to ("" for the file), and a sentence."""

    place: Place
    key: str
    sentence: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.sentence) if part)


@dataclass
class Document:
    """What was read.

    Attributes:
        name: of the file, as it is shown.
        data: dicts with text keys, lists, text, numbers, booleans and None.
        keys, values: the place of each key and of each value; the root is ``()``.
        problems: mistakes in the YAML itself.
    """

    name: str
    data: Any = None
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath, *, of_key: bool = False) -> Place:
        """Where `path`, or the innermost part of it that was written, stands."""
        places = self.keys if of_key else self.values
        while path and path not in places:
            path = path[:-1]
        return places.get(path, self.at(1, 1))

    def at(self, line: int, column: int) -> Place:
        """A place in the file; both numbers count from one."""
        return Place(line, column, f"{self.name}:{line}:{column}")

    def mark(self, mark: yaml.Mark) -> Place:
        """The place of a mark of PyYAML, which counts from zero."""
        return self.at(mark.line + 1, mark.column + 1)

    def report(self, place: Place, path: KeyPath, sentence: str) -> None:
        """Add a problem with the key `path`."""
        self.problems.append(Problem(place, dotted(path), sentence))


def read_yaml(text: str, name: str) -> Document:
    """Read one YAML document; mistakes are listed in ``problems`` and never raised."""
    document = Document(name)
    try:
        node = _Loader(text).get_single_node()
        document.data = _value(node, (), document) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = document.mark(mark) if mark else document.place(())
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        document.report(place, (), f"this is not YAML: {reason}")
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = document.at(before.count("\n") + 1, len(before) - before.rfind("\n"))
        document.report(place, (), "this character is not allowed in YAML")
    except RecursionError:
        document.report(document.place(()), (), "this is nested too deeply")
    return document


def set_value(document: Document, path: KeyPath, text: str, place: Place) -> None:
    """Write the YAML value `text` at `path`, over what the file says there.

    Missing sections on the way are made. Everything at or below `path` then has the place `place`.
    """
    inner = read_yaml(text, str(place))
    if inner.problems:
        hint = f"; quote it: '{dotted(path)}=\"{text}\"'" if text[:1] in _MARKS else ""
        document.report(place, path, f"{text!r} is not a YAML value{hint}")
        return
    section = document.data
    for depth, key in enumerate(path[:-1], start=1):
        if not isinstance(section.get(key), dict):
            section[key] = {}
            _forget(document, path[:depth])
            document.keys[path[:depth]] = document.values[path[:depth]] = place
        section = section[key]
    section[path[-1]] = inner.data
    _forget(document, path)
    document.keys[path] = document.values[path] = place


def dotted(path: KeyPath) -> str:
    """``("experts", "count")`` as the user writes it: ``experts.count``."""
    return ".".join(str(part) for part in path)


def _forget(document: Document, path: KeyPath) -> None:
    for places in (document.keys, document.values):
        for stale in [p for p in places if p[: len(path)] == path]:
            del places[stale]


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with the scalars of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML types it as it does

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose as usual, but refuse an alias, which could also be endless."""
        if self.check_event(yaml.AliasEvent):
            mark: Any = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="a recipe has no aliases", problem_mark=mark)
        return super().compose_node(parent, index)


_TAG = "tag:yaml.org,2002:"
_NUMBERS = list("-+.0123456789")
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", _NUMBERS),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", _NUMBERS),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    _TAG + "str": str,
}


def _value(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    place = document.values[path] = document.mark(node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, i), document) for i, item in enumerate(node.value)]
    if _SURROGATE.search(node.value):
        document.report(place, path, "this character is not allowed in YAML")
        return None
    try:
        return _SCALARS[node.tag](node.value)
    except (KeyError, ValueError):
        sentence = f"{node.value!r} cannot be read as {node.tag}; leave the tag out"
        document.report(place, path, sentence)
        return None


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = document.mark(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode) or _SURROGATE.search(key_node.value):
            document.report(place, path, "a key must be a word")
            continue
        here = (*path, key_node.value)
        if key_node.value in data:
            first = document.keys[here].line
            sentence = f"this key was given before, on line {first}; remove one of the two"
            document.report(place, here, sentence)
            continue
        document.keys[here] = place
        data[key_node.value] = _value(value_node, here, document)
    return data
