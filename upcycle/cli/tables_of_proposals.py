"""What `upcycle init` proposes, as a table, as comments of a recipe, and as the next command."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType

from upcycle.cli.proposals import Proposal
from upcycle.cli.tables import new_table
from upcycle.util.wording import short, size

NOTES = {
    "smaller": (
        "`onnx.weights: int8` in the recipe gives all weights of the ONNX file 8 bits;",
        "`--set onnx.weights=float --set onnx.quantise=8` those of the experts alone.",
    ),
    "merge": ("A directory with a PEFT adapter may be a source, too: it is merged into its base.",),
}


def proposals_report(found: Sequence[Proposal], refused: Mapping[str, str]) -> list[RenderableType]:
    """The proposals side by side, and why others are not there."""
    table = new_table("", *(proposal.recipe for proposal in found))
    rows = [_rows(proposal) for proposal in found]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    parts: list[RenderableType] = [f"{p.recipe}: {p.title}" for p in found]
    parts += ["", table]
    parts += [f"not {name}: {reason}" for name, reason in refused.items()]
    parts += ["", *NOTES[found[0].goal]] if found[0].goal in NOTES else []
    return parts


def _rows(proposal: Proposal) -> dict[str, str]:
    costs = proposal.costs
    work = costs.flops_after / max(costs.flops_before, 1)
    disk = f"{size(costs.bytes_before)} -> {size(proposal.bytes_rounded or costs.bytes_on_disk)}"
    if proposal.bytes_rounded is not None:
        disk += " in ONNX, in 8 bits"
    return {
        "promise": proposal.promise,
        "parameters": f"{short(costs.parameters_before)} -> {short(costs.parameters_after)}",
        "active parameters": short(costs.active_parameters),
        "work of a token, in converted FFNs": f"{work:.2f} times",
        "weights": disk,
        "quality without training": proposal.quality,
        "to be trained": proposal.training,
        "needs": proposal.needs,
        "runs in": ", ".join(proposal.software),
    }


def heading(model: str, goal: str, proposal: Proposal) -> list[str]:
    """The comments above the recipe."""
    lines = [f"For {model}, --goal {goal}.", f"{proposal.recipe}: {proposal.title}"]
    lines += [f"{name}: {text}" for name, text in _rows(proposal).items()]
    clean = (" ".join(line.split()) for line in lines)  # a name may have lines of its own
    return [*(f"# {line}" for line in clean), "#"]


def next_command(model: str, out: Path, proposal: Proposal) -> str:
    """What to type next; the directory has the recipe in its name, as others may be tried."""
    name = model.rstrip("/").rpartition("/")[2].rpartition(":")[2].partition("@")[0]
    words = ["upcycle", "convert", model, "--recipe", str(out)]
    if proposal.goal in ("train", "merge"):  # other formats are written after training
        words += ["--target", "safetensors"]
    rounded = "-int8" if proposal.goal == "smaller" else ""
    made = f"{name.removesuffix('.onnx')}-{proposal.recipe}{rounded}"
    return shlex.join([*words, "--out", made])
