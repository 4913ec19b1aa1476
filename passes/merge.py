"""Merge: the dense model back from a converted one whose experts are a split of its neurons."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from upcycle.errors import UnsupportedError
from upcycle.ir.ffn import FFN
from upcycle.ir.layer_weights import weights_of
from upcycle.ir.partial_projection import write_kept
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, Provenance, read_ffn, read_matrices
from upcycle.layers.moe import MoE
from upcycle.passes.transform.transform import merge_to_dense
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
    merged = copy_of(dense)
    trained = tensors_of(converted)
    with torch.no_grad():
        for name, tensor in tensors_of(merged).items():
            if name in trained and trained[name].shape == tensor.shape:
                tensor.copy_(trained[name])
        parameters = dict(merged.named_parameters(remove_duplicate=False))
        for path, (spec, layer) in layers.items():
            for kept in spec.ffn.kept:
                write_kept(kept, parameters, trained[kept.name])
            _write_ffn(spec.ffn, parameters, _merged(spec, layer, provenance[path], parameters))
    return merged


def _merged(
    spec: MoESpec, layer: MoE, provenance: Provenance, parameters: Mapping[str, torch.Tensor]
) -> FFNWeights:
    if layer.low_rank is not None:
        raise UnsupportedError(
            f"{spec.ffn.path}: the layer has a low-rank term, which no dense FFN holds; convert "
            "without `compensate.low_rank` to merge it later"
        )
    weights = weights_of(layer, provenance)
    whole = merge_to_dense(weights.experts, read_ffn(spec.ffn, parameters), weights.shared)
    return replace(whole, down_bias_O=layer.output_bias)


def _write_ffn(ffn: FFN, parameters: Mapping[str, torch.Tensor], weights: FFNWeights) -> None:
    """The inverse of `upcycle.ir.weights.read_ffn`."""
    matrices = (*weights.up_MFD, weights.down_OF)
    for stored, matrix in zip(read_matrices(ffn, parameters), matrices, strict=True):
        stored.copy_(matrix)
    for i, p in enumerate(ffn.expansions):
        if p.bias is not None and weights.up_bias_MF is not None:
            parameters[p.bias][slice(*p.rows)] = weights.up_bias_MF[i]
    if ffn.contraction.bias is not None and weights.down_bias_O is not None:
        parameters[ffn.contraction.bias].copy_(weights.down_bias_O)
