"""The directory with a mixture of experts that some commands want in the place of a model."""

from pathlib import Path

from upcycle.cli import inspection
from upcycle.errors import UsageError


def check_mixture(directory: Path) -> None:
    """Refuse what is no such directory, before anything is loaded.

    Raises:
        UsageError: it is not there, or its model is dense.
    """
    name = str(directory)
    has_config = (directory / "config.json").is_file()
    if directory.is_dir() and (inspection.is_moe(directory) or not has_config):
        return  # without a configuration loading says what is missing
    wanted = "this command wants a directory with a mixture of experts"
    made = "`upcycle convert {} --recipe NAME --out DIR` makes one"
    if directory.is_dir():
        raise UsageError(f"{name}: it is a dense model, and {wanted}; {made.format(name)}")
    if directory.is_file() and inspection.is_moe(directory.parent):
        raise UsageError(f"{name}: {wanted}, and this is a file; give {directory.parent}")
    is_model = directory.is_file() or ":" in name or name.count("/") == 1
    of_hub = f", and `hf download {name} --local-dir DIR` fetches one of the hub"
    raise UsageError(
        f"{name}: there is no such directory, and {wanted}; "
        f"{made.format(name if is_model else 'MODEL')}"
        + (of_hub if is_model and "/" in name and ":" not in name else "")
    )
