"""Two runs of one routed model, where rounding may decide a near tie between experts in two ways.

Such a token meets other experts, and its output is another one, though nothing is wrong. So one run
follows the choices of the other, which leaves rounding in the outputs, and each choice that it
would not have made is held against its own scores: how far would they have to be off?

Shape suffixes: T tokens, E experts (scores: null experts last), K chosen experts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from upcycle.ir.measured import Check
from upcycle.layers.moe import MoE
from upcycle.layers.selection import Selected
from upcycle.verification.checks import CheckKind, check

# What another run chose: for each layer, and each time that it runs, a mask [T, E].
Choices = Mapping[MoE, list[torch.Tensor]]
_DRAWS = 32  # errors of the scores that are tried, of each size


@dataclass
class NearTies:
    """What was seen of a run that followed another.

    Attributes:
        tokens: how many tokens chose experts, each layer counted.
        elsewhere: how many of them would have gone to other experts.
        apart: the error of their scores that explains it, over the largest score of the layer, to
            a factor of two; infinite if none does.
    """

    tokens: int = 0
    elsewhere: int = 0
    apart: float = 0.0

    def check(self, kind: CheckKind, allowed: float) -> Check:
        """`apart` against `allowed`, with the counts."""
        found = check(kind, self.apart, allowed)
        return replace(found, tokens=self.tokens, elsewhere=self.elsewhere)


@contextmanager
def following(choices: Choices) -> Iterator[NearTies]:
    """Within it the layers choose what `choices` say, which they use up, with their own weights."""
    seen = NearTies()
    for layer, masks in choices.items():
        vars(layer.router)["choose"] = _follower(layer.router.choose, masks, seen)
    try:
        yield seen
    finally:
        for layer in choices:
            del vars(layer.router)["choose"]


@contextmanager
def choices_of(model: nn.Module, layers: Sequence[MoE]) -> Iterator[Choices | None]:
    """What `model`, which was loaded from files, chooses within it, for the `layers` behind them.

    None if its experts are not called with tokens, indices and weights, as the interface of
    transformers has it.
    """
    named = model.named_modules()  # beside the experts some have `shared_experts`
    found = [module for name, module in named if name.rpartition(".")[2] == "experts"]
    choices: dict[MoE, list[torch.Tensor]] = {layer: [] for layer in layers}
    if len(found) != len(layers) or not all(_has_interface(module) for module in found):
        yield None
        return

    def watch(layer: MoE) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            index_TK = args[1]
            mask_TE = torch.zeros(len(index_TK), layer.router.num_experts, dtype=torch.bool)
            choices[layer].append(mask_TE.scatter(-1, index_TK.cpu(), value=True))

        return note

    pairs = zip(found, layers, strict=True)
    handles = [module.register_forward_pre_hook(watch(layer)) for module, layer in pairs]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


def _has_interface(module: nn.Module) -> bool:
    code: Any = getattr(type(module).forward, "__wrapped__", type(module).forward).__code__
    return "top_k_index" in code.co_varnames[: code.co_argcount]


def _follower(
    choose: Callable[[torch.Tensor], Selected], masks: list[torch.Tensor], seen: NearTies
) -> Callable[[torch.Tensor], Selected]:
    def follow(logits_TE: torch.Tensor) -> Selected:
        own, want_TE = choose(logits_TE), masks.pop(0).to(logits_TE.device)
        moved_T = (_mask(own, want_TE) != want_TE).any(-1)
        seen.tokens += len(moved_T)
        if not moved_T.any():
            return own
        seen.elsewhere += int(moved_T.sum())
        seen.apart = max(seen.apart, _apart(choose, logits_TE, want_TE, moved_T))
        most = int(want_TE.sum(-1).max())
        index_TK = want_TE.to(torch.uint8).topk(most, dim=-1).indices
        mask_TK = want_TE.gather(-1, index_TK)
        return index_TK, None if mask_TK.all() else mask_TK

    return follow


def _mask(chosen: Selected, like_TE: torch.Tensor) -> torch.Tensor:
    index_TK, mask_TK = chosen
    mask_TK = torch.ones_like(index_TK, dtype=torch.bool) if mask_TK is None else mask_TK
    return torch.zeros_like(like_TE).scatter(-1, index_TK, mask_TK)


def _apart(
    choose: Callable[[torch.Tensor], Selected],
    logits_TE: torch.Tensor,
    want_TE: torch.Tensor,
    moved_T: torch.Tensor,
) -> float:
    """The smallest error of the scores with which each token of `moved_T` would choose `want_TE`.

    It is tried out, so that it holds for every rule: scores of the wanted experts up and the others
    down, which decides the matter for the best k, and then random directions.
    """
    size = logits_TE.abs().max()
    if not size:
        return 0.0  # all scores are equal, and any choice is as good
    draw = torch.Generator(logits_TE.device).manual_seed(0)
    up_TE = torch.full_like(logits_TE, -1.0)
    up_TE[:, : want_TE.shape[1]] += 2.0 * want_TE
    error, left_T = torch.finfo(logits_TE.dtype).eps, moved_T
    while error < 1:
        for attempt in range(_DRAWS):
            sign_TE = torch.randint(2, up_TE.shape, generator=draw, device=up_TE.device) * 2 - 1
            off_TE = (sign_TE if attempt else up_TE) * (error * size)
            made_TE = _mask(choose(logits_TE + off_TE), want_TE)
            left_T = left_T & (made_TE != want_TE).any(-1)
        if not left_T.any():
            return error
        error *= 2
    return math.inf
