"""Make the weights of every planned layer: survey, transform, and note what came of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from upcycle.conversion.workers import Workers, layer_maker
from upcycle.data.calibration import CalibrationData
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.measured import Calibrated, Usage
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, MoEWeights, Provenance
from upcycle.passes.calibrate.usage import usage
from upcycle.passes.experts.useful import usefulness
from upcycle.passes.plan.adaptive_sizes import adaptive_shared, adaptive_widths
from upcycle.passes.plan.plan import needs
from upcycle.passes.transform.transform import transform
from upcycle.util.progress import Progress, silent

# An FFN and what it was given -> what it becomes; None leaves it as it is.
Visit = Callable[[MoESpec, FFNWeights, FFNInputs], MoEWeights | None]
Kept = Callable[[MoESpec], MoEWeights]


class Layers(Protocol):
    """The FFNs of a dense model, as making layers needs them."""

    @property
    def plan(self) -> Plan:
        """What each becomes."""
        ...

    @property
    def data(self) -> CalibrationData | None:
        """What is shown to the model; None if the recipe needs nothing."""
        ...

    def read(self, spec: MoESpec) -> FFNWeights:
        """The dense weights of one FFN."""
        ...

    def show(self, plan: Plan, visit: Visit, scratch: Path, *, sequential: bool) -> Kept:
        """Run the model on `data` and call `visit` for each FFN, in the order in which they run.

        The layers that it returns are kept, in memory or in `scratch`; the result gives them.
        Later FFNs see what they give if *sequential*, else what the dense ones give.
        """
        ...

    def importance(self, plan: Plan) -> Mapping[str, torch.Tensor]:
        """FFN path -> the importance of its neurons [N, F] float32, by a backward pass.

        Raises:
            UsageError: the model gives no gradients.
        """
        ...


@dataclass(frozen=True)
class Made:
    """What is known of the layers while they are made and afterwards.

    Attributes:
        plan: with the widths or shared neurons that the data asked for, if the recipe adapts them.
        layer: gives the weights of a layer; asked for once for each, in the order of the plan.
        provenance: FFN path -> the dense neurons behind its layer, once it was made.
        calibration: what was shown; None if the recipe needs nothing.
    """

    plan: Plan
    layer: Kept
    provenance: dict[str, Provenance]
    calibration: Calibrated | None = None


@contextmanager
def making(
    dense: Layers, scratch: Path, workers: Workers, progress: Progress = silent
) -> Iterator[Made]:
    """Yields the layers: made already if the model has to be run for them, else when asked for.

    `workers` make the layers that need no data, some ahead of time; `scratch` is a folder for what
    does not stay; `progress` is called after each layer.
    """
    plan, important = _survey(dense, scratch)
    provenance: dict[str, Provenance] = {}

    def noted(spec: MoESpec, weights: MoEWeights) -> MoEWeights:
        provenance[spec.ffn.path] = weights.provenance
        progress("converting", len(provenance), len(plan.specs))
        return weights

    if dense.data is None:
        with layer_maker(workers, plan.specs, lambda spec: dense.read(spec).cpu()) as make:
            yield Made(plan, lambda spec: noted(spec, make(spec)), provenance)
        return
    rows: list[Usage] = []

    def visit(spec: MoESpec, ffn: FFNWeights, seen: FFNInputs) -> MoEWeights:
        ffn, seen = ffn.cpu(), seen.cpu()  # as the generators are
        if important:
            seen = replace(seen, importance_NF=important[spec.ffn.path])
        weights = transform(ffn, spec, seen)
        rows.append(usage(spec, ffn, weights, seen))
        return noted(spec, weights)

    sequential = plan.recipe.calibration.sequential
    kept = dense.show(plan, visit, scratch, sequential=sequential)
    yield Made(plan, kept, provenance, dense.data.describe(rows, sequential=sequential))


def _survey(dense: Layers, scratch: Path) -> tuple[Plan, Mapping[str, torch.Tensor]]:
    """What has to be known of all FFNs before the first is made: the plan, adapted; gradients.

    It costs a forward and a backward pass for gradients, and another forward pass for
    ``experts.adaptive``.
    """
    plan, experts = dense.plan, dense.plan.recipe.experts
    important: Mapping[str, torch.Tensor] = {}
    if dense.data is not None and "gradients" in needs(plan.recipe):
        important = dense.importance(plan)
    if dense.data is None or not experts.adaptive:
        return plan, important
    if experts.width is not None:
        means = {path: score_NF.mean(0) for path, score_NF in important.items()}
        return replace(plan, specs=adaptive_widths(plan.specs, means)), important
    scores: dict[str, torch.Tensor] = {}

    def visit(spec: MoESpec, ffn: FFNWeights, seen: FFNInputs) -> None:
        seen = replace(seen, importance_NF=important.get(spec.ffn.path))
        scores[spec.ffn.path] = usefulness(ffn, spec.experts, seen, width=spec.width)

    dense.show(plan, visit, scratch, sequential=False)
    return replace(plan, specs=adaptive_shared(plan.specs, scores)), important
