"""The model as the exporter sees it: the experts of every MoE layer are one opaque node.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from upcycle.errors import UnsupportedError
from upcycle.layers.config import RouterConfig
from upcycle.layers.experts import Experts
from upcycle.layers.moe import MoE
from upcycle.models.moe_layers import moe_layers
from upcycle.targets.onnx.forms.routed import Routed, given, routed
from upcycle.targets.traced.outputs import replaced
from upcycle.util.modules import eval_mode

OPAQUE = ("upcycle", "MoE")


@contextmanager
def symbolic_layers(
    model: nn.Module, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, Routed]]:
    """Within it `model` is in eval mode and the experts of its MoE layers export as opaque nodes.

    The layers are those of upcycle, and others whose experts are `Experts`; the value has what the
    forms are told of them, by path.

    Raises:
        UnsupportedError: experts of another type, or a router that has no place in a graph.
    """
    layers: dict[str, Routed] = {}
    for layer in moe_layers(model):
        block, experts = layer.block, layer.experts
        assert isinstance(experts, Experts)
        if experts.down_proj.dtype != dtype:
            raise UnsupportedError(
                f"{layer.path}: the graph is to be in {dtype} and the experts are "
                f"{experts.down_proj.dtype}; export model.float() for float32, the stored weights "
                "may stay as they are"
            )
        if isinstance(block, MoE):
            ids = getattr(block.router, "given", None)
            has_ids = ids is not None and ids.position is not None
            check_router(layer.path, block.config.router, has_ids=has_ids)
        layers[layer.path] = routed(block) if isinstance(block, MoE) else given(layer)
    with eval_mode(model), ExitStack() as undo:
        for path, found in layers.items():
            opaque = functools.partial(_forward, found.experts, path)
            undo.enter_context(replaced(found.experts, "forward", opaque))
        for router in [m.router for m in model.modules() if isinstance(m, MoE)]:
            scores = getattr(router, "onnx_scores", None)  # of a router of others
            if scores is not None:
                undo.enter_context(replaced(router, "scores", scores))
        yield layers


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


def _forward(
    experts: Experts,
    path: str,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """`Experts.forward` as one node, which gets a weight for each expert: zero if not chosen.

    So no runtime breaks a tie. Output biases are a product with the weights beside it.
    """
    weights_TE = weights_TK.new_zeros(index_TK.shape[0], experts.num_experts)
    weights_TE = weights_TE.scatter(-1, index_TK, weights_TK)
    inputs = [x_TD, weights_TE, experts.up_EGD, experts.down_proj]
    if experts.up_bias_EG is not None:
        inputs.append(experts.up_bias_EG)
    y_TO: torch.Tensor = torch.onnx.ops.symbolic(
        "::".join(OPAQUE),
        inputs,
        {"layer": path},
        dtype=x_TD.dtype,
        shape=(x_TD.shape[0], experts.down_proj.shape[1]),
        version=1,
    )
    if experts.down_bias_EO is not None:
        y_TO = y_TO + weights_TE.to(x_TD.dtype) @ experts.down_bias_EO
    return y_TO
