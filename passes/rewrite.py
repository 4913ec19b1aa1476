"""Rewrite: a copy of the dense module with an MoE layer in the place of each planned FFN."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.graphs.install import install
from upcycle.ir.layer_weights import load_weights
from upcycle.ir.partial_projection import read_kept
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import MoEWeights
from upcycle.layers.moe import MoE
from upcycle.layers.pretrained import RouterLogits
from upcycle.util.copies import copy_of


def with_empty_layers(
    model: nn.Module, specs: Sequence[MoESpec], *, in_place: bool = False
) -> tuple[nn.Module, list[MoE]]:
    """A copy of `model` with layers of zeros, and those, in the order of `specs`.

    The copy stays a normal module, which trains, generates and saves; the weights of its FFNs are
    not copied. One of transformers takes ``output_router_logits``, as it does when it is loaded.
    Matrices that also do something else keep those rows and columns. `in_place` changes
    `model` itself, where the layers are on the meta device.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name for spec in specs for name in spec.ffn.parameters}
    converted = model if in_place else _copy_without(model, names)
    with torch.device("meta") if in_place else nullcontext():
        layers = install(converted, [spec.site() for spec in specs])
    if isinstance(converted, PreTrainedModel) and not in_place:
        RouterLogits(converted)
    for kept in (kept for spec in specs for kept in spec.ffn.kept):
        trained = parameters[kept.parameter].requires_grad
        path, _, last = kept.name.rpartition(".")
        parameter = nn.Parameter(read_kept(kept, parameters), trained)
        setattr(converted.get_submodule(path), last, parameter)
    return converted, layers


def fill(layer: MoE, made: MoEWeights, device: torch.device) -> None:
    """Put weights into a layer on `device`, in their dtype; routers stay in float32."""
    dtype = made.experts.down_EOI.dtype
    layer.router.to(device=device)
    for part in (layer.experts, layer.shared_expert, layer.low_rank):
        if part is not None:
            part.to(device=device, dtype=dtype)
    if layer.output_bias is not None:
        layer.output_bias = nn.Parameter(layer.output_bias.detach().to(device, dtype))
    load_weights(layer, made)


def _copy_without(model: nn.Module, names: set[str]) -> nn.Module:
    """A deep copy in which the named parameters, which are replaced anyway, take no memory."""
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            memo[id(parameter)] = nn.Parameter(torch.empty(0), requires_grad=False)
    return copy_of(model, memo)
