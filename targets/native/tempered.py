"""A tempered router in memory, as the files have it, to compare the two and to measure it.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.ir.spec import MoESpec
from upcycle.layers.moe import MoE
from upcycle.targets.native.architecture import NativeTarget, RouterRule
from upcycle.targets.native.fold_router import Fold, fold_of, temper
from upcycle.util.modules import set_within


@dataclass
class Tempering:
    """What tempering changed while it was watched.

    Attributes:
        weight_error: the largest distance of a weight from that of the recipe, relative to it.
        tokens: how many tokens were routed, each layer counted.
        elsewhere: how many of them went to other experts.
    """

    weight_error: float = 0.0
    tokens: int = 0
    elsewhere: int = 0


@contextmanager
def tempered(
    layers: Iterable[tuple[MoESpec, MoE]], target: NativeTarget, *, every: bool = False
) -> Iterator[Tempering]:
    """Within it the routers of `layers` compute what the files say.

    With `every` they choose all experts: then no tie can be decided otherwise than by the reader
    of the files, for whom the last bit of an input may differ.
    """
    seen = Tempering()
    with ExitStack() as undo:
        for spec, layer in layers:
            hook = _hook(seen, target.forms[0], fold_of(target, spec), spec, every=every)
            undo.callback(layer.router.register_forward_hook(hook).remove)
        yield seen


@contextmanager
def every_expert(native: nn.Module, count: int) -> Iterator[None]:
    """Within it a model that transformers loaded visits all `count` experts."""
    routers: list[Any] = [m for m in native.modules() if isinstance(getattr(m, "top_k", None), int)]
    with ExitStack() as undo:
        for router in routers:
            set_within(undo, router, "top_k", count)
        yield


def is_tempered(target: NativeTarget | None, specs: Sequence[MoESpec]) -> bool:
    """Whether a target that `choose` returned has tempered routers."""
    return target is not None and fold_of(target, specs[0]).tempered


def _hook(seen: Tempering, form: RouterRule, made: Fold, spec: MoESpec, *, every: bool) -> Any:
    factor = made.down * (made.config[form.factor] if form.factor else 1.0)

    def as_written(router: Any, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        logits_TE, weights_TK, index_TK = output
        bias_E = None
        if made.bias and router.bias is not None:  # it only takes part in the choice
            bias_E = router.bias.to(logits_TE.dtype)
            logits_TE = logits_TE - bias_E
        small = temper(router.weight.float())
        scaled_TE = logits_TE * small
        p_TE = scaled_TE.softmax(-1) if form.score == "softmax" else scaled_TE.sigmoid()
        score_TE = scaled_TE if form.by_logits else p_TE
        choice_TE = score_TE if bias_E is None else score_TE + bias_E * small * made.bias
        k = spec.num_experts if every else spec.top_k
        new_TK = choice_TE.topk(k, dim=-1).indices
        p_TK = p_TE.gather(-1, new_TK)
        if form.renormalise:
            p_TK = p_TK / p_TK.sum(-1, keepdim=True)
        p_TK = p_TK * factor
        if not every:
            seen.weight_error = max(seen.weight_error, (p_TK / spec.scale - 1).abs().max().item())
            seen.tokens += len(new_TK)
            moved_T = (new_TK.sort(-1).values != index_TK.sort(-1).values).any(-1)
            seen.elsewhere += int(moved_T.sum())
        return output[0], p_TK.to(weights_TK.dtype), new_TK

    return as_written
