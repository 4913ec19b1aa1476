"""What was decided: one `MoESpec` for each FFN that is converted. Plain data, no tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from upcycle.ir.ffn import FFN, Located
from upcycle.layers.config import (
    SELECT_ARGUMENTS,
    LayerConfig,
    RouterConfig,
    SelectConfig,
)
from upcycle.recipe import schema as recipe

Promise = Literal["exact", "exact with all experts", "approximate"]


@dataclass(frozen=True)
class MoESpec:
    """The MoE layer that one dense FFN becomes.

    Attributes:
        experts, router, compensate: the recipe's sections, with what is special to the methods.
        num_experts: routed experts (copies times granularity for granular upcycling).
        width: neurons of one routed expert, zero padding included.
        shared: neurons of the shared expert, which every token visits.
        expert_bias: each expert is a whole FFN and has the output bias of one.
        top_k: routed experts that a token visits, at most; `select` may leave some out.
        scale: factor on the expert weights at run time.
        promise: what the algebra of the method says about equality with the dense FFN.
        seed: of this layer's random draws; differs from layer to layer.
        router_kind: a key of `upcycle.layers.routers.ROUTER_KINDS`, or of OTHER_KINDS.
        router_facts: what the kind or the method sets in the configuration of the router.
    """

    ffn: FFN
    experts: recipe.Experts
    router: recipe.Router
    compensate: recipe.Compensate
    num_experts: int
    width: int
    shared: int
    top_k: int
    scale: float
    promise: Promise
    seed: int
    router_kind: str = "linear"
    router_facts: dict[str, Any] = field(default_factory=dict)
    expert_bias: bool = False

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh generator for one purpose, so that adding a draw does not shift another."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        # torch's CPU generator reads the low 32 bits of a seed only.
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    @property
    def source_E(self) -> list[int]:
        """Which of ``experts.sources`` each expert is taken from; empty if there are none."""
        count = len(self.experts.sources)
        return [e * count // self.num_experts for e in range(self.num_experts)] if count else []

    @property
    def low_rank(self) -> int:
        """The rank of the linear map that every token gets; 0 if there is none."""
        wanted = self.compensate.low_rank
        return wanted if isinstance(wanted, int) else round(wanted * self.ffn.d_model)

    def router_config(self) -> RouterConfig:
        """The configuration of the runtime router."""
        router = self.router
        arguments = {n: getattr(router, n) for n in SELECT_ARGUMENTS.get(router.select, ())}
        select = SelectConfig(rule=router.select, k=self.top_k, **arguments)
        settings: dict[str, Any] = {
            "kind": self.router_kind,
            "num_experts": self.num_experts,
            "d_model": self.ffn.d_model,
            "select": select,
            "weights": router.weights,
            "scale": self.scale,
            "bias": bool(router.bias),
            "tied": router.tied,
            "balance": router.balance,
            "nulls": select.nulls,
        }
        return RouterConfig(**settings | self.router_facts)

    def layer_config(self) -> LayerConfig:
        """The configuration of the runtime layer."""
        ffn = self.ffn
        has_offset = self.compensate.mean or self.compensate.affine
        is_shared = ffn.contraction.bias is not None and not (self.expert_bias and not self.shared)
        return LayerConfig(
            num_experts=self.num_experts,
            width=self.width,
            shared=self.shared,
            low_rank=self.low_rank,
            d_model=ffn.d_model,
            d_out=ffn.d_out,
            axis=ffn.axis,
            pointwise=ffn.pointwise,
            up_bias=ffn.has_up_bias,
            output_bias=is_shared or has_offset,
            expert_bias=self.expert_bias,
            router=self.router_config(),
            hidden_dropout=ffn.hidden_dropout,
            output_dropout=ffn.output_dropout,
        )

    def site(self) -> dict[str, Any]:
        """Where the layer goes and what it is, as `upcycle.graphs.install` takes it."""
        return site_of(self.ffn, self.layer_config())


def site_of(ffn: FFN, layer: LayerConfig) -> dict[str, Any]:
    """Where the `layer` of an FFN goes and what it is, as `upcycle.graphs.install` takes it."""
    modules = {p.module: p for p in ffn.expansions}
    kept: dict[str, Any] = {}
    if ffn.shared:  # what the taps and the contraction go on computing beside the layer
        kept = {
            "rows": [[list(run) for run in ffn.rows_of(module)] for module in modules],
            "biases": [p.bias is not None for p in modules.values()],
            "columns": list(ffn.contraction.columns or ()),
            "hidden": ffn.hidden_width,
        }
    in_graph = {"regions": [list(ends) for ends in ffn.regions], "place": ffn.place}
    return (in_graph if ffn.regions else {}) | {
        "path": ffn.path,
        "placement": ffn.placement,
        "expansions": list(modules),
        "contraction": ffn.contraction.module,
        "tap_widths": list(ffn.tap_widths),
        "kept": kept,
        "layer": layer.to_json(),
    }


@dataclass(frozen=True)
class Plan:
    """The whole decision: what was found, and what each converted FFN becomes.

    `runtimes` must run the checkpoint; `architecture`, unless None, is the one it is written in.
    """

    located: Located
    specs: tuple[MoESpec, ...]
    recipe: recipe.Recipe
    recipe_name: str
    runtimes: tuple[str, ...] = ()
    architecture: str | None = None

    def requiring(self, runtimes: Sequence[str], architecture: str | None) -> "Plan":
        """The same plan with these requirements."""
        return replace(self, runtimes=tuple(runtimes), architecture=architecture)

    @property
    def promise(self) -> Promise:
        """The weakest promise among the layers."""
        order: list[Promise] = ["exact", "exact with all experts", "approximate"]
        return max((spec.promise for spec in self.specs), key=order.index)
