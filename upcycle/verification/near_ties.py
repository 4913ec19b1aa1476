"""Two runs of one routed model, where rounding may decide a near tie between experts in two ways.

Such a token visits other experts and has another output, though nothing is wrong. So one run
follows the choices of the other, which leaves rounding in the outputs, and each choice that it
would not have made is compared with its own scores: how far would they have to be off?

Shape suffixes: T tokens, E experts (scores: null experts last), K chosen experts.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from upcycle.ir.measured import Check
from upcycle.layers.moe import MoE
from upcycle.layers.selection import Selected
from upcycle.verification.checks import check

# What another run chose: for each layer, and each time that it runs, a mask [T, E].
Choices = Mapping[MoE, list[torch.Tensor]]
_DRAWS = 32  # errors of the scores that are tried, of each size


@dataclass
class NearTies:
    """How the choices of a run differ from those of the run that it followed.

    Attributes:
        tokens: choices, one for each token of each layer.
        elsewhere: how many of them differ.
        apart: the error of the scores that explains it, over the largest score of the layer, to
            a factor of two; infinite if none does.
    """

    tokens: int = 0
    elsewhere: int = 0
    apart: float = 0.0

    def check(self, what: str, allowed: float) -> Check:
        """`apart` against `allowed`, with the counts."""
        found = check(what, self.apart, allowed)
        return replace(found, tokens=self.tokens, elsewhere=self.elsewhere)


@contextmanager
def following(choices: Choices) -> Iterator[NearTies]:
    """Within it the layers take their experts from `choices`, which they use up."""
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
    """What `model`, loaded from the files of `layers`, chooses within it.

    None if its experts are not called with tokens, indices and weights, as in the experts interface
    of transformers.
    """
    named = model.named_modules()  # some have `shared_experts`, too
    found = [module for name, module in named if name.rpartition(".")[2] == "experts"]
    choices: dict[MoE, list[torch.Tensor]] = {layer: [] for layer in layers}
    if len(found) != len(layers) or not all(_has_interface(module) for module in found):
        yield None
        return

    def watch(layer: MoE) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            choices[layer].append(chosen((args[1].cpu(), None), layer.router.num_experts))

        return note

    with ExitStack() as hooks:
        for module, layer in zip(found, layers, strict=True):
            hooks.enter_context(module.register_forward_pre_hook(watch(layer)))
        yield choices


def _has_interface(module: nn.Module) -> bool:
    return "top_k_index" in inspect.signature(type(module).forward).parameters


def _follower(
    choose: Callable[[torch.Tensor], Selected], masks: list[torch.Tensor], seen: NearTies
) -> Callable[[torch.Tensor], Selected]:
    def follow(logits_TE: torch.Tensor) -> Selected:
        own, want_TE = choose(logits_TE), masks.pop(0).to(logits_TE.device)
        moved_T = (chosen(own, want_TE.shape[1]) != want_TE).any(-1)
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


def chosen(selected: Selected, num_experts: int) -> torch.Tensor:
    """Which experts each token visits, [T, E] bool."""
    index_TK, mask_TK = selected
    mask_TK = torch.ones_like(index_TK, dtype=torch.bool) if mask_TK is None else mask_TK
    return mask_TK.new_zeros(len(index_TK), num_experts).scatter(-1, index_TK, mask_TK)


def _apart(
    choose: Callable[[torch.Tensor], Selected],
    logits_TE: torch.Tensor,
    want_TE: torch.Tensor,
    moved_T: torch.Tensor,
) -> float:
    """The smallest error of the scores with which each token of `moved_T` would choose `want_TE`.

    It is found by trial, so that it holds for every rule: first with the scores of the wanted
    experts up and the others down, which suffices for the best k, then in random directions.
    """
    size = logits_TE.abs().max()
    if not size:
        return 0.0  # all scores are equal: every choice is right
    draw = torch.Generator(logits_TE.device).manual_seed(0)
    up_TE = torch.full_like(logits_TE, -1.0)
    up_TE[:, : want_TE.shape[1]] += 2.0 * want_TE
    error, left_T = torch.finfo(logits_TE.dtype).eps, moved_T
    while error < 1:
        for attempt in range(_DRAWS):
            sign_TE = torch.randint(2, up_TE.shape, generator=draw, device=up_TE.device) * 2 - 1
            off_TE = (sign_TE if attempt else up_TE) * (error * size)
            made_TE = chosen(choose(logits_TE + off_TE), want_TE.shape[1])
            left_T = left_T & (made_TE != want_TE).any(-1)
        if not left_T.any():
            return error
        error *= 2
    return math.inf
