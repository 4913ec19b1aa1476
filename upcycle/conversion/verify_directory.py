"""Compare a converted directory with its dense model, from the files alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.make import Made
from upcycle.conversion.onnx_file import OnnxFile
from upcycle.conversion.onnx_rewrite import EXPERTS, FILE
from upcycle.conversion.options import DEFAULTS
from upcycle.conversion.trained import planned
from upcycle.data.calibration import called_data, verification_inputs
from upcycle.data.calibration_files import CalibrationInput
from upcycle.data.verification_inputs import Evaluation, evaluation_for
from upcycle.errors import UsageError, one_line
from upcycle.ir.measured import Check, ModelDistance, OnnxFacts
from upcycle.ir.report import Report
from upcycle.ir.spec import MoESpec, Plan
from upcycle.models.dense import Source
from upcycle.models.expert_sources import Sources, open_sources
from upcycle.models.load_options import DTYPES
from upcycle.models.moe_layers import with_own_experts
from upcycle.models.onnx_file import OnnxSource
from upcycle.onnx.run import run
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.onnx import ONNX_DEFAULTS, Onnx
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.schema import Recipe
from upcycle.targets.description import is_described, read_report, recipe_of
from upcycle.targets.destination import destination
from upcycle.targets.files.read_back import read_at, read_by_name, read_layer
from upcycle.targets.load import load
from upcycle.targets.onnx.file_names import FILES as ONNX_FILES
from upcycle.targets.onnx.write import in_float32
from upcycle.targets.provenance_file import as_made
from upcycle.targets.pt2.write import SUFFIX
from upcycle.util.modules import device_of, model_dtype
from upcycle.util.progress import Progress, silent
from upcycle.util.untrusted import names_code
from upcycle.verification.in_memory import source_distances, tokens_of_layers
from upcycle.verification.layers import LayerCase, Origins, layer_checks, stored, verify_layers
from upcycle.verification.onnx.layers import compare_outputs, feeds_for
from upcycle.verification.onnx.precision import verify_precision
from upcycle.verification.onnx.rounded_layers import rounded_paths
from upcycle.verification.programs import form_of, verify_programs
from upcycle.verification.whole_model import compare_models, end_to_end


def verify_directory(
    source: Source | OnnxSource,
    directory: Path,
    *,
    sources: Sequence[str] = (),
    given: CalibrationInput | None = None,
    progress: Progress = silent,
) -> Report:
    """The checks of a conversion again: tiers T0 to T2, and T4 where there are ONNX files.

    Layers are compared on the tokens that they get in the loaded model. T3 compares files with the
    model that was written, which is gone. Returns the report of the conversion with what was
    measured now. Where that report is gone, as after training, the whole model and the ONNX files
    alone are compared, and no distance from the dense model fails.

    Args:
        source: the dense model.
        directory: of the converted one.
        sources: the models that its experts come from, if its report may not name them.
        given: what to compare on; None for the built-in text.
        progress: called while the dense model is downloaded, if it has to be.

    Raises:
        UsageError: the directory is no output of upcycle, or was made from another model.
        VerificationError: both models have other outputs.
    """
    has_graph = any((directory / name).is_file() for name in ONNX_FILES)
    if has_graph and not is_described(directory) and not any(directory.glob("*.safetensors*")):
        raise UsageError(
            f"{directory}: it holds an ONNX file and no weights beside it; `upcycle export` "
            "compared it when it wrote it, and the model that was exported can be verified"
        )
    if not is_described(directory) and isinstance(source, Source):
        return _verify_trained(source.fetched(progress), directory, given)
    report = replace(
        read_report(directory),
        checks=(),
        layers=None,
        end_to_end=None,
        sources=None,
        tempered=None,
        onnx=None,
        rounding=None,
    )
    recipe = recipe_of(report, directory)
    named = [name for name in recipe.experts.sources if names_code(name)]
    if sources:
        experts = recipe.experts.model_copy(update={"sources": tuple(sources)})
        recipe = recipe.model_copy(update={"experts": experts})
    elif named:
        raise UsageError(
            f"{directory}: its report says that experts come from `{named[0]}`, and Python code "
            "is not run because a file names it; give all of `sources` in their order"
        )
    if not isinstance(source, Source):
        if given is not None:
            raise UsageError("`data`: ONNX files are compared on `example_inputs`; give those")
        return _verify_onnx(source, directory, report, recipe)
    source = source.fetched(progress)
    if source.dtype is None:  # as it was loaded for the conversion
        source = replace(source, dtype=DTYPES[report.dtype])
    dense = source.load()
    own = None if isinstance(dense, PreTrainedModel) else source.load()
    converted = load(directory, model=own, trust_remote_code=source.trust_remote_code)
    converted = converted.to(device_of(dense))
    evaluation = _evaluation(source, dense, given)
    several = open_sources(recipe.experts.sources, dense, source)
    planned_now = make_plan(locate_in(dense, source.example), recipe, recipe_name=report.recipe)
    report = _verify_layers(
        report, directory, planned_now, dense, converted, several, evaluation.batches[0]
    )
    found, facts, checks = _compared(evaluation, dense, converted, directory, recipe.onnx)
    apart = source_distances(dense, converted, several, evaluation)
    every = (*report.checks, end_to_end(found, recipe, model_dtype(dense)), *checks)
    return replace(report, end_to_end=found, sources=apart or None, onnx=facts, checks=every)


def _verify_trained(source: Source, directory: Path, given: CalibrationInput | None) -> Report:
    converted = load(directory, trust_remote_code=source.trust_remote_code)
    dense = replace(source, dtype=model_dtype(converted)).load()
    _, report = planned(directory, converted, dense, source)
    evaluation = _evaluation(source, dense, given)
    found, facts, checks = _compared(evaluation, dense, converted, directory, ONNX_DEFAULTS)
    return replace(report, end_to_end=found, onnx=facts, checks=tuple(checks))


def _evaluation(source: Source, dense: nn.Module, given: CalibrationInput | None) -> Evaluation:
    with called_data():
        whole = load_recipe("split-all")  # it calibrates nothing, so all of the data is left
        text, example = verification_inputs(dense, whole, given, directory=source.directory)
        found = evaluation_for(
            dense,
            directory=source.directory,
            trust_remote_code=source.trust_remote_code,
            example=source.example if given is None else example,
            text=text,
        )
    return found if given is None else replace(found, what=given.what)


def _compared(
    evaluation: Evaluation,
    dense: nn.Module,
    converted: nn.Module,
    directory: Path,
    options: Onnx,
) -> tuple[ModelDistance, OnnxFacts | None, list[Check]]:
    """The distance of the whole models; facts of the ONNX files in `directory`, and checks of
    these and of programs."""
    with _runs(directory):
        found = compare_models(dense, converted, evaluation)
    facts: OnnxFacts | None = None
    checks: list[Check] = []
    if any((directory / name).is_file() for name in ONNX_FILES):
        single = in_float32(converted)
        with with_own_experts(single):
            facts, checks = verify_precision(directory, single, evaluation, options)
    if programs := sorted(directory.glob(f"*{SUFFIX}")):
        form, cache = form_of(programs[0]), options.cache
        with with_own_experts(converted):
            checks += verify_programs(directory, converted, evaluation, form, cache=cache)
    return found, facts, checks


@contextmanager
def _runs(directory: Path) -> Iterator[None]:
    """Within it a model that fails is one whose files are those of several models."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise UsageError(
            f"{directory}: the model in it cannot be run ({one_line(error)}); its files do not fit "
            "together, convert the model again"
        ) from error


