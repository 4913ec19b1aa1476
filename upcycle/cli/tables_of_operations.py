"""What operations on a mixture of experts did, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from upcycle.cli.tables import add_rows, new_table
from upcycle.operations.expert_adapter import ExpertAdapter
from upcycle.operations.merge import Merged
from upcycle.operations.placement import Placement
from upcycle.operations.rewritten import Rewritten
from upcycle.util.spans import span


def rewritten_json(done: Rewritten) -> dict[str, Any]:
    """As plain data."""
    return {"out": str(done.out), "distance": asdict(done.before)}


def rewritten_report(done: Rewritten, left: Mapping[str, tuple[int, ...]]) -> list[RenderableType]:
    """The experts that are left, and how far the outputs moved."""
    table = new_table("layer", "experts left")
    add_rows(table, [(path, span(experts)) for path, experts in left.items()])
    return [table, "", *_distance(done), f"written to {done.out}"]


def placement_report(found: Placement, done: Rewritten) -> list[RenderableType]:
    """What the placement costs beside others."""
    table = new_table("placement", "hops of a token, by layer")
    kind = "placed (the best there is)" if found.is_best else "placed"
    table.add_row(kind, f"{found.cost:.3f}")
    table.add_row("contiguous, as before", f"{found.contiguous:.3f}")
    table.add_row("random", f"{found.random:.3f}")
    same = "Every layer computes the same, checked in float64."
    return [table, "", same, *_distance(done), f"written to {done.out}"]


_KINDS = {
    "split": "Each FFN is the sum of all experts at weight one; a token visited some of them.",
    "copies": "Each FFN computes what its layer does: the experts are the same.",
    "mean": "Each FFN is a mean of experts that differ: train it, or read what it costs.",
}


def merged_report(found: Merged, done: Rewritten) -> list[RenderableType]:
    """What the dense model is to the mixture."""
    return [_KINDS[found.kind], "", *_distance(done), f"written to {done.out}"]


def extended_report(
    done: Rewritten, layers: Sequence[str], nulls: int | None
) -> list[RenderableType]:
    """Which layers have more experts now."""
    added = "one more expert" if nulls is None else f"{nulls} experts that do nothing"
    kinds = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    said = f"Added to {kinds} ({_first_and_last(layers)}): {added} in each."
    return [said, *_distance(done), f"written to {done.out}"]


def _first_and_last(paths: Sequence[str]) -> str:
    """The first and the last of them."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"


def adapter_report(
    made: ExpertAdapter, shares: Mapping[str, float], part: float, out: Path
) -> list[RenderableType]:
    """The experts of an adapter, and what they have of the score of their layers."""
    table = new_table("layer", "experts", "share")
    rows = [
        (
            path,
            f"{span(sorted(experts))} of {made.of[path]}",
            f"{shares[path]:.1%}" if shares else "",
        )
        for path, experts in made.experts.items()
    ]
    add_rows(table, rows)
    return [table, "", f"It has {part:.1%} of the parameters of the model.", f"written to {out}"]


def _distance(done: Rewritten) -> list[RenderableType]:
    before = done.before
    lines: list[RenderableType] = [f"Outputs moved by {before.relative:.1e} ({before.inputs})."]
    words = before.language_model
    if words is not None:
        lines.append(
            f"Perplexity {words.converted_perplexity:.4g} (before {words.dense_perplexity:.4g}), "
            f"the same next word in {words.top1_agreement:.1%} of the places."
        )
    return lines
