"""Tiers T0 and T1 of verification: one converted layer against its dense FFN."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import Provenance, read_ffn
from upcycle.layers.moe import MoE, all_experts
from upcycle.passes.experts import EXPERTS
from upcycle.verification.checks import LAYER_CHECKS, Check, check
from upcycle.verification.distinct_experts import distinct_experts_error
from upcycle.verification.metrics import ROUNDING, distance
from upcycle.verification.traced_rows import lost_neurons, redrawn_rows, untraced_rows


@torch.no_grad()
def layer_report(
    spec: MoESpec,
    layer: MoE,
    x_TD: torch.Tensor,
    parameters: Mapping[str, torch.Tensor],
    origin: Provenance | None,
    sources: Sequence[Mapping[str, torch.Tensor]] = (),
) -> dict[str, Any]:
    """What was measured of one layer, as plain data.

    Args:
        spec: the plan of the layer.
        layer: with its weights, in eval mode.
        x_TD: tokens [T, D] to compare on.
        parameters: of the dense model, by name.
        origin: the dense neurons behind the layer; None where they are not known, and then the
            rows are not traced.
        sources: parameters of the models that experts were taken from, if there are several.
    """
    row: dict[str, Any] = {"path": spec.ffn.path, "promise": spec.promise}
    is_split = EXPERTS[spec.experts.method].kind == "split"
    if origin is not None:
        row["untraced_rows"] = untraced_rows(spec, layer, origin, parameters, sources)
        if redrawn := redrawn_rows(origin):
            row["redrawn_rows"] = redrawn
        if is_split:
            row["lost_neurons"] = lost_neurons(spec, origin)
    layer.router.stand_in(len(x_TD))
    reference = read_ffn(spec.ffn, parameters)(x_TD)
    row |= distance(layer.tokens(x_TD), reference).to_json()
    _, weights_TK, index_TK = layer.router(x_TD)
    load = torch.bincount(index_TK[weights_TK != 0], minlength=spec.num_experts)
    row["tokens_per_expert"] = load.tolist()
    if is_split and not spec.compensate.any:
        with all_experts(layer):
            row["all_experts_relative"] = distance(layer.tokens(x_TD), reference).relative
    row["distinct_experts_relative"] = distinct_experts_error(layer, x_TD)
    return row


def random_tokens(spec: MoESpec, layer: MoE) -> torch.Tensor:
    """64 tokens of unit variance, the same for the same spec."""
    drawn = torch.randn(64, spec.ffn.d_model, generator=spec.generator("verify"))
    return drawn.to(layer.experts.down_proj)


def layer_checks(rows: list[dict[str, Any]], dtype: torch.dtype) -> Iterator[Check]:
    """The worst of each figure over all layers, against what rounding in `dtype` allows."""

    def worst(key: str, chosen: list[dict[str, Any]]) -> Iterator[Check]:
        chosen = [row for row in chosen if key in row]
        if chosen:
            row = max(chosen, key=lambda r: r[key])
            what = f"{LAYER_CHECKS[key]}, worst at {row['path']}"
            yield check(what, row[key], ROUNDING[dtype])

    untraced = sum(row.get("untraced_rows", 0) for row in rows)
    redrawn = sum(row.get("redrawn_rows", 0) for row in rows)
    but = f", but for {redrawn} neurons that were drawn anew" if redrawn else ""
    yield check(f"rows that are not the dense rows they came from{but}", untraced, 0)
    lost = [row["lost_neurons"] for row in rows if "lost_neurons" in row]
    if lost:
        yield check("dense neurons that are not exactly once in the layer", sum(lost), 0)
    yield from worst("relative", [row for row in rows if row["promise"] == "exact"])
    yield from worst("all_experts_relative", rows)
    yield from worst("distinct_experts_relative", rows)
