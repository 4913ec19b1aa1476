"""Which experts of a layer the calibration tokens visit, and how much of the FFN that captures.

Shape suffixes: T tokens, D d_model, E experts, K chosen experts, F neurons of the FFN.
"""

import math
from collections.abc import Iterator

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.layer_weights import layer_around
from upcycle.ir.measured import Usage
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, MoEWeights
from upcycle.layers.token_context import TokenContext
from upcycle.passes.experts.split import membership


@torch.no_grad()
def routed_tokens(
    spec: MoESpec, ffn: FFNWeights, made: MoEWeights, seen: FFNInputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Route the tokens of `seen` by the router of `made`; 2048 at a time, float32.

    For each t tokens: inputs [t, D], hidden activations of the dense FFN [t, F], weights [t, E].
    `spec` is the plan of a layer with exactly the tensors of `made`.
    """
    router = layer_around(spec.layer_config(), made).router
    by: str | None = getattr(router, "by", None)
    ids_T = {"token": seen.id_T, "domain": seen.domain_T}.get(by or "")
    given = TokenContext(by or "token", None)
    if by is not None:
        router.given = given  # type: ignore[assignment]  # no module
    done = 0
    for x_TD, h_TF in seen.hidden(ffn):
        rows = torch.arange(done, done + len(x_TD))
        given.keep(rows if ids_T is None else ids_T[rows])
        done += len(x_TD)
        _, weights_TK, index_TK = router(x_TD)
        weights_TE = torch.zeros(len(x_TD), spec.num_experts)
        yield x_TD, h_TF, weights_TE.scatter_(1, index_TK, weights_TK)


@torch.no_grad()
def usage(spec: MoESpec, ffn: FFNWeights, made: MoEWeights, seen: FFNInputs) -> Usage:
    """The load of the experts on calibration tokens.

    `captured_mass` is the part of ``sum_j |h_j| ||d_j||`` over all tokens and neurons that is in
    experts which the token visits, or in the shared one: 1 if nothing is left out. `load_entropy`
    is that of the loads relative to ``log E``: 1 if all experts are visited equally often.
    `compensation` has the figures of `upcycle.passes.transform.compensate`, if it fitted anything.

    `made` is what `ffn` became, and `seen` what it was given. Memory: the hidden activations of
    2048 tokens.
    """
    d_ff = ffn.down_OF.shape[1]
    member_EF = membership(made.experts.neuron_EI, d_ff)
    shared_F = torch.zeros(d_ff)
    shared_F[made.provenance.shared_S] = 1
    length_F = ffn.down_OF.float().norm(dim=0)
    load_E = torch.zeros(spec.num_experts, dtype=torch.int64)
    captured, total = 0.0, 0.0
    for _, h_TF, weights_TE in routed_tokens(spec, ffn, made, seen):
        visited_TE = (weights_TE != 0).float()
        load_E += visited_TE.sum(0).long()
        mass_TF = h_TF.abs() * length_F
        there_TF = (visited_TE @ member_EF + shared_F).clamp(max=1)
        captured += (mass_TF * there_TF).sum(dtype=torch.float64).item()
        total += mass_TF.sum(dtype=torch.float64).item()
    return Usage(
        path=spec.ffn.path,
        tokens=len(seen),
        tokens_per_expert=tuple(load_E.tolist()),
        dead_experts=int((load_E == 0).sum()),
        load_entropy=_entropy(load_E),
        captured_mass=captured / total if total else 1.0,
        compensation=dict(made.figures) or None,
    )


def _entropy(load_E: torch.Tensor) -> float:
    if len(load_E) == 1 or not load_E.any():
        return 1.0
    part_E = load_E.double() / load_E.sum()
    return float(torch.special.entr(part_E).sum()) / math.log(len(load_E))
