"""What the card of a dense model says to the hub, and that of its conversion repeats."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from upcycle.ir.report import Published
from upcycle.models import samples

MOST_BYTES = 2**16  # of a card that are looked at; the front matter is at its start
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?")
_MOST_LANGUAGES = 200


def published(name: str, directory: Path | None) -> Published | None:
    """Licence, languages and task of a dense model, as far as its card has them.

    What does not look like one is left out: a card is a file of somebody else.
    """
    if name.startswith(samples.PREFIX):
        return Published(license=samples.licence(name))
    if directory is None:
        return None
    path = directory / "README.md"
    data = _front_matter(path) if path.is_file() else {}
    found = Published(
        license=_word(data.get("license")),
        languages=_languages(data.get("language")),
        pipeline_tag=_word(data.get("pipeline_tag")),
    )
    return found if found != Published() else None


def _front_matter(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        text = file.read(MOST_BYTES).decode("utf-8", errors="replace")
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", text, flags=re.S)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _languages(value: object) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    codes = ("no" if code is False else code for code in listed[:_MOST_LANGUAGES])  # Norwegian
    return tuple(code for code in codes if isinstance(code, str) and _LANGUAGE.fullmatch(code))
