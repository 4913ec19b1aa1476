"""The named model, dense or a mixture of experts, as `upcycle.drawing` needs it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from upcycle.capture.recorder import Program
from upcycle.cli import inspection
from upcycle.drawing.layers import Facts, moe_facts
from upcycle.drawing.origins import origin_facts
from upcycle.errors import UsageError
from upcycle.ir.ffn import Located
from upcycle.models.dense import Source
from upcycle.models.named import open_model
from upcycle.models.onnx_file import OnnxSource, open_onnx
from upcycle.passes.locate.locate import captured_and_located
from upcycle.targets.load import skeleton_of
from upcycle.targets.onnx.file_names import FILES
from upcycle.targets.provenance_file import FILE, read_origins
from upcycle.util.named_callable import inputs_named
from upcycle.util.progress import Progress


@dataclass(frozen=True)
class Pictured:
    """What was recorded of a model, what was found in it, its MoE layers, and what it is called."""

    program: Program
    located: Located
    moe: Mapping[str, Facts]
    title: str


def pictured(
    model: str, *, inputs: str | None, trust_remote_code: bool, progress: Progress
) -> Pictured:
    """Capture the model that MODEL names; no weight is read where a configuration is enough.

    Raises:
        UsageError: there is no such model, or its code is not at hand.
        CaptureError: it could not be run on example inputs.
    """
    directory = inspection.directory_of(Path(model))
    if inspection.is_converted(directory) or inspection.is_moe(directory):
        if (directory / "config.json").is_file():
            skeleton = skeleton_of(directory, trust_remote_code=trust_remote_code)
            program, located = captured_and_located(skeleton, inputs_named(inputs))
            return Pictured(program, located, moe_facts(skeleton), directory.absolute().name)
        return _converted_onnx(directory)
    source = open_model(
        model, inputs=inputs, trust_remote_code=trust_remote_code, progress=progress
    )
    if not isinstance(source, Source):
        return _of_file(source, {})
    skeleton = source.skeleton()
    program, located = captured_and_located(skeleton, source.example)
    return Pictured(program, located, moe_facts(skeleton), source.label)


def _of_file(source: OnnxSource, moe: Mapping[str, Facts]) -> Pictured:
    return Pictured(source.found.program, source.found.located, moe, source.label)


def _converted_onnx(directory: Path) -> Pictured:
    """An ONNX file that was converted from one; its layers are those of ``provenance.json``."""
    files = [directory / name for name in FILES if (directory / name).is_file()]
    if not files:
        raise UsageError(
            f"{directory}: it has the weights of a plain module and not its code; in Python, give "
            "the module that upcycle.load returns to upcycle.graph"
        )
    try:
        moe = {layer["path"]: origin_facts(layer) for layer in read_origins(directory) or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{directory / FILE}: not what this version of upcycle writes; convert the model again"
        ) from error
    return replace(
        _of_file(open_onnx(str(files[0]), None, {}), moe), title=directory.absolute().name
    )
