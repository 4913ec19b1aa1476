"""A native mixture of experts with layers of upcycle in the place of its own, which can do more.

Shape suffixes: E experts, D d_model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.trained import spec_of
from upcycle.data.verification_inputs import Evaluation
from upcycle.errors import UnsupportedError
from upcycle.ir.ffn import FFN, Located, Projection
from upcycle.ir.rounding import ROUNDING
from upcycle.ir.spec import Plan
from upcycle.ir.verdict import TRAINED
from upcycle.layers.config import LayerConfig, RouterConfig, SelectConfig
from upcycle.layers.moe import MoE
from upcycle.models.moe_layers import as_experts, moe_layers
from upcycle.recipe.schema import Recipe
from upcycle.routing.contract import RoutedLayer, routed_layers, sums_to_the_same
from upcycle.targets.checkpoint import write_checkpoint
from upcycle.util.copies import copy_of
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.verification.whole_model import compare_models


@torch.no_grad()
def as_own(model: nn.Module, inputs: Sequence[ExampleInputs]) -> nn.Module:
    """A copy of a native mixture whose layers are those of upcycle; it computes the same.

    Args:
        inputs: on which that is checked, to rounding.

    Raises:
        UnsupportedError: a router is not the best `top_k` of a softmax of linear scores, or what
            the experts compute is no FFN.
    """
    own: Any = copy_of(model)
    for layer in routed_layers(own):
        parent, _, name = layer.path.rpartition(".")
        setattr(own.get_submodule(parent), name, _own_layer(layer))
    with eval_mode(model, own):
        evaluation = Evaluation(list(inputs))
        off = compare_models(model, own, evaluation, predictions=False).relative
    if not off <= ROUNDING[model_dtype(model)]:
        raise UnsupportedError(
            f"{type(model).__name__}: its layers are more than experts and a linear router (with "
            f"layers of upcycle it is {off:.1e} off), so they cannot be put into upcycle's form"
        )
    return own  # type: ignore[no-any-return]


def _own_layer(layer: RoutedLayer) -> MoE:
    """The layer with the weights of `layer`.

    Raises:
        UnsupportedError: it has more than these.
    """
    experts = as_experts(layer.experts, layer.path)
    rows = [p for p in layer.router.parameters() if p.shape[:1] == (layer.num_experts,)]
    beside = [name for name, _ in layer.block.named_children() if "shared" in name]
    if len(rows) != 1 or rows[0].dim() != 2 or beside or dict(layer.router.named_buffers()):
        raise UnsupportedError(
            f"{layer.path}: {type(layer.block).__name__} has more than experts and a linear router"
        )
    d_model = rows[0].shape[1]
    config = LayerConfig(
        num_experts=layer.num_experts,
        width=experts.down_proj.shape[2],
        shared=0,
        d_model=d_model,
        d_out=experts.down_proj.shape[1],
        pointwise=experts.act_fn.pointwise,
        up_bias=experts.has_bias,
        output_bias=False,
        expert_bias=experts.has_bias,
        router=RouterConfig(
            kind="linear",
            num_experts=layer.num_experts,
            d_model=d_model,
            select=SelectConfig(rule="top_k", k=layer.top_k or layer.num_experts),
            weights="renormalised" if sums_to_the_same(layer) else "softmax",
            scale=1.0,
        ),
        hidden_dropout=0.0,
        output_dropout=0.0,
    )
    made = MoE(config).to(experts.down_proj)
    held = {**dict(experts.named_parameters()), "weight": rows[0]}
    for module in (made.experts, made.router):
        for name in dict(module.named_parameters(recurse=False)):
            new = nn.Parameter(held[name].detach(), requires_grad=rows[0].requires_grad)
            setattr(module, name, new)
    return made.train(layer.block.training)


def write_own(model: Any, folder: Path) -> None:
    """Write a model of transformers with layers of upcycle as modules, with the code for them."""
    specs = []
    for layer in moe_layers(model):
        pointwise: Any = layer.experts
        specs.append(spec_of(_ffn(layer.path, layer.d_model, layer.width, pointwise), layer))
    located = Located(tuple(spec.ffn for spec in specs))
    first = specs[0]
    recipe = Recipe(experts=first.experts, router=first.router)
    with eval_mode(model):
        write_checkpoint(folder, model, Plan(located, tuple(specs), recipe, TRAINED))


def _ffn(path: str, d_model: int, d_ff: int, experts: Any) -> FFN:
    """What stands for the dense FFN that never was: a module at the place of the layer."""
    up, down = f"{path}.experts.{experts.up_name}", f"{path}.experts.down_proj"
    pointwise = experts.act_fn.pointwise
    bias = f"{up}_bias" if experts.up_bias_EG is not None else None
    expansions = tuple(
        Projection(path, up, bias, transposed=False, rows=(i * d_ff, (i + 1) * d_ff, 1))
        for i in range(pointwise.arity)
    )
    contraction = Projection(path, down, None, transposed=False, rows=(0, d_model, 1))
    return FFN(path, "ffn", "module", expansions, contraction, pointwise, d_model, d_ff, d_model)
