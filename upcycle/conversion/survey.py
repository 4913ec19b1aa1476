"""What has to be known of all FFNs before the first of them is converted."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from upcycle.conversion.objectives import objective_for
from upcycle.data.calibration import CalibrationData
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, read_ffn
from upcycle.layers.moe import MoE
from upcycle.passes.calibrate.calibrate import calibrate
from upcycle.passes.calibrate.gradients import importance
from upcycle.passes.experts.useful import usefulness
from upcycle.passes.plan.adapt import adapted, adapted_widths
from upcycle.passes.plan.calibration_needs import needs
from upcycle.passes.rewrite import with_empty_layers


def survey(
    model: nn.Module, plan: Plan, data: CalibrationData
) -> tuple[Plan, Mapping[str, torch.Tensor]]:
    """Run the dense model on the data, where the recipe needs that.

    It costs a forward and a backward pass for gradients, and another forward pass for
    ``experts.adaptive``; and, while it runs, a copy of the model without its FFNs.

    Returns:
        The plan, with the shared neurons or the widths adapted if the recipe says so; and FFN path
        -> the importance of its neurons [N, F] float32, empty if no method asks for gradients.

    Raises:
        UsageError: the model gives no gradients.
    """
    has_gradients = "gradients" in needs(plan.recipe)
    if not has_gradients and not plan.recipe.experts.adaptive:
        return plan, {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    surveyed, layers = with_empty_layers(model, plan.specs)
    pairs = list(zip(plan.specs, layers, strict=True))

    def read(spec: MoESpec) -> FFNWeights:
        return read_ffn(spec.ffn, parameters)

    important: Mapping[str, torch.Tensor] = {}
    if has_gradients:
        objective = objective_for(model, seed=plan.recipe.seed)
        important = importance(
            surveyed, pairs, data.batches, dense=read, objective=objective, domains=data.domains
        )
    if plan.recipe.experts.adaptive and plan.recipe.experts.width is not None:
        means = {path: score_NF.mean(0) for path, score_NF in important.items()}
        plan = replace(plan, specs=adapted_widths(plan.specs, means))
    elif plan.recipe.experts.adaptive:
        scores: dict[str, torch.Tensor] = {}

        def visit(spec: MoESpec, layer: MoE, ffn: FFNWeights, seen: FFNInputs) -> None:
            path = spec.ffn.path
            seen = replace(seen, importance_NF=important.get(path))
            scores[path] = usefulness(ffn, spec.experts, seen, width=spec.width)

        calibrate(
            surveyed,
            pairs,
            data.batches,
            dense=read,
            visit=visit,
            sequential=False,
            domains=data.domains,
        )
        plan = replace(plan, specs=adapted(plan.specs, scores))
    return plan, important
