"""Reports of conversions that never were, to be shown as pages."""

from dataclasses import replace
from typing import Any

from upcycle.ir.measured import (
    Calibrated,
    Check,
    Costs,
    Distance,
    LanguageModel,
    LayerDistance,
    ModelDistance,
    Usage,
)
from upcycle.ir.report import CheckpointFacts, Report
from upcycle.page.origins import first_split, kinds_of
from upcycle.page.page import Contents
from upcycle.recipe.reader import load_recipe
from upcycle.targets.provenance_file import LayerOrigin

COSTS = Costs(
    parameters_before=1000,
    parameters_after=1100,
    active_parameters=900,
    flops_before=400,
    flops_after=200,
    compensation_parameters=0,
    compensation_flops=0,
    bytes_before=4000,
    bytes_on_disk=4400,
    peak_bytes=9000,
    flops_left_dense=100,
)


def layer(path: str, tokens: tuple[int, ...], relative: float = 0.1) -> LayerDistance:
    return LayerDistance(
        max_abs=1.0,
        relative=relative,
        rms=0.2,
        min_cosine=0.8,
        mean_cosine=0.95,
        path=path,
        promise="approximate",
        tokens_per_expert=tokens,
        distinct_experts_relative=1e-7,
    )


def report(depth: int = 2, experts: int = 4, **changes: Any) -> Report:
    """A verified split; expert e of layer i got (i + e) % 7 times ten tokens."""
    loads = [tuple((i + e) % 7 * 10 for e in range(experts)) for i in range(depth)]
    out = Distance(0.5, 0.2, 0.1, 0.9, 0.97)
    made = Report(
        upcycle="0.1.0",
        model="some-model",
        recipe="moefication",
        resolved_recipe=load_recipe("moefication").model_dump(mode="json"),
        promise="exact with all experts",
        dtype="float32",
        torch="2.13.0",
        costs=COSTS,
        checks=(Check("files loaded again", 3e-7, 1e-5, True), Check("rows", 0, 0, True)),
        checkpoint=CheckpointFacts(
            "remote_code",
            "upcycle_bert",
            {"mixtral": "it is bert"},
            {"vllm": {"level": "no", "why": ["its kernel is another"], "field": "act"}},
        ),
        layers=tuple(
            layer(f"model.layers.{i}.mlp", load, 0.01 * (i + 1)) for i, load in enumerate(loads)
        ),
        end_to_end=ModelDistance("two poems", {"logits": out}, 0.2),
    )
    return replace(made, **changes)


def origin(path: str = "model.layers.0.mlp", parts: int = 4, **changes: Any) -> LayerOrigin:
    """A layer of 32 dense neurons, cut into equal parts."""
    width = 32 // parts
    return LayerOrigin(
        **{
            "path": path,
            "dense_neurons": 32,
            "method": "contiguous",
            "router": "centroid",
            "compensate": {},
            "promise": "exact with all experts",
            "layer": {"width": width, "shared": 0},
            "sources": [],
            "experts": [f"{i * width}-{(i + 1) * width - 1}" for i in range(parts)],
            "shared": "",
            **changes,
        }
    )


def contents(depth: int = 2, experts: int = 4, **changes: Any) -> Contents:
    """The report and the provenance of a split."""
    paths = [f"model.layers.{i}.mlp" for i in range(depth)]
    origins = [origin(path, min(experts, 32)) for path in paths]
    kinds = tuple(kinds_of(origins, "here"))
    return Contents(report(depth, experts, **changes), "here", kinds, first_split(origins))


def calibrated(*loads: tuple[int, ...]) -> Calibrated:
    usages = tuple(
        Usage(f"model.layers.{i}.mlp", sum(load), load, load.count(0), 0.9, 0.5)
        for i, load in enumerate(loads)
    )
    return Calibrated("novels", 3, True, None, usages)


WORDS = LanguageModel(
    tokens=512, kl=0.2, top1_agreement=0.8, dense_perplexity=10.0, converted_perplexity=15.0
)
