"""The MoE layers of a model on the way into an ONNX graph."""

import ast
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import onnx_ir as ir
import torch
from torch import nn

from upcycle.errors import UnsupportedError
from upcycle.layers.config import RouterConfig
from upcycle.layers.experts import Experts
from upcycle.layers.moe import MoE
from upcycle.models.moe_layers import moe_layers
from upcycle.onnx.node_names import SCOPES
from upcycle.targets.onnx.forms.routed import Routed, given, routed
from upcycle.targets.onnx.torch_ops.opaque import OPAQUE
from upcycle.targets.traced.experts import experts_as
from upcycle.targets.traced.outputs import replaced
from upcycle.util.modules import eval_mode


def layers_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Routed]:
    """What the forms are told of the MoE layers of `model`, by path.

    The layers are those of upcycle, and others whose experts are `Experts`.

    Raises:
        UnsupportedError: experts of another type, or a router that has no place in a graph.
    """
    layers: dict[str, Routed] = {}
    for layer in moe_layers(model):
        block, experts = layer.block, layer.experts
        assert isinstance(experts, Experts)
        if experts.down_proj.dtype != dtype:
            raise UnsupportedError(
                f"{layer.name}: the graph is to be in {dtype} and the experts are "
                f"{experts.down_proj.dtype}; export model.float() for float32, the stored weights "
                "may stay as they are"
            )
        if isinstance(block, MoE):
            ids = getattr(block.router, "given", None)
            has_ids = ids is not None and ids.position is not None
            check_router(layer.name, block.config.router, has_ids=has_ids)
        layers[layer.path] = routed(block) if isinstance(block, MoE) else given(layer)
    return layers


def check_router(path: str, router: RouterConfig, *, has_ids: bool) -> None:
    """Refuse the routers that have no place in a graph.

    `has_ids` says whether an input of it is known to hold the ids that a table is read by.

    Raises:
        UnsupportedError: an oracle, or a table without ids.
    """
    if router.kind == "oracle":
        raise UnsupportedError(
            f"{path}: an oracle runs every expert to choose some, which is for comparing other "
            "routers with; use another router"
        )
    if router.kind == "table" and not has_ids:
        raise UnsupportedError(
            f"{path}: its router reads {router.by} ids, and an ONNX graph has no input that is "
            "known to hold them; use another router, or instead of an ONNX file convert the model "
            "that it was exported from"
        )


@contextmanager
def for_graph(model: nn.Module) -> Iterator[None]:
    """Within it `model` is in eval mode, and the experts of its layers are one node each."""
    with eval_mode(model), experts_as(model, "fused"), ExitStack() as undo:
        for router in [m.router for m in model.modules() if isinstance(m, MoE)]:
            scores = getattr(router, "onnx_scores", None)  # of a router of others
            if scores is not None:
                undo.enter_context(replaced(router, "scores", scores))
        yield


def label(model: ir.Model, layers: Collection[str]) -> None:
    """Write on every opaque node of `model`, in place, the path of the layer that it came from.

    Raises:
        UnsupportedError: the experts ran outside of the forward of their layer.
    """
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) != OPAQUE:
            continue
        *scopes, _ = ast.literal_eval(node.metadata_props[SCOPES])  # the last is the operation
        named = (_layer(scope, layers) for scope in reversed(scopes))
        path = next((name for name in named if name is not None), None)
        if path is None:
            raise UnsupportedError(
                f"the experts that {scopes[-1] or 'the model'} calls do not say which layer they "
                "belong to; call the layer that holds them"
            )
        node.attributes["layer"] = ir.AttrString("layer", path)


def _layer(scope: str, layers: Collection[str]) -> str | None:
    """The layer with this scope; where torch has read the code, more comes before the path."""
    if scope in layers:
        return scope
    return max(
        (path for path in layers if path and scope.endswith(f".{path}")), key=len, default=None
    )