def _verify_layers(
    report: Report,
    directory: Path,
    plan: Plan,
    dense: nn.Module,
    converted: nn.Module,
    sources: Sources,
    inputs: ExampleInputs,
) -> Report:
    """Tiers T0 and T1 on the layers as they are in the files, on the tokens that they get there."""
    plan, provenance = as_made(plan, directory)
    facts, target = report.checkpoint, None
    if facts is not None and facts.form == "native":
        target = destination(dense, plan.requiring((), facts.architecture)).target
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    origins = Origins(parameters, provenance, sources.tensors)
    read = read_by_name(directory)
    with _runs(directory):
        seen = tokens_of_layers(converted, plan, inputs)
    case = stored(lambda spec: read_layer(target, spec, read))

    def on_its_tokens(spec: MoESpec) -> LayerCase:
        made, x_TD = case(spec), seen.get(spec.ffn.path)
        return replace(made, x_TD=None if x_TD is None else x_TD.to(made.layer.experts.down_proj))

    try:
        rows = verify_layers(plan.specs, on_its_tokens, origins)
    except (KeyError, RuntimeError) as error:  # a tensor that is not there, or has another shape
        raise UsageError(
            f"{directory}: its layers are not those of its report ({one_line(error)}); convert the "
            "model again"
        ) from error
    return replace(report, layers=rows, checks=tuple(layer_checks(rows, model_dtype(dense))))


def _verify_onnx(source: OnnxSource, directory: Path, report: Report, recipe: Recipe) -> Report:
    """The same for a file; where it has rounded experts only the outputs are left to compare."""
    path = directory / FILE
    if not path.is_file():
        raise UsageError(f"{directory}: it has no {FILE} to compare with {source.path.name}")
    feeds = feeds_for(source, recipe.seed)
    plan, provenance = as_made(source.plan(recipe, report.recipe), directory)
    outputs = run(source.path, feeds)
    dense = OnnxFile(source, plan, feeds, outputs, None, DEFAULTS)
    if not rounded_paths(path):
        read = read_by_name(*sorted(directory.glob(f"{EXPERTS}*.safetensors")))
        made = Made(plan, lambda spec: read_at(spec.ffn.path, spec, read), provenance)
        return dense.verify(report, directory, made, read, silent)
    rounds = recipe.onnx.rounds
    found = compare_outputs(outputs, run(path, feeds, prepack=rounds), feeds)  # as it is served
    if rounds:  # then the outputs are off by more than the recipe says, which is told
        return replace(report, end_to_end=found)
    return replace(report, end_to_end=found, checks=(end_to_end(found, recipe, dense.dtype),))
