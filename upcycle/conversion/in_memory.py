"""The stages in order: capture, locate, plan, transform, rewrite, verify; and saving the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.emit import FILE_CHECKS, Emission, check_targets, emit
from upcycle.conversion.survey import survey
from upcycle.conversion.workers import HERE, Workers, layer_maker
from upcycle.data.calibration import (
    CalibrationData,
    Data,
    calibration_data,
    given_data,
    verification_inputs,
)
from upcycle.data.evaluation import Evaluation, evaluation_for
from upcycle.ir.ffn import Located
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, MoEWeights, Provenance, read_ffn
from upcycle.layers.moe import MoE
from upcycle.models.dense import Source
from upcycle.models.expert_sources import NO_SOURCES, Sources, merged, open_sources
from upcycle.passes.calibrate.calibrate import calibrate
from upcycle.passes.calibrate.usage import usage
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.merge import merge
from upcycle.passes.plan.calibration_needs import needs
from upcycle.passes.plan.model_problems import check_model
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.rewrite import fill, rewrite, with_empty_layers
from upcycle.passes.transform.transform import transform
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.schema import Recipe
from upcycle.targets.checkpoint import planned_layers
from upcycle.targets.files.staging import staged
from upcycle.targets.files.tensor_file import MAX_SHARD_SIZE
from upcycle.util.eval_mode import eval_mode
from upcycle.util.progress import Progress, silent, step
from upcycle.verification.in_memory import header, verify_conversion
from upcycle.verification.whole_model import raise_if_failed


@dataclass
class Conversion:
    """A converted model.

    Attributes:
        model: the converted module, a normal `nn.Module`.
        plan: what was found and decided.
        report: what verification measured; without checks if it was not run.
        dense: the module that was converted, unchanged.
        provenance: FFN path -> the dense neurons behind its layer.
        source: where the dense model comes from.
        example: inputs that the user gave.
        text: what a language or embedding model is verified on, if the user gave one.
        sources: the models that experts were taken from, if there are several.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]
    dense: nn.Module = field(repr=False)
    provenance: dict[str, Provenance] = field(repr=False)
    source: Source | None = None
    example: ExampleInputs | None = field(default=None, repr=False)
    text: str | None = field(default=None, repr=False)
    sources: Sources = field(default=NO_SOURCES, repr=False)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The inputs of the verification, made when they are first needed."""
        return evaluation_for(
            self.dense,
            directory=self.source.directory if self.source else None,
            example=self.example,
            text=self.text,
            seed=self.plan.recipe.seed,
        )

    def save(
        self,
        out: str | Path,
        *,
        targets: Sequence[str] = ("safetensors",),
        runtimes: Sequence[str] = (),
        architecture: str | None = None,
        overwrite: bool = False,
        max_shard_size: int = MAX_SHARD_SIZE,
        verify: bool = True,
        progress: Progress = silent,
    ) -> Emission:
        """Write the model in one or several formats; nothing is left behind on failure.

        Args:
            out: the directory; it is written beside its place and renamed at the end.
            targets: of ``safetensors``, ``onnx``; an ONNX file reads the safetensors beside it.
            runtimes: what has to run the checkpoint: transformers, vllm, sglang, llama.cpp, ...
            architecture: the MoE architecture of transformers to write; by default what fits.
            overwrite: replace an existing directory.
            max_shard_size: bytes of one safetensors file.
            verify: load the files again and compare (tiers T3 and T4).
            progress: called as each stage begins and ends.

        Raises:
            UsageError: the directory exists, or a target is unknown.
            UnsupportedError: the model cannot be written as one of the targets.
            ResourceError: the disk is too small.
            VerificationError: a loaded file is not the model.
        """
        check_targets(targets, verify=verify)
        protect = [self.source.directory] if self.source and self.source.directory else []
        checks = [c for c in self.report["checks"] if c["what"] not in FILE_CHECKS]
        report = {**self.report, "checks": checks}  # without those of an earlier `save`
        with staged(Path(out), overwrite=overwrite, protect=protect) as directory:
            emission = emit(
                directory,
                self.model,
                self.plan.requiring(runtimes, architecture),
                dense=self.dense,
                provenance=self.provenance,
                evaluation=self.evaluation,
                source=self.source,
                targets=targets,
                max_shard_size=max_shard_size,
                report=report,
                verify=verify,
                progress=progress,
                name=Path(out).absolute().name,
            )
        self.report = report
        return emission

    def to_dense(self) -> nn.Module:
        """A dense model with the weights that the converted one has now; for splits only.

        Raises:
            UnsupportedError: the experts are copies, or slices of copies.
        """
        layers = {
            spec.ffn.path: (spec, layer) for spec, layer in planned_layers(self.model, self.plan)
        }
        return merge(self.dense, self.model, layers, self.provenance)


def locate(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Located:
    """Every dense FFN of `model`, and the reason for each near miss; no weight is read.

    Args:
        model: any module, also on the meta device; it is left alone.
        example_inputs: keyword arguments or a tuple that its forward accepts; guessed if None.

    Raises:
        CaptureError: the forward could not be run on example inputs.
    """
    return locate_in(model, example_inputs)


def convert(
    model: nn.Module,
    recipe: str | Path | Recipe,
    example_inputs: ExampleInputs | None = None,
    calibration: Data | None = None,
    *,
    verify: bool = True,
    overrides: Sequence[str] = (),
    recipe_name: str | None = None,
    source: Source | None = None,
    sources: Sequence[nn.Module | str | Path] | None = None,
    located: Located | None = None,
    workers: Workers = HERE,
    progress: Progress = silent,
) -> Conversion:
    """Turn the dense FFNs of `model` into MoE layers.

    Args:
        model: any module; it is left alone.
        recipe: a shipped name, the path of a YAML file, or a `Recipe`.
        example_inputs: inputs that the model accepts; guessed if None.
        calibration: a text, several texts, batches of inputs, or what
            `upcycle.data.calibration_files.read_calibration` returns: what methods are shown that
            look at activations. A quarter is held out, to verify on; for a recipe that needs no
            data all of it is. If None, the documentation of Python for a model with a tokenizer.
        verify: measure the distance and raise if the recipe's promise is broken.
        overrides: ``key=value`` changes of the recipe, as ``--set`` takes them.
        recipe_name: how reports call the recipe; its name or that of its file if None.
        source: where the model comes from, for its tokenizer and for `Conversion.save`.
        sources: for ``from_checkpoints``: modules or names, instead of ``experts.sources``.
        located, workers: the result of `upcycle.locate`, if it is known; who makes the layers.
        progress: called after each layer.

    Raises:
        RecipeError: the recipe is not valid.
        CaptureError: the model cannot be run on example inputs.
        PlanError: an FFN cannot become what the recipe asks for.
        VerificationError: the result is further from the dense model than promised.
    """
    name = recipe_name or ("custom" if isinstance(recipe, Recipe) else Path(recipe).name)
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    opened = open_sources(sources or resolved.experts.sources, model, source)
    if sources:
        named = resolved.experts.model_copy(update={"sources": opened.names})
        resolved = resolved.model_copy(update={"experts": named})
    if located is None:
        located = locate_in(model, example_inputs)
    plan = make_plan(located, resolved, recipe_name=name)
    check_model(model, plan)
    given, data = given_data(calibration), None
    important: Mapping[str, torch.Tensor] = {}
    directory = source.directory if source else None
    text, example = verification_inputs(model, plan.recipe, given, directory=directory)
    if needs(plan.recipe):
        data = calibration_data(
            model,
            plan.recipe,
            given,
            directory=directory,
            example=example_inputs,
            domains=plan.specs[0].num_experts,
        )
        plan, important = survey(model, plan, data)
    made = convert_layers(model, plan, data, progress, opened, important, workers)
    converted, provenance, calibrated = made
    report = header(plan, model, source)
    if calibrated:
        report["calibration"] = calibrated
    example = example if example_inputs is None else example_inputs
    result = Conversion(converted, plan, report, model, provenance, source, example, text, opened)
    if verify:
        with step(progress, "verifying"), eval_mode(model, converted):
            verify_conversion(report, plan, model, converted, provenance, result.evaluation, opened)
        raise_if_failed(report)
    return result


def convert_layers(
    model: nn.Module,
    plan: Plan,
    data: CalibrationData | None,
    progress: Progress = silent,
    sources: Sources = NO_SOURCES,
    important: Mapping[str, torch.Tensor] | None = None,
    workers: Workers = HERE,
) -> tuple[nn.Module, dict[str, Provenance], dict[str, Any]]:
    """A converted copy of `model`; FFN path -> the dense neurons behind its layer; the calibration.

    The last one is plain data for the report: what was shown, and `usage` of each layer.

    Args:
        model: the dense model; left alone.
        plan: what each FFN becomes.
        data: what to show to the methods; None if they need nothing.
        progress: called after each layer.
        sources: the models that experts are taken from; the rest of the result is their merge.
        important: FFN path -> the importance of its neurons, as `upcycle.conversion.survey.survey`
            finds it.
        workers: make the layers if there is no data.
    """
    if sources.tensors:
        model = merged(model, sources, plan.recipe.experts.merge)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    provenance: dict[str, Provenance] = {}
    rows: list[dict[str, Any]] = []

    def visit(spec: MoESpec, layer: MoE, ffn: FFNWeights, seen: FFNInputs) -> None:
        device, ffn, seen = ffn.down_OF.device, ffn.cpu(), seen.cpu()  # as the generators are
        if important:
            seen = replace(seen, importance_NF=important[spec.ffn.path])
        weights = transform(ffn, spec, seen)
        rows.append(usage(spec, ffn, weights, seen))
        fill(layer, noted(spec, weights), device)

    def noted(spec: MoESpec, weights: MoEWeights) -> MoEWeights:
        provenance[spec.ffn.path] = weights.provenance
        progress("converting", len(provenance), len(plan.specs))
        return weights

    def read(spec: MoESpec) -> FFNWeights:
        return read_ffn(spec.ffn, parameters, sources.tensors)

    if data is None:
        with layer_maker(workers, plan.specs, lambda spec: read(spec).cpu()) as make:
            converted = rewrite(model, plan.specs, lambda spec: noted(spec, make(spec)))
        return converted, provenance, {}
    converted, layers = with_empty_layers(model, plan.specs)
    pairs, batches = list(zip(plan.specs, layers, strict=True)), data.batches
    sequential, domains = plan.recipe.calibration.sequential, data.domains
    calibrate(
        converted, pairs, batches, dense=read, visit=visit, sequential=sequential, domains=domains
    )
    return converted, provenance, data.describe(sequential=sequential) | {"layers": rows}
