"""Names that other packages add to: what is built in, registered by a call, or an entry point.

An entry point is loaded when its name is looked up, and not before: to list the names reads the
metadata of installed packages alone. Loading imports the package, which registers the name.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from upcycle.errors import UsageError, one_line

T = TypeVar("T")
log = logging.getLogger(__name__)


@cache
def installed(group: str) -> dict[str, list[EntryPoint]]:
    """The entry points of a group, by name; of a name that several packages have, all."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        if point not in found.setdefault(point.name, []):
            found[point.name].append(point)
    return found


def load_installed(group: str, name: str) -> bool:
    """Import the installed package that brings `name`; False if none does.

    Raises:
        UsageError: the import fails, and the message names the package and the entry point; or
            two packages bring it.
    """
    points = installed(group).get(name)
    if points is None:
        return False
    point, *others = points
    if others:
        raise UsageError(f"`{name}`: {described(point)}, and {described(others[0])}; remove one")
    try:
        point.load()
    except Exception as error:  # code of others may fail in any way
        raise UsageError(
            f"{described(point)} cannot be loaded: {type(error).__name__}: {one_line(error)}; "
            "repair or remove that package"
        ) from error
    return True


def described(point: EntryPoint) -> str:
    """Which package an entry point is of, in the words of its author."""
    package = "an installed package" if point.dist is None else f"the package {point.dist.name}"
    return f"{package}: its entry point `{point.name} = {point.value}` of {point.group}"


def place_of(function: Any) -> str:
    """``module:qualname`` of a function, or of what has no such name its type's."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


@dataclass
class Registry(Generic[T], Mapping[str, T]):
    """Name -> entry; those built in, and those that were registered or loaded.

    Attributes:
        what: what an entry is, in messages.
        group: of entry points.
        reserved: the names that are built in, which no other entry may have.
        adapt: name, what was given in the place of a name -> the entry.
    """

    what: str
    group: str
    reserved: tuple[str, ...]
    adapt: Callable[[str, Any], T] = lambda name, given: given
    _entries: dict[str, Any] = field(default_factory=dict)
    _places: dict[str, str] = field(default_factory=dict)
    _given: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries and not self._load(name):
            raise KeyError(name)
        entry = self._entries[name]
        return self.adapt(name, entry) if name in self._given else entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def build_in(self, entries: Iterable[tuple[str, T]]) -> None:
        """Put in place what belongs to the names that are `reserved`."""
        self._entries |= dict(entries)

    def register(self, name: str, entry: T, origin: Callable[..., Any]) -> None:
        """Add an entry, which was made of the function `origin`.

        A function that is defined again, as in a notebook, takes its own place.

        Raises:
            UsageError: the name is taken, or is none.
        """
        if not name.isidentifier():
            raise UsageError(f"{name!r} is no name for {self.what}; use letters, digits and _")
        place = place_of(origin)
        if name in self.reserved:
            raise UsageError(f"`{name}`: {self.what} of this name is built in; take another name")
        before = self._places.get(name)
        if before is not None and (before != place or "<lambda>" in place):
            raise UsageError(
                f"`{name}`: {self.what} of this name is registered by {before}; take another name"
            )
        self._entries[name], self._places[name] = entry, place

    def hold(self, given: Any) -> str:
        """Keep what was given in the place of a name; returns its ``module:qualname`` as the name.

        No file finds it by that. A second function of one name gets a number.
        """
        place = place_of(getattr(given, "build", given))
        name, number = place, 1
        while name in self._entries and self._entries[name] is not given:
            number += 1
            name = f"{place} ({number})"
        self._entries[name] = given
        self._given.add(name)
        return name

    def names(self) -> list[str]:
        """Those built in, then the others, sorted; nothing is loaded."""
        points = installed(self.group)
        for name in set(points).intersection(self.reserved):
            log.warning("%s is not used: upcycle has that name itself", described(points[name][0]))
        others = set(self._places) | set(points)
        return [*self.reserved, *sorted(others.difference(self.reserved))]

    def knows(self, name: str) -> bool:
        """Whether the name is of an entry that can be had now; loads it if it is installed."""
        return name in self.reserved or name in self._entries or self._load(name)

    def unknown(self, name: str) -> str:
        """The sentence for a name that is not `known`."""
        if ":" in name:
            return (
                f"`{name}` is a Python function, which is never looked up by its name; pass the "
                f"function itself in Python, or register it as {self.what} and use that name"
            )
        names = self.names()
        others = names[len(self.reserved) :]
        more = f"; installed or registered: {', '.join(others)}" if others else ""
        nearest = get_close_matches(name, names, n=1)
        guess = f"; did you mean {nearest[0]}?" if nearest else ""
        known = ", ".join(self.reserved)
        shown = json.dumps(name[:40], ensure_ascii=False)
        return f"must be one of {known}{more}, not {shown}{guess}"

    def _load(self, name: str) -> bool:
        if name in self.reserved or not load_installed(self.group, name):
            return False
        if name not in self._entries:
            (point,) = installed(self.group)[name]
            raise UsageError(
                f"{described(point)} was imported and registers no {name!r}; it has to call the "
                f"function of upcycle that registers {self.what}"
            )
        return True
