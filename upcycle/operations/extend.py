"""One more expert, or experts that do nothing, for a mixture that is there.

Shape suffixes: T tokens, D d_model, E experts, before the new one came.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.verification_inputs import Evaluation
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.moe import MoE
from upcycle.operations.as_own import as_own
from upcycle.operations.experts import take, tell_model
from upcycle.passes.calibrate.sites import run_batch
from upcycle.passes.extend import Like
from upcycle.passes.extend import extend as extend_own
from upcycle.routing.contract import RoutedLayer, routed_layers
from upcycle.routing.statistics import load
from upcycle.routing.trace import Trace, trace
from upcycle.util.copies import copy_of
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.verification.whole_model import compare_models

NEVER = -1e4  # a bias with which no expert is chosen, and which half types hold


def extend(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    *,
    layers: Sequence[str] | None = None,
    like: Like = "visited",
    bias: float | None = None,
) -> nn.Module:
    """Add to each layer a copy of the expert that `batches` visit most, with a copy of its row.

    Equal rows would be chosen together wherever the copied expert is the best one, and push out
    the second best. So the new expert starts where nobody chooses it:

    - a layer of upcycle gets a bias of its logit, minus infinity at first, with which the outputs
      stay as they are; raise it step by step to 0 in training, with `set_new_bias`;
    - so does a native router that has one, of minus 1e4 (GPT-OSS, GLM-4, Ernie);
    - no row of another native router is beaten by others for every token, so the layers of such a
      model become layers of upcycle first, which compute the same, to rounding.

    Args:
        model: a converted model, loaded or in memory, or a native one; left alone.
        batches: keyword arguments or tuples that its forward accepts, of the new data.
        layers: paths of the layers to extend; all if None. A native model has one number of experts
            for all of them, unless its layers become those of upcycle.
        like: ``mean`` adds the mean of the experts, and of their rows, instead.
        bias: of the new expert's logit; None is low enough that nobody chooses it.

    Returns:
        A copy; every other parameter is bit for bit what it was.

    Raises:
        UsageError: there are no data, or no such layer, or the data do not reach a layer.
        UnsupportedError: a router cannot follow.

    Source:
        Zhong et al., "MoExtend", 2024, https://arxiv.org/abs/2408.03511, whose copy is not exact
    """
    if not any(hasattr(module, "tie_router") for module in model.modules()) and batches:
        native = routed_layers(model)
        if all(any(n.endswith("bias") for n in _router_tensors(layer)) for layer in native):
            if layers is not None and {*layers} != {layer.path for layer in native}:
                raise UnsupportedError(
                    f"layers: {type(model).__name__} has one number of experts for all of its "
                    "layers; extend all"
                )
            return _with_biases(model, batches, like, NEVER if bias is None else bias)
        model = as_own(model, batches[:1])
    least = -math.inf if bias is None else bias
    return extend_own(model, batches, layers=layers, like=like, bias=least)


def layers_named(model: nn.Module, text: str) -> list[str]:
    """The paths of the layers in `text`: ``all``, or numbers and paths with commas between.

    Raises:
        UsageError: there is no such layer.
    """
    paths = [layer.path for layer in routed_layers(model)]
    if text == "all":
        return paths
    numbered = {**{str(i): path for i, path in enumerate(paths)}, **{path: path for path in paths}}
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    absent = [part for part in wanted if part not in numbered]
    if absent or not wanted:
        raise UsageError(
            f"layers: {', '.join(absent) or 'none'}: the model has layers 0 to {len(paths) - 1}, "
            f"such as {paths[0]}"
        )
    return [numbered[part] for part in wanted]


def layers_by_shift(before: Trace, after: Trace) -> list[str]:
    """The half of the layers in which the shares of the experts differ most between two traces, by
    the standard deviation of the differences, in their order.

    The paper trains the routers on the new data in between; without that, `after` is of the new
    data and `before` of others.

    Source:
        Zhong et al., "MoExtend", 2024, https://arxiv.org/abs/2408.03511
    """
    shifts = []
    for layer in range(len(before.paths)):
        shares = [
            load(trace, layer) / max(load(trace, layer).sum(), 1) for trace in (before, after)
        ]
        shifts.append(float(np.std(shares[1] - shares[0])))
    top = sorted(np.argsort([-shift for shift in shifts], kind="stable")[: -(-len(shifts) // 2)])
    return [before.paths[layer] for layer in top]


@torch.no_grad()
def _with_biases(
    model: nn.Module, batches: Sequence[ExampleInputs], like: Like, bias: float
) -> nn.Module:
    """As `extend`, for native routers with a bias for each expert."""
    extended = copy_of(model)
    layers = routed_layers(extended)
    with eval_mode(model), trace(model) as seen:
        for batch in batches:
            run_batch(model, batch)
    visits = seen.result()
    for layer in layers:
        load_E = load(visits, layer.number)
        if not load_E.any():
            raise UsageError(f"{layer.path}: the data never reach this layer")
        take(layer, [*range(layer.num_experts), int(load_E.argmax())])
        if like == "mean":
            for own in (*layer.experts.parameters(recurse=False), *layer.router.parameters()):
                if len(own) == layer.num_experts + 1:
                    own[-1] = own[:-1].mean(0)
        for name, tensor in _router_tensors(layer).items():
            if name.endswith("bias"):
                tensor.reshape(-1)[-1] = bias
    tell_model(extended, routed_layers(extended))
    if bias == NEVER:
        with eval_mode(model, extended):
            inputs = Evaluation(list(batches[:1]))
            off = compare_models(model, extended, inputs, predictions=False).relative
        if not off <= ROUNDING[model_dtype(model)]:
            raise UnsupportedError(
                f"{type(model).__name__}: its routers choose by more than scores and a bias, so "
                f"one more expert changes the choice of the others ({off:.1e} off)"
            )
    return extended


def _router_tensors(layer: RoutedLayer) -> dict[str, Tensor]:
    return {**dict(layer.router.named_buffers()), **dict(layer.router.named_parameters())}


@torch.no_grad()
def add_nulls(model: nn.Module, nulls: int, inputs: Sequence[ExampleInputs] = ()) -> nn.Module:
    """Let tokens choose fewer experts: add `nulls` to each layer, which do nothing.

    Their rows are copies of the experts', so `nulls` is a multiple of E, and a token chooses the
    best ``k + (k - 1) * nulls / E`` of both, the true ones first where scores are equal: before
    training that is the k experts that it chose, exactly. The weights of the true ones sum to one.
    Native layers become layers of upcycle first.

    Args:
        inputs: of a native model, on which that is checked.

    Returns:
        A copy of `model`.

    Raises:
        UsageError: there is no layer of upcycle, or `nulls` is no multiple.
        UnsupportedError: a router is not the best `top_k` of linear scores, renormalised.

    Source:
        Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233
    """
    is_own = any(isinstance(module, MoE) for module in model.modules())
    extended = copy_of(model) if is_own else as_own(model, inputs)
    layers = routed_layers(extended)
    for layer in layers:
        block: Any = layer.block
        facts, count = block.config.router, layer.num_experts
        if not facts.is_plain or facts.tied or facts.frozen or facts.weights != "renormalised":
            raise UnsupportedError(
                f"{layer.path}: only routers that take the best `top_k` of linear scores, with "
                "weights that sum to one, can choose experts that do nothing"
            )
        if nulls < count or nulls % count:
            raise UsageError(
                f"nulls: {nulls} is no multiple of the {count} experts of {layer.path}"
            )
        copies, k = nulls // count, facts.select.k
        for name, tensor in list(block.router.named_parameters(recurse=False)):
            rows = tensor.repeat(1 + copies, *[1] * (tensor.dim() - 1))
            setattr(block.router, name, nn.Parameter(rows, tensor.requires_grad))
        chosen = replace(facts.select, rule="null", k=k + (k - 1) * copies, nulls=nulls)
        block.config = replace(block.config, router=replace(facts, select=chosen, nulls=nulls))
    tell_model(extended, routed_layers(extended))
    return extended
