"""What operations on a mixture of experts did, as tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from upcycle.cli.tables import add_rows, new_table
from upcycle.ir.measured import ModelDistance
from upcycle.operations.expert_adapter import ExpertAdapter
from upcycle.operations.merge import Merged
from upcycle.operations.placement import Placement
from upcycle.operations.prune import Pruned
from upcycle.operations.rewritten import Rewritten
from upcycle.util.spans import span

MAX_ROWS = 24  # of a table that has one for each expert
MAX_REMOVED = 6  # experts of a layer that are named with their shares


def rewritten_json(done: Rewritten) -> dict[str, Any]:
    """As plain data."""
    given = {} if done.given is None else {"distance_on_data": asdict(done.given)}
    sizes = {"bytes_before": done.bytes_before, "bytes_after": done.bytes_after}
    return {"out": str(done.out), "distance": asdict(done.before), **sizes, **given}


def pruned_json(done: Rewritten, found: Pruned) -> dict[str, Any]:
    """The same with the experts that are left, and the share of each one before."""
    shares = {path: share_E.tolist() for path, share_E in found.shares.items()}
    left = {path: list(experts) for path, experts in found.left.items()}
    return {**rewritten_json(done), "experts": left, "shares": shares}


def pruned_report(
    done: Rewritten, found: Pruned, *, by: str, data: str, below: float | None
) -> list[RenderableType]:
    """The share of each expert and whether it is left, and how far the outputs moved."""
    parts: list[RenderableType] = []
    if sum(map(len, found.shares.values())) <= MAX_ROWS:
        table = new_table("layer", "expert", f"share ({by})", "")
        for path, share_E in found.shares.items():
            for expert, share in enumerate(share_E.tolist()):
                kept = "kept" if expert in found.left[path] else "removed"
                table.add_row(path, str(expert), f"{share:.1%}", kept)
        parts.append(table)
    else:
        table = new_table("layer", "experts left", f"least share left ({by})", "removed")
        add_rows(table, [_folded(path, found) for path in found.shares])
        parts += [table, "the share of every expert is in --json"]
    less = ", which say little: give data" if "random" in data else ""
    parts.append(f"Shares were counted on {data}{less}.")
    if found.widest is not None:
        parts.append(
            f"All layers have {len(found.left[found.widest])} experts, as {found.widest} needs so "
            "many and this architecture has one number for all layers."
        )
    elif below is not None and (least := _at_least(found, below)):
        parts.append(
            f"{least} keeps experts below {below:g}, as a token visits {len(found.left[least])}."
        )
    return [*parts, "", *distances(done), f"written to {done.out}"]


def _at_least(found: Pruned, below: float) -> str | None:
    """The first layer that keeps experts with a smaller share."""
    left = found.left.items()
    return next((path for path, e in left if min(found.shares[path][list(e)]) < below), None)


def _folded(path: str, found: Pruned) -> tuple[str, ...]:
    share_E, left = found.shares[path].tolist(), found.left[path]
    gone = sorted(set(range(len(share_E))) - set(left), key=lambda e: -share_E[e])
    named = [f"{e}: {share_E[e]:.1%}" for e in gone[:MAX_REMOVED]]
    more = [f"{len(gone) - MAX_REMOVED} more with less"] if len(gone) > MAX_REMOVED else []
    least = min(share_E[e] for e in left)
    of = f"{len(left)} of {len(share_E)}: {span(left)}"
    return path, of, f"{least:.1%}", ", ".join([*named, *more]) or "none"


def placement_report(found: Placement, done: Rewritten) -> list[RenderableType]:
    """What the placement costs beside others."""
    table = new_table("placement", "hops of a token, by layer")
    kind = "placed (the best there is)" if found.is_best else "placed"
    table.add_row(kind, f"{found.cost:.3f}")
    table.add_row("contiguous, as before", f"{found.contiguous:.3f}")
    table.add_row("random", f"{found.random:.3f}")
    same = "Every layer computes the same, checked in float64."
    return [table, "", same, *distances(done), f"written to {done.out}"]


_KINDS = {
    "split": "Each FFN is the sum of all experts at weight one; a token visited some of them.",
    "copies": "Each FFN computes what its layer does: the experts are the same.",
    "mean": "Each FFN is a mean of experts that differ: train it, or read what it costs.",
}


def merged_report(found: Merged, done: Rewritten) -> list[RenderableType]:
    """What the dense model is to the mixture."""
    return [_KINDS[found.kind], "", *distances(done), f"written to {done.out}"]


def extended_report(
    done: Rewritten, layers: Sequence[str], nulls: int | None
) -> list[RenderableType]:
    """Which layers have more experts now."""
    added = "one more expert" if nulls is None else f"{nulls} experts that do nothing"
    kinds = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    said = f"Added to {kinds} ({_first_and_last(layers)}): {added} in each."
    return [said, *distances(done), f"written to {done.out}"]


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


def distances(done: Rewritten) -> Sequence[RenderableType]:
    """How far the outputs moved, on each kind of data."""
    lines = [*_distance(done.before)]
    if done.given is not None:
        lines += _distance(done.given)
    return lines


def _distance(found: ModelDistance) -> Iterator[str]:
    yield f"On {found.inputs} outputs moved by {found.relative:.1e}."
    words = found.language_model
    if words is not None:
        yield (
            f"  Perplexity {words.converted_perplexity:.4g} (before {words.dense_perplexity:.4g}), "
            f"the same next word in {words.top1_agreement:.1%} of the places."
        )
