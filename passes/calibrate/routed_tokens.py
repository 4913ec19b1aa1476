"""Which experts the calibration tokens visit, with what weights.

Shape suffixes: T tokens, D d_model, E experts, F neurons, I neurons of an expert.
"""

from collections.abc import Iterator

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.layer_weights import layer_around
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, MoEWeights
from upcycle.layers.token_context import TokenContext


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
