"""Merge: one dense FFN out of the experts of each layer.

Shape suffixes: E experts, I neurons of an expert, F d_ff, M expansions, S slots: the neurons of all
experts of a layer.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from upcycle.errors import UnsupportedError
from upcycle.ir.ffn import FFN
from upcycle.ir.layer_weights import weights_of
from upcycle.ir.partial_projection import write_kept
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, FFNWeights, Provenance, read_ffn, read_matrices
from upcycle.layers.moe import MoE
from upcycle.util.copies import copy_of, tensors_of


def merge(
    dense: nn.Module,
    converted: nn.Module,
    layers: Mapping[str, tuple[MoESpec, MoE]],
    provenance: Mapping[str, Provenance],
) -> nn.Module:
    """A dense model with the weights that `converted` has now, trained or not.

    Right after a split it is the dense model bit for bit; after training it computes what the
    converted model computes with all experts at weight one, without a router.

    Args:
        dense: the model that was converted; left alone.
        layers: FFN path -> the planned layer and the module that it became.
        provenance: FFN path -> the dense neurons behind its layer.

    Returns:
        A new module of the class of `dense`.

    Raises:
        UnsupportedError: the experts are copies, or slices of copies.

    Source:
        Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908
    """
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    merged = {}
    for path, (spec, layer) in layers.items():
        if layer.low_rank is not None:
            raise UnsupportedError(
                f"{path}: the layer has a low-rank term, which no dense FFN holds; convert without "
                "`compensate.low_rank` to merge it later"
            )
        weights = weights_of(layer, provenance[path])
        whole = merge_to_dense(weights.experts, read_ffn(spec.ffn, parameters), weights.shared)
        merged[path] = spec.ffn, replace(whole, down_bias_O=layer.output_bias)
    return write_dense(copy_of(dense), converted, merged)


@torch.no_grad()
def write_dense(
    dense: nn.Module, converted: nn.Module, merged: Mapping[str, tuple[FFN, FFNWeights]]
) -> nn.Module:
    """Give `dense` the merged FFNs, and of all else what `converted` has; in place."""
    trained = tensors_of(converted)
    for name, tensor in tensors_of(dense).items():
        if name in trained and trained[name].shape == tensor.shape:
            tensor.copy_(trained[name])
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    for ffn, weights in merged.values():
        for kept in ffn.kept:
            write_kept(kept, parameters, trained[kept.name])
        _write_ffn(ffn, parameters, weights)
    return dense


def merge_to_dense(
    experts: ExpertWeights, like: FFNWeights, shared: ExpertWeights | None = None
) -> FFNWeights:
    """Put the experts of a split back together, each neuron in its old place, without padding.

    Right after the split the result is the dense FFN bit for bit; after training it is the layer
    with all experts chosen and weights one.

    Returns:
        A dense FFN in new memory, in the dtype of `experts`. Of `like`, which they were made from,
        it has the output bias alone.

    Raises:
        UnsupportedError: the experts do not hold each neuron of `like` once, unscaled.

    Source:
        Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908
    """
    slots = _Slots(experts, shared, like.up_MFD.shape[1])
    if not slots.is_split or experts.up_scale != 1 or experts.down_scale != 1:
        raise UnsupportedError(
            "only the experts of a split make up one dense FFN; copies and slices of copies "
            "cannot be merged"
        )
    return slots.taken(like, slots.first_F)


def merge_copies(
    experts: ExpertWeights,
    like: FFNWeights,
    shared: ExpertWeights | None,
    *,
    share_E: Tensor | None = None,
    exact: bool = False,
) -> FFNWeights:
    """The FFN whose every neuron is the mean of its copies in the experts.

    Args:
        share_E: how much each expert counts, at least zero; all the same if None.
        exact: copies that differ are refused, and those that do not are taken bit for bit.

    Returns:
        A dense FFN as that of `merge_to_dense`; the contraction is that of the copies, so what the
        weights of a token sum to is the caller's to multiply.

    Raises:
        UnsupportedError: a neuron is in no expert, or with `exact` its copies differ.
    """
    slots = _Slots(experts, shared, like.up_MFD.shape[1])
    if (slots.copies_F == 0).any():
        raise UnsupportedError(
            f"{int((slots.copies_F == 0).sum())} of {len(slots.copies_F)} neurons are in no expert"
        )
    if exact:
        if drift := slots.drift(like):
            raise UnsupportedError(
                f"its experts are copies that have drifted apart (by {drift:.1e} of the largest "
                "weight); merge them by `mean` or by `use`, and read what that costs"
            )
        return replace(slots.taken(like, slots.first_F), down_bias_O=_bias(experts, like))
    return replace(slots.mean(like, share_E), down_bias_O=_bias(experts, like, share_E))


class _Slots:
    """The neurons of all experts of a layer in a row, the shared expert's first."""

    def __init__(self, experts: ExpertWeights, shared: ExpertWeights | None, d_ff: int) -> None:
        self.groups = [experts] if shared is None else [shared, experts]
        neuron_S = torch.cat([group.neuron_EI.flatten() for group in self.groups])
        self.held_S = (neuron_S >= 0).nonzero().squeeze(1)  # the others are padding
        self.neuron_S = neuron_S[self.held_S]
        self.copies_F = torch.bincount(self.neuron_S, minlength=d_ff)
        order = self.neuron_S.argsort(stable=True)
        starts_F = self.copies_F.cumsum(0) - self.copies_F
        present = starts_F.clamp(max=max(len(order) - 1, 0))
        self.first_F = self.held_S[order][present]

    @property
    def is_split(self) -> bool:
        """Each neuron is there once."""
        return bool((self.copies_F == 1).all())

    def rows(self, like: FFNWeights) -> tuple[Tensor, Tensor | None, Tensor]:
        """Expansions [M, S, D], their biases [M, S] and contraction [O, S] of all slots."""
        arity = len(like.up_MFD)

        def joined(rows: list[Tensor]) -> Tensor:
            split = [r.reshape(len(r), arity, -1, *r.shape[2:]).transpose(0, 1) for r in rows]
            return torch.cat([r.flatten(1, 2) for r in split], dim=1)

        biases = [group.up_bias_EG for group in self.groups if group.up_bias_EG is not None]
        columns = [group.down_EOI.transpose(0, 1).flatten(1) for group in self.groups]
        up_MSD = joined([group.up_EGD for group in self.groups])
        return up_MSD, joined(biases) if biases else None, torch.cat(columns, dim=1)

    def taken(self, like: FFNWeights, slot_F: Tensor) -> FFNWeights:
        """The FFN of these slots."""
        up_MSD, bias_MS, down_OS = self.rows(like)
        bias_MF = None if bias_MS is None else bias_MS[:, slot_F]
        return _ffn(like, up_MSD[:, slot_F], bias_MF, down_OS[:, slot_F])

    def mean(self, like: FFNWeights, share_E: Tensor | None) -> FFNWeights:
        """The FFN of the means over the copies of each neuron."""
        *before, experts = self.groups
        count, width = experts.neuron_EI.shape
        share_E = torch.ones(count) if share_E is None else share_E
        always = [torch.ones(group.neuron_EI.numel()) for group in before]
        share_S = torch.cat([*always, share_E.float().repeat_interleave(width)])[self.held_S]
        total_F = torch.zeros(len(self.copies_F)).index_add_(0, self.neuron_S, share_S)
        # A neuron whose experts nobody used has no share: then they count the same.
        unused_F = total_F == 0
        share_S = torch.where(unused_F[self.neuron_S], 1.0, share_S)
        share_S /= torch.where(unused_F, self.copies_F.float(), total_F)[self.neuron_S]

        def mean(rows_S: Tensor) -> Tensor:
            """[S, ...] -> [F, ...], summed in float32."""
            held = rows_S[self.held_S].float() * share_S.reshape(-1, *[1] * (rows_S.dim() - 1))
            found = held.new_zeros(len(self.copies_F), *held.shape[1:])
            return found.index_add_(0, self.neuron_S, held).to(rows_S.dtype)

        up_MSD, bias_MS, down_OS = self.rows(like)
        bias_MF = None if bias_MS is None else torch.stack([mean(bias_S) for bias_S in bias_MS])
        up_MFD = torch.stack([mean(up_SD) for up_SD in up_MSD])
        return _ffn(like, up_MFD, bias_MF, mean(down_OS.t()).t().contiguous())

    def drift(self, like: FFNWeights) -> float:
        """The largest difference between two copies of a neuron, over the largest weight."""
        first_S = self.first_F[self.neuron_S]
        up_MSD, bias_MS, down_OS = self.rows(like)
        worst = 0.0
        for rows_S in (*up_MSD, *(() if bias_MS is None else bias_MS), down_OS.t()):
            worst = max(worst, _relative(rows_S[self.held_S], rows_S[first_S]))
        bias_EO = self.groups[-1].down_bias_EO
        return worst if bias_EO is None else max(worst, _relative(bias_EO, bias_EO[:1]))


