"""The YAML text of a recipe with other values; its comments stay."""

import re
from collections.abc import Sequence


def with_values(text: str, overrides: Sequence[str]) -> str:
    """A recipe with overrides such as ``"experts.count=4"``."""
    for override in overrides:
        path, _, value = override.partition("=")
        section, _, key = path.partition(".")
        text = with_value(text, section, key, value)
    return text


def with_value(text: str, section: str, key: str, value: str) -> str:
    """A recipe with another value of a key, or with the key; comments stay."""
    head = re.search(rf"^{section}:[^\n]*\n", text, re.MULTILINE)
    if head is None:
        return f"{text.rstrip()}\n{section}:\n  {key}: {value}\n"
    end = re.search(r"^\S", text[head.end() :], re.MULTILINE)
    stop = head.end() + end.start() if end else len(text)
    body, count = re.subn(
        rf"^(  {key}: *)([^#\n]*?)( *#[^\n]*)?$",
        lambda match: f"{match[1]}{value}{match[3] or ''}",
        text[head.end() : stop],
        count=1,
        flags=re.MULTILINE,
    )
    if not count:
        body = f"  {key}: {value}\n{body}"
    return text[: head.end()] + body + text[stop:]
