"""How far two tensors, and two language models, are apart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from upcycle.errors import VerificationError
from upcycle.ir.measured import Distance, LanguageModel

# The largest relative error that counts as rounding, for the dtype of the computation. A residual
# stack of L layers with sums of n products errs by about sqrt(L * n) eps; 84 eps in float32 and
# float64 and 2.5 eps in the half types (whose products are summed in float32) cover L * n up to
# 7000 at the typical error of 1 eps and leave a wrong expert, at 1e-2 and more, far outside.
ROUNDING = {
    torch.float64: 2e-14,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}


def distance(actual: torch.Tensor, reference: torch.Tensor) -> Distance:
    """Compare two tensors of one shape, [..., d]; vectors are along the last axis.

    A difference that is NaN counts as infinite; equal infinities do not differ.
    """
    a, r = (t.detach().double().cpu() for t in (actual, reference))
    if r.dim() == 0:
        a, r = a[None], r[None]
    gap = torch.where(a == r, 0.0, (a - r).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    max_abs = gap.max().item()
    finite = r[r.isfinite()]
    largest = finite.abs().max().item() if len(finite) else 0.0
    cosine = F.cosine_similarity(a, r, dim=-1).nan_to_num(nan=-1.0)
    cosine[((a == 0) & (r == 0)).all(-1)] = 1.0  # two vectors of zeros point the same way
    return Distance(
        max_abs=max_abs,
        relative=max_abs / largest if largest else (0.0 if max_abs == 0 else math.inf),
        rms=math.inf if math.isinf(max_abs) else (gap.norm() / r.norm().clamp(min=1e-300)).item(),
        min_cosine=cosine.min().item(),
        mean_cosine=cosine.mean().item(),
    )


def check_outputs(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Raise VerificationError unless `ours`, the outputs of `what`, have the shapes of `theirs`."""
    for name, reference in theirs.items():
        if name not in ours or ours[name].shape != reference.shape:
            raise VerificationError(f"{what} does not return {name} {list(reference.shape)}")


@dataclass
class LanguageModelDistance:
    """Streaming comparison of next-token predictions.

    `update` takes logits [B, S, V] of the two models for tokens [B, S].
    """

    tokens: int = 0
    kl_sum: float = 0.0
    agreed: int = 0
    dense_nll: float = 0.0
    converted_nll: float = 0.0

    def update(
        self, dense_BSV: torch.Tensor, converted_BSV: torch.Tensor, token_BS: torch.Tensor
    ) -> None:
        """Add one batch; the first token of each row is not predicted."""
        dense = dense_BSV[:, :-1].double().log_softmax(-1)
        converted = converted_BSV[:, :-1].double().log_softmax(-1)
        target = token_BS[:, 1:, None]
        self.tokens += target.numel()
        self.kl_sum += (dense.exp() * (dense - converted)).sum().item()
        self.agreed += int((dense.argmax(-1) == converted.argmax(-1)).sum())
        self.dense_nll -= dense.gather(-1, target).sum().item()
        self.converted_nll -= converted.gather(-1, target).sum().item()

    def result(self) -> LanguageModel:
        """The means over all batches; perplexities are at most e^700."""
        n = max(self.tokens, 1)
        return LanguageModel(
            tokens=self.tokens,
            kl=self.kl_sum / n,
            top1_agreement=self.agreed / n,
            dense_perplexity=math.exp(min(self.dense_nll / n, 700)),
            converted_perplexity=math.exp(min(self.converted_nll / n, 700)),
        )
