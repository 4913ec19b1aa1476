"""What is known of a mixture of experts from its model alone, as after training, when no report
describes it any more: the plan that gives layers of these shapes."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.conversion.dense_model import Facts, header
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.ffn import FFN, Located
from upcycle.ir.report import Report
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.verdict import TRAINED
from upcycle.layers.config import LayerConfig, RouterConfig, SelectConfig
from upcycle.layers.moe import MoE
from upcycle.layers.pretrained import UpcycledConfig, UpcycledModel
from upcycle.models.dense import Source
from upcycle.models.moe_layers import MoELayer, moe_layers
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.plan.costs import model_size
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.schema import Compensate, Experts, Recipe, Router
from upcycle.targets.description import is_described, read_report, recipe_of
from upcycle.targets.provenance_file import as_made
from upcycle.util.modules import model_dtype


def plan_found(located: Located, layers: Sequence[MoELayer]) -> Plan:
    """The plan by which the FFNs of a dense model become layers of the shapes of `layers`.

    How their weights were made is unknown; the promise is ``approximate``.

    Raises:
        UnsupportedError: none of the FFNs is where a layer is.
    """
    specs = []
    for ffn in located.ffns:
        layer = next((layer for layer in layers if is_at(layer, ffn)), None)
        if layer is not None:
            specs.append(spec_of(ffn, layer))
    if not specs:
        raise UnsupportedError(
            f"the dense model has no FFN where one of the {len(layers)} MoE layers is; is it the "
            "model that they were made from?"
        )
    first = specs[0]
    recipe = Recipe(experts=first.experts, router=first.router, compensate=first.compensate)
    return Plan(located, tuple(specs), recipe, TRAINED)


def planned(
    directory: Path, model: nn.Module, dense: nn.Module, source: Source
) -> tuple[Plan, Report]:
    """How the layers of `directory`, loaded as `model`, were made, and what is known of that.

    Raises:
        UsageError: the report of the conversion is damaged; or it is gone, and the model is dense.
        UnsupportedError: there is none, and the layers are not where `dense` has FFNs.
    """
    located = locate_in(dense, source.example)
    if is_described(directory):
        report = read_report(directory)
        recipe = recipe_of(report, directory)
        plan, _ = as_made(make_plan(located, recipe, recipe_name=report.recipe), directory)
        return plan, report
    layers = moe_layers(model)
    if not layers:
        raise UsageError(
            f"{directory}: no report.json is in it and no layer of it is a mixture of experts, so "
            "this is not an output of upcycle"
        )
    plan = plan_found(located, layers)
    return plan, header(plan, Facts(source.label, model_dtype(model), model_size(dense)))


def is_at(layer: MoELayer, ffn: FFN) -> bool:
    """Whether `ffn` became `layer`.

    A native block may have another name than the FFN, in the same module.
    """
    if layer.is_own:
        return layer.path == ffn.place
    same_block = layer.path.rpartition(".")[0] == ffn.path.rpartition(".")[0]
    return same_block and ffn.placement == "module" and layer.d_model == ffn.d_model


def spec_of(ffn: FFN, layer: MoELayer) -> MoESpec:
    """The spec by which `ffn` would become `layer`; how its weights were made is unknown."""
    config = layer.block.config if isinstance(layer.block, MoE) else _native_config(ffn, layer)
    facts, select = config.router, config.router.select
    has_bias = ffn.contraction.bias is not None and not (config.expert_bias and not config.shared)
    arguments = {n: v for n, v in select.arguments.items() if n != "k"}
    return MoESpec(
        ffn=ffn,
        # Whole experts of their own: nothing that holds for copies alone is taken to hold.
        experts=Experts(method="from_checkpoints", count=config.num_experts),
        router=Router(
            method="normal",
            top_k=max(select.k, 1),
            select=select.rule,
            weights=facts.weights,
            balance=facts.balance,
            bias=facts.bias,
            **arguments,
        ),
        compensate=Compensate(low_rank=config.low_rank, mean=config.output_bias and not has_bias),
        num_experts=config.num_experts,
        width=config.width,
        shared=config.shared,
        top_k=select.k,
        scale=facts.scale,
        promise="approximate",
        seed=0,
        router_kind=facts.kind,
        router_facts={name: value for name, value in vars(facts).items() if name != "kind"},
        expert_bias=config.expert_bias,
    )


def _native_config(ffn: FFN, layer: MoELayer) -> LayerConfig:
    """The nearest layer of ours, for what it costs."""
    experts: Any = layer.experts
    router = RouterConfig(
        kind="linear",
        num_experts=layer.num_experts,
        d_model=layer.d_model,
        select=SelectConfig(rule="top_k", k=layer.top_k or layer.num_experts),
        weights="renormalised",
        scale=1.0,
    )
    return LayerConfig(
        num_experts=layer.num_experts,
        width=layer.width,
        shared=layer.shared,
        d_model=layer.d_model,
        d_out=ffn.d_out,
        pointwise=ffn.pointwise,
        up_bias=experts.has_bias,
        output_bias=False,
        expert_bias=experts.has_bias,
        router=router,
        hidden_dropout=0.0,
        output_dropout=0.0,
    )


def as_converted(model: nn.Module) -> tuple[nn.Module, Plan]:
    """A model that was loaded from custom code, as a conversion of its dense class leaves one.

    It shares the tensors of `model`.

    Raises:
        UnsupportedError: it has no layers of upcycle.
    """
    dense_class, config = dense_class_of(model)
    with torch.device("meta"):
        skeleton = dense_class(config)
    view: Any = copy.copy(model)  # the same modules, under the class that they were put into
    view.__class__, view.config = dense_class, config
    return view, plan_found(locate_in(skeleton), moe_layers(model))


def dense_class_of(model: nn.Module) -> tuple[Any, Any]:
    """The dense class that a model of custom code extends, and its configuration.

    Raises:
        UnsupportedError: it extends none.
    """
    if not isinstance(model, UpcycledModel):
        raise UnsupportedError(
            f"{type(model).__name__} is an architecture of transformers already, and no class that "
            "upcycle extended"
        )
    dense_class = next(c for c in type(model).__mro__ if not issubclass(c, UpcycledModel))
    return dense_class, _dense_config(model)


def _dense_config(model: Any) -> Any:
    dense_class: Any = next(
        cls for cls in type(model.config).__mro__ if not issubclass(cls, UpcycledConfig)
    )
    data = model.config.to_dict()
    for name in ("upcycle", "auto_map", "model_type"):
        data.pop(name, None)
    data["architectures"] = [name.removeprefix("Upcycle") for name in data["architectures"] or ()]
    config = dense_class.from_dict(data)
    config.dtype = model.dtype
    return config
