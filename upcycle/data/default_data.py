"""What calibration and verification read where the user gives no data."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from upcycle.data.calibration_files import CalibrationInput

EXAMPLE = "the given inputs, on which it is verified, too"
RANDOM = "random inputs, so the numbers mean little: give data with `calibration`"
_PAGE = 4000  # characters


def for_calibration(given: CalibrationInput | None, *, with_code: bool) -> CalibrationInput:
    """What verification does not read: of `given`, or else of Python's documentation and code."""
    if given is not None:
        return given.parts()[1]
    if with_code:
        what = "the documentation and the source code of Python"
        return CalibrationInput(what, texts=(mixed_calibration_text(),))
    return CalibrationInput("the documentation of Python", texts=(calibration_text(),))


def default_text() -> str:
    """English text that every Python has: the help topics of pydoc, about 465,000 characters.

    It differs between versions of Python, so results on it are compared within one version.
    """
    return "\n\n".join(topics[key] for key in sorted(topics))


def verification_text() -> str:
    """The first quarter of `default_text`: what a conversion is verified on."""
    text = default_text()
    return text[: len(text) // 4]


def calibration_text() -> str:
    """The rest of `default_text`, which verification does not read."""
    return default_text()[len(verification_text()) :]


def library_source(*, held_out: bool) -> str:
    """Source of the standard library's modules: every fourth one by name, or all the others."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [path for i, path in enumerate(files) if (i % 4 == 3) == held_out]
    return "\n\n".join(path.read_text("utf-8") for path in chosen)


def mixed_calibration_text() -> str:
    """`calibration_text` and source code in turn, a page of each: what language models are shown.

    Fitted to one kind of text alone, a model without training loses more on every other kind.
    """
    kinds = (calibration_text(), library_source(held_out=False))
    pages = ([text[i : i + _PAGE] for i in range(0, len(text), _PAGE)] for text in kinds)
    return "\n\n".join(page for pair in zip(*pages, strict=False) for page in pair)
