"""The errors of upcycle, and the exit code of the command line for each.

    UpcycleError                 any failure with a sentence for the user
    |-- UsageError          2    an argument, a path or an option is wrong
    |   `-- RecipeError     2    the recipe file is wrong: file, line, column, nearest key
    |       `-- PlanError   2    the recipe asks for a layer that an FFN of the model cannot become
    |-- VerificationError   3    the result is further from the dense model than promised
    |-- UnsupportedError    4    the model or the target cannot hold what was asked for
    |   `-- CaptureError    4    the model could not be run on example inputs
    |       `-- ValueNeededError   what it does depends on values that only a real run has
    `-- ResourceError       5    disk or memory is too small

Each message is one sentence that says what is wrong, where, and what to do.
"""

import textwrap


class UpcycleError(Exception):
    """Base of every error that upcycle raises on purpose; ``str()`` is the sentence to print."""

    exit_code = 2


class UsageError(UpcycleError):
    """An argument, a path or an option is wrong."""


class RecipeError(UsageError):
    """A recipe is not valid; the message has one line per problem."""


class PlanError(RecipeError):
    """A dense FFN cannot become the MoE layer that the recipe asks for; another recipe can do."""

    def __init__(self, problem: str, *, site: str) -> None:
        super().__init__(f"{site or 'the model itself'}: {problem}")
        self.site = site


class VerificationError(UpcycleError):
    """The converted model is further from the dense one than the recipe promises."""

    exit_code = 3


class UnsupportedError(UpcycleError):
    """The model, or the target, cannot hold what was asked for."""

    exit_code = 4


class CaptureError(UnsupportedError):
    """The model could not be run on example inputs, so no graph was recorded."""


class ValueNeededError(CaptureError):
    """The model ran on example inputs, until it asked for a value that depends on its weights."""


class ResourceError(UpcycleError):
    """Disk or memory is too small for the conversion."""

    exit_code = 5


def one_line(error: BaseException) -> str:
    """The words of an error on one line, cut after about 300 characters."""
    text = textwrap.shorten(" ".join(str(error).split()), 300, placeholder=" ...")
    name = type(error).__name__
    return f"{name} {text}" if isinstance(error, KeyError) else text or name


def first_line(error: BaseException) -> str:
    """The first line of the words of an error, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: BaseException) -> str:
    """The first line of the error that was first in a chain."""
    while behind := error.__cause__ or error.__context__:
        error = behind
    return first_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch ran out; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "DefaultCPUAllocator" in str(error)


def has_a_sentence(error: Exception) -> bool:
    """Whether the command line words this failure itself: ours, no memory, or one of the system."""
    is_of_system = getattr(error, "errno", None) is not None
    return isinstance(error, UpcycleError) or is_out_of_memory(error) or is_of_system
