"""Markers: which neurons are among the strongest of each token, one bit for each pair.

Shape suffixes: T tokens, t tokens of a chunk, D d_model, F neurons, K groups, B bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights

TINY = 1e-12


@dataclass(frozen=True)
class Markers:
    """F rows of T bits, in chunks of tokens; a chunk is filled up with zeros to whole bytes.

    F * T / 8 bytes: 22 MB for 11008 neurons and 16384 tokens.
    """

    packed: tuple[npt.NDArray[np.uint8], ...]
    tokens: int

    def __len__(self) -> int:
        return len(self.packed[0])

    def chunks(self) -> Iterator[torch.Tensor]:
        """The bits as numbers, [F, t] float32."""
        for bits_FB in self.packed:
            yield torch.from_numpy(np.unpackbits(bits_FB, axis=1)).float()

    def of_neurons(self, neuron_F: torch.Tensor) -> "Markers":
        """The rows of some neurons."""
        return Markers(tuple(bits_FB[neuron_F.numpy()] for bits_FB in self.packed), self.tokens)

    def rate(self) -> torch.Tensor:
        """The part of the tokens that mark each neuron, [F] float32."""
        count_F = sum(np.unpackbits(b, axis=1).sum(1, dtype=np.int64) for b in self.packed)
        return torch.from_numpy(np.asarray(count_F)).float() / max(self.tokens, 1)

    def distances(self, member_KF: torch.Tensor) -> torch.Tensor:
        """The L1 distance of each row to the mean of the members of each group, [K, F] float32.

        For a row b of bits and a mean c it is ``sum c + b (1 - 2 c)``, so matrix products do. The
        squared distance differs by a number that depends on the group alone. So a balanced
        assignment, and the member nearest to the mean, are the same for both, and Lloyd's steps
        never get worse. The total over the members is twice that of the squares.
        """
        member_KF = member_KF.float()
        weight_KF = member_KF / member_KF.sum(1, keepdim=True).clamp(min=1)
        far_KF = torch.zeros_like(member_KF)
        for bits_Ft in self.chunks():
            mean_Kt = weight_KF @ bits_Ft
            far_KF += mean_Kt.sum(1, keepdim=True) + (1 - 2 * mean_Kt) @ bits_Ft.t()
        return far_KF


def mark(ffn: FFNWeights, data: FFNInputs, count: int, *, unit: bool = True) -> Markers:
    """Mark the `count` neurons of largest ``|h|`` in each token; none whose ``h`` is zero.

    With `unit`, tokens and rows count as if scaled to length one: pre-activations are divided by
    the product of the lengths, so that neurons are compared by direction. Activations are held for
    one chunk of tokens at a time.

    Source:
        Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416
    """
    packed = []
    for h_TF in _unit_hidden(ffn, data) if unit else (h for _, h in data.hidden(ffn)):
        top = h_TF.abs().topk(min(count, h_TF.shape[1]), dim=-1)
        bits_TF = torch.zeros(h_TF.shape, dtype=torch.bool)
        bits_TF.scatter_(1, top.indices, top.values > 0)
        packed.append(np.packbits(bits_TF.t().numpy(), axis=1))
    return Markers(tuple(packed), len(data))


def _unit_hidden(ffn: FFNWeights, data: FFNInputs) -> Iterator[torch.Tensor]:
    """Activations [t, F] for tokens and rows of length one, float32."""
    ffn = ffn.to(torch.float32)
    length_MF = ffn.up_MFD.norm(dim=-1).clamp(min=TINY)
    bias_MF = torch.zeros_like(length_MF) if ffn.up_bias_MF is None else ffn.up_bias_MF
    for x_TD in data.chunks():
        length_T1 = x_TD.norm(dim=-1, keepdim=True).clamp(min=TINY)
        z_MTF = x_TD @ ffn.up_MFD.transpose(1, 2) + bias_MF[:, None]
        yield ffn.pointwise(*(z_MTF / (length_MF[:, None] * length_T1)))
