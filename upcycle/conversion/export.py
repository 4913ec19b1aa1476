"""Write a mixture of experts that is there already, trained or not, in another format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.exports import gguf, native, pt2
from upcycle.conversion.exports import onnx as to_onnx
from upcycle.conversion.exports.task import Exported, Task
from upcycle.data.verification_inputs import evaluation_for
from upcycle.errors import UsageError
from upcycle.models.moe_layers import moe_layers
from upcycle.recipe.onnx import ONNX_DEFAULTS, Onnx
from upcycle.targets.files.staging import check_output, staged
from upcycle.targets.gguf.write import GgufType
from upcycle.targets.load import load
from upcycle.targets.traced.experts import Form
from upcycle.util.progress import Progress, silent, step
from upcycle.verification.checks import raise_if_any_failed

ExportTarget = Literal["onnx", "native", "gguf", "pt2"]


def export(
    directory: str | Path,
    out: str | Path,
    *,
    target: ExportTarget = "onnx",
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    onnx: Onnx = ONNX_DEFAULTS,
    architecture: str | None = None,
    runtimes: Sequence[str] = (),
    gguf_type: GgufType | None = None,
    pt2_form: Form | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Exported:
    """Write an MoE model in another format, and compare what was written with it.

    The weights are taken as they are: trained, merged, pruned, or made by another program.

    Args:
        directory: what ``upcycle convert`` or ``save_pretrained`` wrote, of a converted model or of
            an MoE architecture of transformers.
        out: the new directory, beside whose place it is written first.
        target: ``onnx``, a file for ONNX Runtime; ``native``, a checkpoint in an MoE architecture
            of transformers, from one with code of ours; ``gguf``, a file for llama.cpp, from one in
            such an architecture, with its tokenizer; ``pt2``, a program of `torch.export`.
        model: for a plain module: a dense instance, as `upcycle.load` takes it.
        example_inputs: inputs of the model, where they cannot be guessed.
        onnx: the section `onnx` of a recipe.
        architecture: for `native`, the architecture to write; by default what fits.
        runtimes: for `native`, what has to run it: transformers, vllm, llama.cpp, ...
        gguf_type: of the weights of `gguf`, as llama.cpp names it: f32, f16, bf16, q8_0; None is
            that of the model.
        pt2_form: of the layers in a program, ``portable`` or ``fused``, see
            `upcycle.targets.pt2.export`; None is the first.
        overwrite: replace `out` if it exists.
        trust_remote_code: run Python code of the directory.
        verify: load or run what was written, and compare.
        progress: called as each stage begins and ends.

    Raises:
        UsageError: there is no such model, or it is dense.
        UnsupportedError: the target cannot hold it; the reason is that of the trained weights, so
            what holds for copies alone does not count.
        VerificationError: what was written is not the model.
    """
    directory, out = Path(directory), Path(out)
    if target not in get_args(ExportTarget):
        raise UsageError(f"`target={target}`: choose from {', '.join(get_args(ExportTarget))}")
    given: dict[str, dict[str, str | None]] = {
        "native": {"architecture": architecture, "runtimes": ", ".join(runtimes) or None},
        "onnx": {"overrides": None if onnx == ONNX_DEFAULTS else "onnx"},
        "gguf": {"gguf_type": gguf_type},
        "pt2": {"pt2_form": pt2_form},
    }
    for of, options in given.items():
        for name, value in options.items():
            if value is not None and of != target:
                raise UsageError(f"`{name}={value}`: it is for `target={of}`; leave it out")
    if gguf_type not in (None, *get_args(GgufType)):
        known = ", ".join(get_args(GgufType))
        raise UsageError(f"`gguf_type={gguf_type}`: choose from {known}")
    if pt2_form not in (None, *get_args(Form)):
        raise UsageError(f"`pt2_form={pt2_form}`: choose from {', '.join(get_args(Form))}")
    check_output(out, overwrite=overwrite, protect=[directory])
    with step(progress, "loading"):
        loaded = load(directory, model, trust_remote_code=trust_remote_code)
    if not moe_layers(loaded):
        raise UsageError(
            f"{directory}: no layer of it is a mixture of experts that is known here; convert a "
            "dense model with `upcycle convert`"
        )
    evaluation = evaluation_for(
        loaded,
        directory=directory,
        trust_remote_code=trust_remote_code,
        example=example_inputs,
    )
    with staged(out, overwrite=overwrite, protect=[directory]) as folder:
        task = Task(directory, folder, loaded, evaluation, trust_remote_code, verify, progress)
        if target == "onnx":
            done = to_onnx.write(task, onnx)
        elif target == "native":
            done = native.write(task, architecture, runtimes)
        elif target == "pt2":
            done = pt2.write(task, pt2_form or "portable")
        else:
            done = gguf.write(task, gguf_type)
        raise_if_any_failed(done.checks)
    return done
