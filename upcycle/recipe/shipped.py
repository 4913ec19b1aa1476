"""The recipes that come with upcycle: their names, their text, and the paper behind each.

The leading comment of such a file says what the result is; its last line is the paper, as
``AUTHORS, "PAPER", YEAR, URL``. This module imports no torch.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from itertools import takewhile

from upcycle.errors import RecipeError

_PAPER = re.compile(
    r'(?P<authors>[^"]+), "(?P<paper>[^"]+)", (?P<year>\d{4}), (?P<url>https://\S+)'
)


@dataclass(frozen=True)
class Description:
    """What the leading comment of a shipped recipe says; `title` is its first line."""

    name: str
    title: str
    authors: str
    paper: str
    year: int
    url: str


def recipe_names() -> list[str]:
    """The names of the shipped recipes, sorted."""
    found = (file.name for file in files("upcycle.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, comments included."""
    names = recipe_names()
    if name not in names:
        nearest = get_close_matches(name, names, n=1)
        guess = f", did you mean {nearest[0]}?" if nearest else ";"
        raise RecipeError(
            f"{name}: unknown recipe{guess} the shipped ones are {', '.join(names)}, "
            "and your own is given as the path of a .yaml file"
        )
    return (files("upcycle.recipes") / f"{name}.yaml").read_text("utf-8")


def describe(name: str) -> Description:
    """What a shipped recipe does and which paper it follows."""
    leading = takewhile(lambda line: line.startswith("#"), recipe_text(name).splitlines())
    comment = [line.removeprefix("#").strip() for line in leading]
    match = _PAPER.fullmatch(comment[-1]) if len(comment) > 1 else None
    if match is None:
        raise RecipeError(
            f"{name}.yaml: the leading comment must say in its first line what the result is, and "
            'in its last one the paper, as AUTHORS, "PAPER", YEAR, URL'
        )
    authors, paper, year, url = match.groups()
    return Description(name, comment[0], authors, paper, int(year), url)
