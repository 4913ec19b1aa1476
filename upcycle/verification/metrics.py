"""How far two tensors, and two language models, are apart."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from upcycle.errors import VerificationError
from upcycle.ir.measured import Distance, LanguageModel


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


def compare_predictions(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> LanguageModel:
    """Compare next-token predictions: dense and converted logits [B, S, V] for tokens [B, S].

    The first token of each row is not predicted. Means are over all tokens; perplexities are at
    most e^700.
    """
    tokens, kl, agreed, dense_nll, converted_nll = 0, 0.0, 0, 0.0, 0.0
    for dense_BSV, converted_BSV, token_BS in batches:
        dense = dense_BSV[:, :-1].double().log_softmax(-1)
        converted = converted_BSV[:, :-1].double().log_softmax(-1)
        target = token_BS[:, 1:, None]
        tokens += target.numel()
        kl += (dense.exp() * (dense - converted)).sum().item()
        agreed += int((dense.argmax(-1) == converted.argmax(-1)).sum())
        dense_nll -= dense.gather(-1, target).sum().item()
        converted_nll -= converted.gather(-1, target).sum().item()
    n = max(tokens, 1)
    return LanguageModel(
        tokens=tokens,
        kl=kl / n,
        top1_agreement=agreed / n,
        dense_perplexity=math.exp(min(dense_nll / n, 700)),
        converted_perplexity=math.exp(min(converted_nll / n, 700)),
    )
