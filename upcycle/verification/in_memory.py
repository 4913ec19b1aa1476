"""Tiers T0 to T2: a converted module against its dense one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from upcycle.capture.capture import ExampleInputs
from upcycle.data.verification_inputs import Evaluation, outputs_of
from upcycle.ir.measured import Distance
from upcycle.ir.report import Report
from upcycle.ir.rounding import ROUNDING
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import Provenance
from upcycle.layers.moe import MoE
from upcycle.models.expert_sources import NO_SOURCES, Sources, merged
from upcycle.models.moe_layers import moe_layers
from upcycle.targets.checkpoint import planned_layers
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.util.trees import leaves_of
from upcycle.verification.layers import LayerCase, Origins, layer_checks, verify_layers
from upcycle.verification.whole_model import compare_models, end_to_end


def verify_module(
    report: Report,
    plan: Plan,
    dense: nn.Module,
    converted: nn.Module,
    provenance: Mapping[str, Provenance],
    evaluation: Evaluation,
    sources: Sources = NO_SOURCES,
) -> Report:
    """The report with a comparison of each layer, on the tokens that it gets, and of the whole.

    Both models are run in eval mode and left in the mode that they had. `provenance` has the dense
    neurons behind the layer of each FFN path; `sources` are the models that experts were taken
    from, if there are several.
    """
    layers = {spec.ffn.path: layer for spec, layer in planned_layers(converted, plan)}
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    dtype = model_dtype(dense)
    with eval_mode(dense, converted), torch.no_grad():
        with _router_inputs(list(layers.values())) as seen, _dtypes(dtype) as dtypes:
            outputs_of(converted, evaluation.batches[0])

        def case(spec: MoESpec) -> LayerCase:
            layer = layers[spec.ffn.path]
            return LayerCase(layer, seen.get(layer))

        rows = verify_layers(plan.specs, case, Origins(parameters, provenance, sources.tensors))
        found = compare_models(dense, converted, evaluation)
        apart = source_distances(dense, converted, sources, evaluation)
    coarsest = max(dtypes, key=ROUNDING.__getitem__)
    checks = (*layer_checks(rows, dtype), end_to_end(found, plan.recipe, coarsest))
    every = (*report.checks, *checks)
    return replace(report, layers=rows, end_to_end=found, sources=apart or None, checks=every)


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


def tokens_of_layers(
    model: nn.Module, plan: Plan, inputs: ExampleInputs
) -> dict[str, torch.Tensor]:
    """The tokens [T, D] that the layers of a loaded model get, by FFN path.

    Those of a native architecture are found by the module that they are in.
    """
    found = {layer.name: layer for layer in moe_layers(model)}
    beside = {layer.path.rpartition(".")[0]: layer for layer in found.values() if not layer.is_own}
    seen: dict[str, torch.Tensor] = {}

    def remember(path: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        tensors = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor)]
        seen[path] = tensors[0].detach().reshape(-1, tensors[0].shape[-1])

    with ExitStack() as hooks, eval_mode(model), torch.no_grad():
        for path in (spec.ffn.path for spec in plan.specs):
            layer = found.get(path) or beside.get(path.rpartition(".")[0])
            if layer is None:
                continue
            # A layer of upcycle may be called with something else than its tokens.
            reads: Any = layer.block.router if layer.is_own else layer.block
            hooks.enter_context(
                reads.register_forward_pre_hook(
                    lambda _, args, named, path=path: remember(path, args, named), with_kwargs=True
                )
            )
        outputs_of(model, inputs)
    return seen


@contextmanager
def _dtypes(dtype: torch.dtype) -> Iterator[set[torch.dtype]]:
    """`dtype`, and the float types that modules give within it: autocast computes in others."""
    seen = {dtype}

    def note(_: nn.Module, __: object, out: object) -> None:
        seen.update(tensor.dtype for tensor in leaves_of(out) if tensor.dtype in ROUNDING)

    with register_module_forward_hook(note):
        yield seen


@contextmanager
def _router_inputs(layers: list[MoE]) -> Iterator[dict[MoE, torch.Tensor]]:
    """The tokens [T, D] that each layer was last given, in the dtype of its weights."""
    seen: dict[MoE, torch.Tensor] = {}

    def remember(layer: MoE) -> Callable[..., None]:
        dtype = layer.experts.down_proj.dtype  # autocast may have given others
        return lambda _, args: seen.__setitem__(layer, args[0].detach().to(dtype))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.router.register_forward_pre_hook(remember(layer)))
        yield seen
