"""Merge the experts of each layer of a mixture into one dense FFN.

Shape suffixes: E experts, I neurons of an expert, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.trained import is_at
from upcycle.data.verification_inputs import Evaluation
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.ffn import FFN
from upcycle.ir.layer_weights import weights_of
from upcycle.ir.rounding import ROUNDING
from upcycle.ir.weights import ExpertWeights, FFNWeights, MoEWeights, Provenance, read_ffn
from upcycle.layers.moe import MoE, all_experts
from upcycle.models.moe_layers import MoELayer, as_experts, moe_layers
from upcycle.operations.dense_twin import DenseTwin, dense_twins
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.merge import merge_copies, merge_to_dense, write_dense
from upcycle.routing.statistics import visits
from upcycle.routing.trace import Trace
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.verification.whole_model import compare_models

By = Literal["exact", "mean", "use"]
Kind = Literal["split", "copies", "mean"]
_WORST: tuple[Kind, ...] = ("mean", "split", "copies")


@dataclass(frozen=True)
class Merged:
    """A dense model, and what it is to the mixture.

    Attributes:
        kind: ``split``: its FFNs are the sums of all experts at weight one; ``copies``: they
            compute what the layers do; ``mean``: they are means of experts that differ.
        off: how far it is from the mixture: with all experts at weight one for ``split``, as it
            is for ``copies``, and with these FFNs in the place of its layers for ``mean``; None
            there if the mixture extends this very dense class.
    """

    model: nn.Module
    kind: Kind
    off: float | None


@torch.no_grad()
def merge(
    model: nn.Module,
    inputs: Sequence[ExampleInputs],
    trace: Trace,
    *,
    by: By = "exact",
    provenance: Mapping[str, Provenance] | None = None,
) -> Merged:
    """The dense model with one FFN in the place of each MoE layer.

    Args:
        model: of transformers, with layers of upcycle or native ones; left alone.
        inputs: keyword arguments or tuples of its forward, on which the result is checked.
        trace: of `model`: what the weights of a token sum to, and how much each expert is used.
        by: ``exact`` merges a split, or copies that are still the same; ``mean`` takes the mean of
            copies, and ``use`` counts each by the mass of the weights that it gets.
        provenance: by path of the dense FFN, the dense neurons behind a layer. Without it, experts
            that each have as many neurons as the FFN are copies, and those that have as many
            together are a split.

    Raises:
        UsageError: the model has no MoE layer.
        UnsupportedError: there is no such dense model; the reason says why.

    Source:
        Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908, for splits
    """
    layers, known = moe_layers(model), provenance or {}
    if not layers:
        raise UsageError("the model has no MoE layer; give one that was converted, or a native one")
    d_ff = max(map(_dense_neurons, known.values()), default=layers[0].width)
    refused, evaluation = "", Evaluation(list(inputs))
    for twin in dense_twins(model, d_ff):
        found = _merged(model, twin, layers, by, known, trace, evaluation)
        if found.off is None or found.off <= ROUNDING[model_dtype(model)]:
            return found
        refused = (
            f"a {type(found.model).__name__} with the merged experts is {found.off:.1e} off what "
            f"this {type(model).__name__} computes with them, so it is another model"
        )
    raise UnsupportedError(refused)


def _merged(
    model: nn.Module,
    twin: DenseTwin,
    layers: Sequence[MoELayer],
    by: By,
    known: Mapping[str, Provenance],
    trace: Trace,
    evaluation: Evaluation,
) -> Merged:
    """The merged model if `twin` is its class, and how far that is from the truth."""
    dense = twin.make(model_dtype(model))
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    ffns = locate_in(twin.skeleton()).ffns
    merged: dict[str, tuple[FFN, FFNWeights]] = {}
    kinds: set[Kind] = set()
    for number, layer in enumerate(layers):
        ffn = next((ffn for ffn in ffns if is_at(layer, ffn)), None)
        if ffn is None:
            raise UnsupportedError(
                f"{layer.path}: {type(dense).__name__} has no FFN where this layer is"
            )
        like = read_ffn(ffn, parameters)
        try:
            weights, kind = _ffn_of(layer, like, by, known.get(ffn.path), trace, number)
        except UnsupportedError as error:
            raise UnsupportedError(f"{layer.path}: {error}") from error
        merged[layer.path] = ffn, weights
        kinds.add(kind)
    write_dense(dense, model, {ffn.path: (ffn, weights) for ffn, weights in merged.values()})
    kind = next(kind for kind in _WORST if kind in kinds)
    if kind == "mean" and twin.is_certain:
        return Merged(dense, kind, None)
    with ExitStack() as within:
        within.enter_context(eval_mode(model))
        if kind == "split":
            within.enter_context(all_experts(model))
        if kind == "mean":
            within.enter_context(_layers_replaced(layers, merged))
        off = compare_models(model, dense, evaluation, predictions=False).relative
    return Merged(dense, kind, off)


def _ffn_of(
    layer: MoELayer,
    like: FFNWeights,
    by: By,
    origin: Provenance | None,
    trace: Trace,
    number: int,
) -> tuple[FFNWeights, Kind]:
    """The dense FFN behind a layer.

    Raises:
        UnsupportedError: there is none.
    """
    held = _held(layer)
    if held.low_rank is not None:
        raise UnsupportedError("it has a low-rank term, which no dense FFN holds")
    d_ff = like.up_MFD.shape[1]
    experts, shared = _with_neurons(held, origin or _assumed(layer, d_ff), d_ff)
    like = replace(like, down_bias_O=held.output_bias_O)
    count = sum(int((group.neuron_EI >= 0).sum()) for group in (experts, shared) if group)
    if count == d_ff:
        if not layer.is_own:
            raise UnsupportedError(
                "its experts are parts of one FFN, whose factors a native architecture has folded "
                "into them; merge the model in upcycle's own form"
            )
        return merge_to_dense(experts, like, shared), "split"
    mass_TE = torch.from_numpy(visits(trace, number, weighted=True))
    total_T = mass_TE.sum(1)
    total = float(total_T.mean())
    if by == "exact" and float((total_T - total).abs().max()) > ROUNDING[torch.float32] * total:
        raise UnsupportedError(
            f"the weights of a token sum to {float(total_T.min()):.3g} here and to "
            f"{float(total_T.max()):.3g} there, which no dense FFN does; merge by `mean` or `use`"
        )
    share_E = mass_TE.sum(0) if by == "use" else None
    found = merge_copies(experts, like, shared, share_E=share_E, exact=by == "exact")
    # Each neuron is in `copies` of the experts, so it gets that part of the weights.
    copies = experts.neuron_EI.ge(0).sum() / (d_ff * len(experts.neuron_EI))
    return _times(found, _rounded(total) * float(copies)), "copies" if by == "exact" else "mean"


def _rounded(total: float) -> float:
    """The whole number that it is but for rounding, so that copies are taken bit for bit."""
    nearest = round(total)
    return nearest if abs(total - nearest) <= ROUNDING[torch.float32] else total


def _times(ffn: FFNWeights, factor: float) -> FFNWeights:
    bias_O = ffn.down_bias_O
    return replace(
        ffn,
        down_OF=ffn.down_OF * factor,
        down_bias_O=None if bias_O is None else bias_O * factor,
    )


def _held(layer: MoELayer) -> MoEWeights:
    """The weights of a layer, the dense neurons behind them unknown."""
    if isinstance(layer.block, MoE):
        return weights_of(layer.block)
    if layer.shared and any(
        bool(tensor.any())
        for name, tensor in layer.block.named_parameters()
        if "shared" in name.split(".")[0]
    ):
        raise UnsupportedError(
            "it has a shared expert beside the others, which no FFN of their width holds"
        )
    experts = as_experts(layer.experts, layer.path)
    unknown_EI = torch.full((layer.num_experts, layer.width), -1)
    return MoEWeights(
        ExpertWeights(
            up_EGD=experts.up_EGD,
            up_bias_EG=experts.up_bias_EG,
            down_EOI=experts.down_proj,
            neuron_EI=unknown_EI,
            down_bias_EO=experts.down_bias_EO,
        ),
        router={},
        output_bias_O=None,
    )


def _assumed(layer: MoELayer, d_ff: int) -> Provenance:
    """The dense neurons behind a layer, where nothing says it.

    Raises:
        UnsupportedError: the numbers fit nothing.
    """
    experts, width, shared = layer.num_experts, layer.width, layer.shared if layer.is_own else 0
    shared_S = torch.arange(shared)
    if width == d_ff and not shared:
        return Provenance(torch.arange(d_ff).expand(experts, -1), shared_S)
    if experts * width + shared == d_ff:
        return Provenance(torch.arange(shared, d_ff).reshape(experts, width), shared_S)
    raise UnsupportedError(
        f"it has {experts} experts of {width} neurons and {shared} shared ones for an FFN of "
        f"{d_ff}, and no provenance.json that says which are the same"
    )


def _with_neurons(
    held: MoEWeights, origin: Provenance, d_ff: int
) -> tuple[ExpertWeights, ExpertWeights | None]:
    """The experts with the dense neurons behind them."""
    neuron_EI = origin.expert_EI
    place_I = torch.arange(neuron_EI.shape[1])
    if len(place_I) == d_ff and ((neuron_EI == place_I) | (neuron_EI < 0)).all():
        neuron_EI = place_I.expand_as(neuron_EI)  # those that were drawn anew stand in their places
    if neuron_EI.shape != held.experts.neuron_EI.shape or neuron_EI.max() >= d_ff:
        raise UnsupportedError("provenance.json is that of other experts")
    experts = replace(held.experts, neuron_EI=neuron_EI)
    if held.shared is None:
        return experts, None
    return experts, replace(held.shared, neuron_EI=origin.shared_S[None])


def _dense_neurons(origin: Provenance) -> int:
    ends = [int(tensor.max()) + 1 for tensor in vars(origin).values() if tensor.numel()]
    return max(ends)


@contextmanager
def _layers_replaced(
    layers: Sequence[MoELayer], merged: Mapping[str, tuple[FFN, FFNWeights]]
) -> Iterator[None]:
    """Within it each layer returns what its merged FFN does."""
    handles = [
        layer.block.register_forward_hook(partial(_instead, merged[layer.path][1]))
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _instead(ffn: FFNWeights, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return ffn(args[0]).reshape(output.shape)
    first, *others = output
    return (ffn(args[0]).reshape(first.shape), *others)
