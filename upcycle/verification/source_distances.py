"""How far a model of several checkpoints is from each of them."""

from pathlib import Path

from torch import nn

from upcycle.data.evaluation import Evaluation
from upcycle.ir.measured import Distance
from upcycle.models.expert_sources import Sources, merged
from upcycle.verification.whole_model import compare_models


def source_distances(
    model: nn.Module, converted: nn.Module, sources: Sources, evaluation: Evaluation
) -> dict[str, Distance]:
    """The distance of the worst output of `converted` from that of each source."""
    found = {}
    for i, name in enumerate(sources.names):
        dense = merged(model, sources, i).eval()
        outputs = compare_models(dense, converted, evaluation, predictions=False).outputs
        worst = max(outputs.values(), key=lambda output: output.relative)
        found[f"source {i} ({Path(name).name})"] = worst
    return found
