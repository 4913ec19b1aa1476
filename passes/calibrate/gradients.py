"""How much each neuron matters to what the model computes: ``|h dL/dh|``, from one backward pass.

Shape suffixes: T tokens, D d_model, F neurons, N domains, B sequences of a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UsageError, first_line
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.layers.moe import MoE
from upcycle.passes.calibrate.sites import Site, run_batch, sites_of, tokens_of

# Sums up what is differentiated: of the output of the model, its inputs, and the batch's number.
Objective = Callable[[Any, ExampleInputs, int], torch.Tensor]


def importance(
    model: nn.Module,
    layers: Sequence[tuple[MoESpec, MoE]],
    batches: Sequence[ExampleInputs],
    *,
    dense: Callable[[MoESpec], FFNWeights],
    objective: Objective,
    domains: Sequence[torch.Tensor] | None = None,
) -> Mapping[str, torch.Tensor]:
    """The mean of ``|h_j dL/dh_j|`` over the tokens of each domain, for each neuron j of each FFN.

    To first order it is how much L changes if the neuron is silenced in one token.

    Args:
        model: has the layers, whose dense FFNs are run in their place; its weights get no gradient.
        layers, batches, dense, domains: as in `calibrate`; `dense` is called twice for each batch.
        objective: L, a sum over tokens, so that it does not matter how they are batched.

    Returns:
        FFN path -> [N, F] float32, with N = 1 if there are no domains; zeros for a domain without
        tokens. Memory: what autograd keeps of one batch, and one FFN; its hidden activations are
        computed again in the backward pass.

    Raises:
        UsageError: no gradient gets from L to an FFN, or it is not finite.
    """
    count = 1 if domains is None else 1 + max(int(domain_B.max()) for domain_B in domains)
    places = [_Place(Site(spec, layer), dense, count) for spec, layer in layers]
    with sites_of(model, [place.site for place in places]), _frozen(model):
        for i, batch in enumerate(batches):
            for place in places:
                place.batch = batch, None if domains is None else domains[i]
                place.site.replace_tokens(place.tokens)
            with torch.enable_grad():
                total = objective(run_batch(model, batch), batch, i)
            _backward(total)
    return {place.site.spec.ffn.path: place.mean() for place in places}


def _backward(total: torch.Tensor) -> None:
    try:
        total.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = first_line(error).rstrip(".")
        raise UsageError(
            f"the model gives no gradients, which the recipe's methods look at ({reason}); choose "
            "methods that need none"
        ) from error


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient within it."""
    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        yield


@dataclass(eq=False)
class _Place:
    """A site where the dense FFN runs and is measured."""

    site: Site
    dense: Callable[[MoESpec], FFNWeights]
    count: int
    batch: tuple[ExampleInputs, torch.Tensor | None] = ((), None)
    is_met: bool = False
    total_NF: torch.Tensor = field(init=False)
    tokens_N: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total_NF = torch.zeros(self.count, self.site.spec.ffn.d_ff)
        self.tokens_N = torch.zeros(self.count)

    def tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        if not x_TD.requires_grad:  # nothing before it does: here the gradient ends
            x_TD = x_TD.detach().requires_grad_()
        batch, domain_B = self.batch
        numbers_T1 = torch.arange(len(x_TD), device=x_TD.device)[:, None]
        kept = tokens_of(batch, numbers_T1, self.site.shape, domain_B)
        y_TO: torch.Tensor = _Measured.apply(  # type: ignore[no-untyped-call]
            x_TD, self, kept.x[0][:, 0], kept.domain_T
        )
        return y_TO

    def add(
        self, size_TF: torch.Tensor, kept_T: torch.Tensor, domain_T: torch.Tensor | None
    ) -> None:
        self.is_met = True
        domain_T = torch.zeros_like(kept_T) if domain_T is None else domain_T
        size_TF, domain_T = size_TF[kept_T].float().cpu(), domain_T.cpu()
        self.total_NF.index_add_(0, domain_T, size_TF)
        self.tokens_N += torch.bincount(domain_T, minlength=self.count)

    def mean(self) -> torch.Tensor:
        path = self.site.path
        if not self.is_met:
            raise UsageError(
                f"{path}: no gradient gets to this FFN, which the recipe's methods look at; choose "
                "methods that need none, or leave it out with `layers.exclude`"
            )
        if not self.total_NF.isfinite().all():
            raise UsageError(f"{path}: its gradients are not finite; load the model in float32")
        return self.total_NF / self.tokens_N.clamp(min=1)[:, None]


class _Measured(torch.autograd.Function):
    """A dense FFN that keeps its input alone, and measures itself on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        place: _Place,
        kept_T: torch.Tensor,
        domain_T: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD)
        ctx.place, ctx.kept_T, ctx.domain_T = place, kept_T, domain_T
        return place.dense(place.site.spec)(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (slope_TO,) = grads
        (x_TD,) = ctx.saved_tensors
        ffn = ctx.place.dense(ctx.place.site.spec)
        slope_TF = slope_TO @ ffn.down_OF
        with torch.enable_grad():
            x_TD = x_TD.detach().requires_grad_()
            h_TF = ffn.hidden(x_TD)
        (slope_TD,) = torch.autograd.grad(h_TF, x_TD, slope_TF)
        ctx.place.add((h_TF.detach() * slope_TF).abs(), ctx.kept_T, ctx.domain_T)
        return slope_TD, None, None, None
