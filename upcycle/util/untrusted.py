"""What a file says is data: the rules for the files of others, which docs/security.md explains.

- A path in a file does not lead out of the directory of the file.
- A link is followed within its directory, and from a hub cache into the ``blobs`` of that model,
  or into those that the models of the cache share.
- A text of a file is shown without control characters; it is never a format, a name to import or
  to call.
"""

import re
import unicodedata
from pathlib import Path

from upcycle.errors import UsageError

_READ = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".py")
_SHARED_BLOBS = ".huggingface-shared-blobs"
_SHOWN = "\n\t"
_REORDERS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def inside(directory: Path, name: str, named_in: str) -> Path:
    """The file or folder of `directory` that a file there names.

    Args:
        directory: it may not be left.
        name: as the file has it.
        named_in: the file, for the message.

    Raises:
        UsageError: the name is absolute, has ``..``, or leads out by a link.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name or not path.parts:
        raise UsageError(
            f"{directory / named_in}: it names {name!r}, which is not in its directory; remove "
            "that, or copy the model again"
        )
    return without_escape(directory / path, directory)


def without_escape(path: Path, directory: Path) -> Path:
    """`path`, which is in `directory`, unless a link leads out of it.

    In a hub cache, ``snapshots/REVISION`` has links into the ``blobs`` beside ``snapshots``, and
    those may lead into the ``blobs`` of the whole cache, which a file marks as such.

    Raises:
        UsageError: it does.
    """
    real, home = path.resolve(), directory.resolve()
    models = [up.parent for up in home.parents if up.name == "snapshots"][:1]
    allowed = [home, *(model / "blobs" for model in models)]
    shared = [model.parent / "blobs" for model in models]
    allowed += [blobs for blobs in shared if (blobs / _SHARED_BLOBS).is_file()]
    if not any(real.is_relative_to(place) for place in allowed):
        raise UsageError(
            f"{path}: a link that leads out of its directory, to {real}; copy the file there, or "
            "remove the link"
        )
    return path


def check_links(directory: Path) -> None:
    """Raise UsageError for a file of a model that is a link out of its directory."""
    for path in directory.iterdir():
        if path.is_symlink() and path.suffix in _READ:
            without_escape(path, directory)


def names_code(name: str) -> bool:
    """Whether a model is named as ``package.module:callable``, which only a person may do."""
    is_data = name.startswith("sample:") or name.endswith(".gguf") or Path(name).exists()
    return ":" in name and not is_data


def untrusted_code(directory: Path, what: str, error: Exception) -> UsageError | None:
    """What to raise if transformers ended with `error` because code of `directory` would run."""
    if "trust_remote_code" not in str(error):
        return None
    return UsageError(
        f"{directory}: {what} brings its own Python code; pass `trust_remote_code=True` if you "
        "have read it and trust it"
    )


def printable(text: str) -> str:
    """`text` with control characters, and those that reorder it, as escapes."""

    def harmless(character: str) -> str:
        hidden = unicodedata.category(character) in ("Cc", "Cs") and character not in _SHOWN
        return repr(character)[1:-1] if hidden or _REORDERS.match(character) else character

    return text if text.isprintable() else "".join(map(harmless, text))
