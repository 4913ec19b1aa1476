"""A router that looks up the experts of a token by its id, its type, or the domain of its text."""

import torch

from upcycle.layers.config import RouterConfig
from upcycle.layers.router import Router
from upcycle.layers.token_context import TokenContext

REFUSED = -1e4  # a logit whose softmax is zero beside one of 0, and that a loss can still read


class TableRouter(Router):
    """The K experts of a token stand in row ``id mod rows`` of `expert`; each has the score 0.

    It has no parameter. `by` says what the id is: ``token``, ``type`` or ``domain``.

    Roller et al., "Hash Layers", 2021, https://arxiv.org/abs/2106.04426
    """

    expert: torch.Tensor
    given: TokenContext | None = None  # set by `upcycle.layers.token_context.tell_routers`

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        """`expert` [entries, K] int64."""
        self.by = config.by
        entries, k = config.entries, min(self.top_k, rows)
        self.register_buffer("expert", torch.zeros(entries, k, dtype=torch.int64))

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens -> logits [T, E], which depend on their ids alone."""
        if self.given is None:
            raise RuntimeError(f"a router by {self.by} works inside a model, not by itself")
        row_T = self.given.of_tokens(x_TD).remainder(self.expert.shape[0])
        expert_TK = self.expert[row_T]
        logits_TE = x_TD.new_full((x_TD.shape[0], self.num_experts), REFUSED)
        return logits_TE.scatter(-1, expert_TK, 0.0)

    def stand_in(self, count: int) -> None:
        """Let the next `count` tokens have the ids 0, 1, 2, ...: for a layer outside its model."""
        if self.given is None:
            self.given = TokenContext(self.by, None)
        self.given.keep(torch.arange(count, device=self.expert.device))
