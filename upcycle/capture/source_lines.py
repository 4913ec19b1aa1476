"""Which lines of a model's own code run, or were passed by an error."""

import linecache
import re
import sys
import traceback
import types
from pathlib import Path


def asserted(caller: types.FrameType, call: str) -> bool | None:
    """What the value must be that an assertion of the model reads by `call`; it is to hold."""
    if caller.f_code.co_name == "_check_tensor_all_with":
        return True
    if call != "bool":
        return None
    line = linecache.getline(caller.f_code.co_filename, caller.f_lineno)
    found = re.match(r"\s*assert\s+(not\s+)?(?!.*\b(and|or)\b)", line)
    return None if found is None else found[1] is None


def source_here() -> str:
    """The innermost line of the model's own code that is running: not torch's, not ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "functional_call":
        if _is_of_model(frame):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def source_of(error: BaseException) -> str:
    """The innermost line of the model's own code where `error` was raised; empty if in none."""
    lines = [f"{Path(file).name}:{line}" for file, line in _passed(error)]
    return lines[0] if lines else ""


def words_of(error: BaseException) -> list[set[str]]:
    """The words of the lines of the model's own code that `error` passed, the innermost first."""
    return [set(re.findall(r"\w+", linecache.getline(*place))) for place in _passed(error)]


def _passed(error: BaseException) -> list[tuple[str, int]]:
    """File and line of the model's own code that `error` passed, the innermost first."""
    places = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_of_model(frame)
    ]
    return places[::-1]


def _is_of_model(frame: types.FrameType) -> bool:
    package: str = frame.f_globals.get("__name__", "").partition(".")[0]
    return package not in {"torch", "upcycle"}