def _relative(found: Tensor, reference: Tensor) -> float:
    tiny = torch.finfo(found.dtype).tiny
    return float((found - reference).abs().max() / found.abs().max().clamp(min=tiny))


def _bias(experts: ExpertWeights, like: FFNWeights, share_E: Tensor | None = None) -> Tensor | None:
    """The mean of the output biases of the experts, if they have some, and what all share."""
    bias_EO = experts.down_bias_EO
    if bias_EO is None:
        return like.down_bias_O
    if share_E is None or not share_E.any():
        share_E = torch.ones(len(bias_EO))
    mean_O = (share_E.to(bias_EO.dtype) / share_E.sum()) @ bias_EO
    mean_O = bias_EO[0] if (bias_EO == bias_EO[0]).all() else mean_O
    return mean_O if like.down_bias_O is None else mean_O + like.down_bias_O


def _ffn(like: FFNWeights, up_MFD: Tensor, bias_MF: Tensor | None, down_OF: Tensor) -> FFNWeights:
    return FFNWeights(like.pointwise, up_MFD, bias_MF, down_OF, like.down_bias_O)


def _write_ffn(ffn: FFN, parameters: Mapping[str, Tensor], weights: FFNWeights) -> None:
    """The inverse of `upcycle.ir.weights.read_ffn`."""
    matrices = (*weights.up_MFD, weights.down_OF)
    for stored, matrix in zip(read_matrices(ffn, parameters), matrices, strict=True):
        stored.copy_(matrix)
    for i, p in enumerate(ffn.expansions):
        if p.bias is not None and weights.up_bias_MF is not None:
            parameters[p.bias][slice(*p.rows)] = weights.up_bias_MF[i]
    if ffn.contraction.bias is not None and weights.down_bias_O is not None:
        parameters[ffn.contraction.bias].copy_(weights.down_bias_O)
