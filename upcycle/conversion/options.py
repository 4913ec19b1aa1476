"""How a conversion is run and written; what the result is, the recipe says."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from upcycle.conversion.passes import UNWATCHED, Watch
from upcycle.conversion.workers import HERE, Workers, check_workers
from upcycle.errors import UsageError
from upcycle.targets.files.tensor_file import MAX_SHARD_SIZE

TARGETS = ("safetensors", "onnx", "pt2")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The ways of a conversion.

    Those that `Conversion.save` takes, too, are described there.

    Attributes:
        calibration: files with data for recipes that need some.
        text_field: of a record of them, with the text.
        stream: convert piece by piece; None does so if memory is too small.
        resume: go on with a streamed run that was interrupted.
        fresh: remove what an interrupted run left.
        workers: what makes the layers.
        pt2_form: of the layers in a program, see `upcycle.targets.pt2.export`.
        watch: is told what each pass made.
    """

    targets: Sequence[str] = ("safetensors",)
    runtimes: Sequence[str] = ()
    architecture: str | None = None
    calibration: Sequence[str] = ()
    text_field: str = "text"
    max_shard_size: int = MAX_SHARD_SIZE
    overwrite: bool = False
    verify: bool = True
    stream: bool | None = None
    resume: bool = False
    fresh: bool = False
    workers: Workers = HERE
    pt2_form: Literal["portable", "fused"] = "portable"
    watch: Watch = UNWATCHED


DEFAULTS = Options()


def check_options(options: Options) -> None:
    """Refuse what does not go together, or not on this machine.

    Raises:
        UsageError: it says which, and what to do.
    """
    check_targets(options.targets, verify=options.verify)
    check_workers(options.workers)
    if "onnxruntime" in options.runtimes and "onnx" not in options.targets:
        raise UsageError("`runtimes=onnxruntime`: it runs the file of `targets=onnx`; add that")


def check_targets(targets: Sequence[str], *, verify: bool = False) -> None:
    """Raises UsageError for an unknown target, or one that cannot be verified on this machine."""
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"`targets={target}`: unknown; choose from {', '.join(TARGETS)}")
    if verify and "onnx" in targets and importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(
            "`targets=onnx` is verified with ONNX Runtime, which is not installed: pip install "
            "onnxruntime (with a GPU onnxruntime-gpu, not both), or pass `verify=False`"
        )
