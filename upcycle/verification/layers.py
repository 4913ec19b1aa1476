"""Tiers T0 and T1 of verification: each converted layer against its dense FFN.

Shape suffixes: T tokens, D d_model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from upcycle.ir.layer_weights import layer_around
from upcycle.ir.measured import Check, LayerDistance
from upcycle.ir.report import plain
from upcycle.ir.rounding import ROUNDING
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import MoEWeights, Provenance, read_ffn
from upcycle.layers.moe import MoE, all_experts
from upcycle.passes.experts import EXPERTS
from upcycle.util.progress import Progress, silent
from upcycle.verification.checks import (
    ALL_EXPERTS,
    DISTINCT,
    LAYER,
    NEURONS,
    TRACED,
    check,
    worst_at,
)
from upcycle.verification.distinct_experts import distinct_experts_error
from upcycle.verification.metrics import distance
from upcycle.verification.traced_rows import lost_neurons, redrawn_rows, untraced_rows

# Applies a function to each spec and gives the results in order; the `map` of a pool, for example.
Map = Callable[[Callable[[MoESpec], LayerDistance], Sequence[MoESpec]], Iterator[LayerDistance]]


@dataclass(frozen=True)
class LayerCase:
    """A converted layer in eval mode, and what it is compared on.

    Attributes:
        x_TD: tokens that it gets in the model; random ones are drawn if None.
        more: fields of `LayerDistance` that are known already.
    """

    layer: MoE
    x_TD: torch.Tensor | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origins:
    """Where the rows of the layers come from.

    Attributes:
        dense: tensors of the dense model, by name; only those of FFNs are read.
        provenance: FFN path -> the dense neurons behind its layer; rows of others are not traced.
        sources: tensors of the models that experts were taken from, if there are several.
    """

    dense: Mapping[str, torch.Tensor]
    provenance: Mapping[str, Provenance]
    sources: Sequence[Mapping[str, torch.Tensor]] = ()


def verify_layers(
    specs: Sequence[MoESpec],
    case_of: Callable[[MoESpec], LayerCase],
    origins: Origins,
    *,
    each: Map = map,
    progress: Progress = silent,
) -> tuple[LayerDistance, ...]:
    """Tiers T0 and T1 of every layer, in the order of `specs`; one layer is in memory at a time.

    `case_of` is called once for each layer. `each` runs the comparisons, perhaps several at a time.
    """
    rows: list[LayerDistance] = []
    for row in each(lambda spec: _row(spec, case_of(spec), origins), specs):
        rows.append(row)
        progress("verifying", len(rows), len(specs))
    return tuple(rows)


@torch.no_grad()
def _row(spec: MoESpec, case: LayerCase, origins: Origins) -> LayerDistance:
    layer, x_TD, found = case.layer, case.x_TD, dict(case.more)
    if x_TD is None:
        x_TD, found["inputs"] = random_tokens(spec, layer), "random tokens"
    origin = origins.provenance.get(spec.ffn.path)
    is_split = EXPERTS[spec.experts.method].kind == "split"
    if origin is not None:
        found["untraced_rows"] = untraced_rows(spec, layer, origin, origins.dense, origins.sources)
        found["redrawn_rows"] = redrawn_rows(origin) or None
        found["lost_neurons"] = lost_neurons(spec, origin) if is_split else None
    layer.router.stand_in(len(x_TD))
    reference = read_ffn(spec.ffn, origins.dense)(x_TD)
    apart = distance(layer.tokens(x_TD), reference)
    _, weights_TK, index_TK = layer.router(x_TD)
    load_E = torch.bincount(index_TK[weights_TK != 0], minlength=spec.num_experts)
    if is_split and not spec.compensate.any:
        with all_experts(layer):
            found["all_experts_relative"] = distance(layer.tokens(x_TD), reference).relative
    return LayerDistance(
        **plain(apart),
        path=spec.ffn.path,
        promise=spec.promise,
        tokens_per_expert=tuple(load_E.tolist()),
        distinct_experts_relative=distinct_experts_error(layer, x_TD),
        **found,
    )


def stored(weights_of: Callable[[MoESpec], MoEWeights]) -> Callable[[MoESpec], LayerCase]:
    """The `case_of` of layers whose weights `weights_of` reads from files."""
    return lambda spec: LayerCase(layer_around(spec.layer_config(), weights_of(spec)))


def random_tokens(spec: MoESpec, layer: MoE) -> torch.Tensor:
    """64 tokens [T, D] of unit variance, the same for the same spec."""
    drawn = torch.randn(64, spec.ffn.d_model, generator=spec.generator("verify"))
    return drawn.to(layer.experts.down_proj)


def layer_checks(rows: Sequence[LayerDistance], dtype: torch.dtype) -> Iterator[Check]:
    """The worst of each figure over all layers, against what rounding in `dtype` allows."""
    redrawn = sum(row.redrawn_rows or 0 for row in rows)
    but = f", but for {redrawn} neurons that were drawn anew" if redrawn else ""
    yield check(f"{TRACED}{but}", sum(row.untraced_rows or 0 for row in rows), 0)
    if lost := [row.lost_neurons for row in rows if row.lost_neurons is not None]:
        yield check(NEURONS, sum(lost), 0)
    exact = {row.path: row.relative for row in rows if row.promise == "exact"}
    every = {
        row.path: row.all_experts_relative for row in rows if row.all_experts_relative is not None
    }
    distinct = {row.path: row.distinct_experts_relative for row in rows}
    for kind, errors in ((LAYER, exact), (ALL_EXPERTS, every), (DISTINCT, distinct)):
        if errors:
            yield worst_at(kind, errors, ROUNDING[dtype])
