"""Layers, files and bounds for the ONNX tests."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from upcycle.layers.config import LayerConfig, RouterConfig, SelectConfig, WeightRule
from upcycle.layers.moe import MoE
from upcycle.pointwise import Pointwise
from upcycle.targets.files.stored import Stored

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
GATED = (("mul", ("t0", "z1"), {}),)
ACTIVATIONS = {
    "relu": Pointwise(1, (("relu", ("z0",), {}),), "relu"),
    "silu": Pointwise(1, (("silu", ("z0",), {}),), "silu"),
    "gelu": Pointwise(1, (("gelu", ("z0",), {}),), "gelu"),
    "gelu_tanh": Pointwise(1, (("gelu", ("z0",), {"approximate": "tanh"}),), "gelu_tanh"),
    "swiglu": Pointwise(2, (("silu", ("z0",), {}), *GATED), "swiglu"),
    "geglu": Pointwise(2, (("gelu", ("z0",), {}), *GATED), "geglu"),
}
# |activation(a) - activation(b)| <= 1.13 |a - b| for each of them, and |activation(a)| <= |a|
SLOPE = 1.13


def moe(
    pointwise: Pointwise | str,
    weights: WeightRule = "renormalised",
    *,
    bias: bool = True,
    num_experts: int = 5,
    top_k: int = 2,
    width: int = 12,
    d_model: int = 16,
    d_out: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> MoE:
    """A layer of distinct random experts, with activations of size one."""
    if isinstance(pointwise, str):
        pointwise = ACTIVATIONS[pointwise]
    router = RouterConfig(
        kind="linear",
        num_experts=num_experts,
        d_model=d_model,
        select=SelectConfig(rule="top_k", k=top_k),
        weights=weights,
        scale=scale,
        bias=bias,
    )
    layer = MoE(
        LayerConfig(
            num_experts=num_experts,
            width=width,
            d_model=d_model,
            d_out=d_out or d_model,
            pointwise=pointwise,
            up_bias=bias,
            output_bias=bias,
            router=router,
            hidden_dropout=0.1,
            output_dropout=0.1,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator).div_(parameter.shape[-1] ** 0.5)
    return layer


def stored_in(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, from its header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(
            file.name, 8 + length + e["data_offsets"][0], tuple(e["shape"]), TYPES[e["dtype"]]
        )
        for name, e in header.items()
    }


def save(model: nn.Module, folder: Path) -> dict[str, Stored]:
    """Write the weights of `model`; returns where they are."""
    file = folder / "model.safetensors"
    shared: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in shared:
            tensors[name] = tensor.contiguous()
        shared.add(tensor.data_ptr())
    save_file(tensors, file)
    return stored_in(file)


@torch.no_grad()
def exact(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64; of equal scores the lowest expert wins, as ONNX TopK defines it."""
    wide = copy.deepcopy(layer).eval().double()
    logits_TE = wide.router(x.double())[0]
    order_TE = logits_TE.argsort(dim=-1, descending=True, stable=True)
    index_TK = order_TE[..., : layer.router.top_k].reshape(-1, layer.router.top_k)
    weights_TE = wide.router.scale * logits_TE.softmax(-1).reshape(len(index_TK), -1)
    weights_TK = weights_TE.gather(-1, index_TK)
    if layer.router.weights == "one":
        weights_TK = torch.full_like(weights_TK, wide.router.scale)
    elif layer.router.weights != "softmax":
        weights_TK = wide.router.scale * weights_TK / weights_TK.sum(-1, keepdim=True)
    y = wide.experts.eager_forward(x.double().flatten(0, -2), index_TK, weights_TK)
    y = y.reshape(*x.shape[:-1], -1)
    return y if wide.output_bias is None else y + wide.output_bias


@torch.no_grad()
def bound(layer: MoE, x: torch.Tensor) -> float:
    """How far a float32 evaluation of the layer at `x` can be from the exact one, to first order.

    With u the unit roundoff, a sum of n products has an error of at most n u times the sum of
    their magnitudes. Magnitudes go through the layer with absolute values everywhere:
    A = |up| |x| + |b| bounds the hidden layer (A_gate A_up if gated), M = sum_k w_k |down| A the
    output. Relative to M the errors are: D + 1 for each expansion, times the slope of the
    activation; I + K + 1 for the sums over the hidden layer and the experts; 8 for the activation
    and other single operations; 2 (D + 1) max|logit magnitude| for the softmax of logits with an
    error of (D + 1) u times their magnitude; 70 + 8 for Log(w), which is at least -69, and the
    kernel's softmax of it.
    """
    wide = copy.deepcopy(layer).eval().double()
    x_TD = x.double().flatten(0, -2)
    _, weights_TK, index_TK = wide.router(x_TD)
    for parameter in wide.parameters():
        parameter.abs_()
    logits_TE = wide.router(x_TD.abs())[0]
    arity = wide.experts.act_fn.pointwise.arity
    steps = (("mul", ("z0", "z1"), {}),) if arity == 2 else (("abs", ("z0",), {}),)
    wide.experts.act_fn.pointwise = Pointwise(arity, steps)
    largest = wide.experts.eager_forward(x_TD.abs(), index_TK, weights_TK).max().item()
    if wide.output_bias is not None:
        largest += wide.output_bias.max().item()
    d_model, width = x.shape[-1], layer.experts.intermediate_dim
    errors = SLOPE * arity * (d_model + 1) + (width + layer.router.top_k + 1) + 8
    errors += 2 * (d_model + 1) * logits_TE.max().item() + 78
    return errors * torch.finfo(torch.float32).eps / 2 * largest
