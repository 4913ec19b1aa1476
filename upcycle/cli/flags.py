"""Sentences of the library name arguments of Python; the command line shows its own flags.

The library writes an argument in backticks, with or without its value: `` `targets=onnx` `` is
``--target onnx`` here, and `` `stream=False` `` is ``--no-stream``.
"""

import re

# Arguments whose flag has another name. All others are the same, with dashes.
FLAGS = {
    "example_inputs": "--inputs module:callable",
    "field": "--text-field",
    "overrides": "--set",
    "runtimes": "--runtime",
    "sources": "--source",
    "targets": "--target",
}
SAME = (
    *(
        "against",
        "allow_pickle",
        "architecture",
        "around",
        "calibration",
        "data",
        "device",
        "dtype",
        "engine",
    ),
    *(
        "executor",
        "fresh",
        "gguf_type",
        "goal",
        "jobs",
        "out",
        "overwrite",
        "pt2_form",
        "resume",
        "stream",
    ),
    *("target", "trust_remote_code", "verify"),
)
ARGUMENT = re.compile(rf"`({'|'.join([*FLAGS, *SAME])})(?:=([^`]*))?`")


def with_flags(sentence: str) -> str:
    """`sentence` with every argument of Python that it names as a flag."""
    return ARGUMENT.sub(_flag, sentence)


def _flag(match: re.Match[str]) -> str:
    name, value = match.groups()
    flag = FLAGS.get(name, "--" + name.replace("_", "-"))
    if value == "False":
        return flag.replace("--", "--no-", 1)
    return flag if value in (None, "True") else f"{flag} {value}"
