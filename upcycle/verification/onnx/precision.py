"""Verify ONNX files as far as their numbers go: float32, a narrow type, rounded experts."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from upcycle.data.verification_inputs import Evaluation, cast_floats
from upcycle.ir.measured import Check, OnnxFacts, Rounded
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.experts import Experts
from upcycle.models.moe_layers import own_experts
from upcycle.onnx.external_data import stored_bytes
from upcycle.onnx.inputs import draw_inputs
from upcycle.pointwise import Pointwise
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.dtypes import narrowed
from upcycle.targets.onnx.file_names import FILES
from upcycle.targets.onnx.forms.choose import kernel_named
from upcycle.util.modules import set_within
from upcycle.verification.checks import ONNX, check
from upcycle.verification.onnx.files import compare_onnx, onnx_distance, verify_onnx
from upcycle.verification.onnx.matrices import matrices_of, put_matrices, verify_matrices
from upcycle.verification.onnx.rounded_layers import rounded_layers, rounds_tokens
from upcycle.verification.onnx.rounding import verify_rounding
from upcycle.verification.whole_model import compare_models

_NOT_RUN = "ONNX Runtime on a CPU does not compute MoE layers in bfloat16, so the file was not run"


def verify_precision(
    directory: Path, model: nn.Module, evaluation: Evaluation, options: Onnx
) -> tuple[OnnxFacts | None, list[Check]]:
    """Tier T4 for what `write_onnx` made with `options`; facts for the report, and checks.

    - In float32 the files must agree with `model` up to rounding.
    - Where the recipe accepts more, with `model` with the same rounded weights and the same form of
      GELU, unless ONNX Runtime rounds tokens, too; each rounded layer is also compared with what
      rounding may do to it, and each other matrix with the float one. The distance of the files, as
      they will be run, from `model` itself is reported.
    - In float16 they may be twice as far from `model` as `model` in float16 is, in torch.

    Raises:
        VerificationError: ONNX Runtime cannot run a file, or it has other outputs than the model.
    """
    if options.half == "bfloat16":
        return OnnxFacts(not_run=_NOT_RUN), []
    paths = [directory / name for name in FILES if (directory / name).is_file()]
    rows: list[Rounded] = []
    checks: list[Check] = []
    layers = own_experts(model)
    matrices = None
    if options.weights == "int8":
        matrices, checks = verify_matrices(paths, matrices_of(model))
    for path in paths if options.rounds else ():
        of_path, more = verify_rounding(path, layers, draw_inputs(ir.load(path)))
        rows += of_path
        checks += more
    if not rows and matrices is None and options.half is None and options.gelu == "exact":
        return None, verify_onnx(directory, model, evaluation)
    found = compare_onnx(directory, model, evaluation, as_served=True)
    facts = OnnxFacts(
        found.relative,
        tuple(rows) or None,
        matrices=matrices,
        outputs=found,
        bytes=stored_bytes(*paths) if options.rounds else None,
    )
    if options.half is None and any(map(rounds_tokens, paths)):
        return facts, checks
    with _as_written(model, layers, paths):
        if options.half is None:
            return facts, checks + verify_onnx(directory, model, evaluation)
        error = onnx_distance(directory, model, evaluation)
        narrow = narrowed(model, torch.float16)
        narrow.register_forward_pre_hook(_halved, with_kwargs=True)
        noise = compare_models(model, narrow, evaluation, predictions=False).relative
    allowed = max(ROUNDING[torch.float16], 2 * noise)
    return facts, [*checks, check(ONNX, error, allowed)]


def _halved(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """The arguments as the file has them: its float inputs are as narrow as its weights."""
    return cast_floats((args, kwargs), torch.float16)


def kernels_of(path: Path, layers: Collection[str]) -> dict[str, Pointwise]:
    """What the experts compute in those of `layers` that a node of ONNX Runtime runs in a file."""
    nodes = [
        node
        for node in ir.load(path).graph.all_nodes()
        if node.domain == "com.microsoft" and node.op_type in ("MoE", "QMoE")
    ]
    found = {}
    for layer in layers:
        prefix = f"{layer}/" if layer else ""  # as `lower` names what it makes
        for node in nodes:
            if str(node.outputs[0].name).startswith(prefix):
                found[layer] = kernel_named(node.attributes["activation_type"].as_string())[1]
    return found


@contextmanager
def _as_written(
    model: nn.Module, layers: Mapping[str, Experts], paths: Sequence[Path]
) -> Iterator[None]:
    """Within it the model has the weights of the files, and the kernel's form of GELU."""
    with ExitStack() as undo:
        for path in paths:
            put_matrices(undo, path, model)
            for name, pointwise in kernels_of(path, layers).items():
                set_within(undo, layers[name].act_fn, "pointwise", pointwise)
            for rounded in rounded_layers(path):
                experts = layers[rounded.layer]
                up, down = experts.up_EGD, experts.down_proj
                set_within(undo, up, "data", rounded.up_EGD.to(up))
                set_within(undo, down, "data", rounded.down_EDI.to(down))
        yield
