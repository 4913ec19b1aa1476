"""A text file at a place that the user names."""

from pathlib import Path

from upcycle.errors import UsageError


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`; directories above it are made.

    Raises:
        UsageError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = f"it cannot be written ({error.strerror}); choose another `out`"
        raise UsageError(f"{path}: {reason}") from error
