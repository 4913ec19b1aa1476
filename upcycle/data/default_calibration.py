"""What calibration reads where the user gives no data."""

from upcycle.data.calibration_files import CalibrationInput
from upcycle.models import samples

EXAMPLE = "the given inputs, on which it is verified, too"
RANDOM = "random inputs, which stand for nothing: give data with --calibration"


def for_calibration(given: CalibrationInput | None, *, with_code: bool) -> CalibrationInput:
    """What verification does not read: of `given`, or else of the documentation of Python.

    The latter in turn with its source code, if wanted.
    """
    if given is not None:
        return given.parts()[1]
    if with_code:
        what = "the documentation and the source code of Python"
        return CalibrationInput(what, texts=(samples.mixed_calibration_text(),))
    return CalibrationInput("the documentation of Python", texts=(samples.calibration_text(),))
