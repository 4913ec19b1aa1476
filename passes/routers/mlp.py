"""A small network that predicts what each expert would add, distilled on calibration tokens.

Shape suffixes: T tokens, D d_model, E experts, H hidden width of the router.
"""

import logging
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from upcycle.ir.spec import MoESpec
from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.avg_key import keys
from upcycle.passes.routers.contributions import contributions
from upcycle.passes.routers.method import RouterMethod, no_nulls

EPOCHS, BATCH, RATE = 30, 512, 1e-2
HELD_OUT = 10  # one token in ten is held out: those decide which epoch is kept

log = logging.getLogger(__name__)


def mlp(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Train ``W2 tanh(W1 x / |x|)`` to say which experts add most.

    The target of an expert is its share of the largest contribution that was seen (see
    `passes.routers.contributions`), and the loss the cross entropy of its sigmoid. The start is the
    mean of the keys of each expert, of length one, and the identity (drawn from N(0, 1 / H) where
    `router.hidden` is not E). Of all epochs, the start among them, the one is kept whose `top_k`
    choices capture most of the contribution on held-out tokens; the log says how much.

    Memory: T * (D + E) float32.

    Returns:
        ``weight_in`` [H, D], ``weight_out`` [E, H] and, if ``router.bias``, ``bias`` [E]; float32.
        H is ``router.hidden``, E if that is 0.

    Source:
        Zhang et al., "MoEfication", 2021, section 3.2, https://arxiv.org/abs/2110.01786
    """
    spec, generator = dense.spec, dense.generator
    pairs = list(contributions(dense.ffn, parts.experts.neuron_EI, dense.data))
    x_TD = F.normalize(torch.cat([x for x, _ in pairs]), dim=-1)
    size_TE = torch.cat([size for _, size in pairs])
    order_T = torch.randperm(len(x_TD), generator=generator)
    held_T, rest_T = order_T[: len(order_T) // HELD_OUT], order_T[len(order_T) // HELD_OUT :]
    if not len(held_T):  # so few tokens that they have to do for both
        held_T = rest_T
    tensors = [t.requires_grad_() for t in _start(parts, spec, generator)]
    target_TE = size_TE / size_TE.max().clamp(min=torch.finfo(torch.float32).tiny)
    optimizer = torch.optim.Adam(tensors, lr=RATE)
    best, kept = -1.0, tensors
    for epoch in range(EPOCHS + 1):
        if epoch:
            shuffled_T = rest_T[torch.randperm(len(rest_T), generator=generator)]
            for some in torch.split(shuffled_T, BATCH):
                with torch.enable_grad():  # calibration runs without
                    logits_TE = _logits(tensors, x_TD[some])
                    loss = F.binary_cross_entropy_with_logits(logits_TE, target_TE[some])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        with torch.no_grad():
            captured = captured_mass(_logits(tensors, x_TD[held_T]), size_TE[held_T], spec.top_k)
        if captured > best:
            best, kept = captured, [tensor.detach().clone() for tensor in tensors]
    log.info("%s: the router captures %.4f of the contribution", spec.ffn.path, best)
    names = ("weight_in", "weight_out", "bias")
    return dict(zip(names, kept, strict=False))


def captured_mass(logits_TE: torch.Tensor, size_TE: torch.Tensor, k: int) -> float:
    """The part of the summed sizes that belongs to the k experts with the best logits."""
    chosen_TK = logits_TE.topk(k, dim=-1).indices
    total = size_TE.double().sum()
    return float(size_TE.gather(-1, chosen_TK).double().sum() / total) if total > 0 else 1.0


def _start(parts: Parts, spec: MoESpec, generator: torch.Generator) -> list[torch.Tensor]:
    count, width = spec.num_experts, spec.router_config().hidden
    if width == count:
        key_ED = F.normalize(keys(parts), dim=-1).sum(1)
        into, out = F.normalize(key_ED, dim=-1), torch.eye(count)
    else:
        into = torch.randn(width, parts.experts.up_EGD.shape[-1], generator=generator)
        out = torch.randn(count, width, generator=generator) / width**0.5
    return [into, out, *([torch.zeros(count)] if spec.router.bias else [])]


def _logits(tensors: Sequence[torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
    into, out, *bias = tensors
    return F.linear(F.linear(x_TD, into).tanh(), out, *bias)


MLP = RouterMethod(
    name="mlp",
    build=mlp,
    kinds=frozenset({"split", "subsets"}),
    otherwise="learns what parts of an FFN add, and copies all add the same; "
    "use an expert method that splits",
    needs="activations",
    makes="mlp",
    facts=lambda router, ffn, num_experts: {"hidden": router.hidden or num_experts},
    reads=frozenset({"hidden"}),
    limits=(no_nulls,),
)
