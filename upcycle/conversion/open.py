"""Open a named model: capture, locate, plan, and refuse all that can be refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.dense_model import DenseModel
from upcycle.conversion.in_memory import InMemory
from upcycle.conversion.mapped import Mapped
from upcycle.conversion.options import DEFAULTS, Options
from upcycle.conversion.passes import UNWATCHED
from upcycle.data.calibration import CalibrationData, calibration_data, verification_inputs
from upcycle.data.calibration_files import CalibrationInput, read_calibration
from upcycle.data.verification_inputs import evaluation_for
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.measured import Costs
from upcycle.ir.spec import Plan
from upcycle.models.checkpoint_fit import check_finite, fit
from upcycle.models.checkpoint_tensors import has_weights, read_tensors
from upcycle.models.dense import Source
from upcycle.models.expert_sources import Sources, check_sources, merged_tensors, open_sources
from upcycle.models.onnx_file import OnnxSource
from upcycle.passes.locate.locate import captured_and_located
from upcycle.passes.plan.costs import costs, model_size
from upcycle.passes.plan.model_problems import check_model
from upcycle.passes.plan.plan import make_plan, needs
from upcycle.recipe.schema import Recipe
from upcycle.targets.destination import destination
from upcycle.targets.files.tensor_file import check_disk
from upcycle.util.memory import free_memory
from upcycle.util.progress import Progress, step


def open_dense(
    source: Source | OnnxSource,
    recipe: Recipe,
    recipe_name: str,
    out: Path,
    options: Options,
    progress: Progress,
) -> DenseModel[Any]:
    """The dense model with its plan; no weight is read before everything was refused that can be.

    Args:
        source: as the user named it.
        recipe, recipe_name: what to do to it, and how reports call that.
        out: where the result goes; the disk there must be large enough.
        options: how to convert and to write it.
        progress: called as each step begins and ends.
    """
    given = None
    if options.calibration:
        trusted = isinstance(source, Source) and source.allow_pickle
        given = read_calibration(
            options.calibration, field=options.text_field, allow_pickle=trusted
        )
    if not isinstance(source, Source):
        from upcycle.conversion.onnx_open import open_onnx_file  # onnx only where it is needed

        with step(progress, "capturing"):
            return open_onnx_file(source, recipe, recipe_name, out, given, options)
    if source.weights is not None:  # nothing is downloaded for what is refused
        _planned(source, recipe, recipe_name, replace(options, watch=UNWATCHED))
        source = source.fetched(progress)
    with step(progress, "capturing"):
        skeleton, plan = _planned(source, recipe, recipe_name, options)
    unread = source.unread(skeleton)
    if given is not None:  # the model may read something else, or there is no tokenizer for it
        _check_data(skeleton, plan, source, given)
    check_sources(recipe.experts.sources, skeleton, source)
    total, itemsize = model_size(skeleton)
    itemsize = itemsize if source.dtype is None else source.dtype.itemsize
    estimate = costs(plan, total, itemsize)
    check_disk(out, estimate.bytes_on_disk)
    if _is_streamed(source, estimate, options):
        return _mapped(source, plan, skeleton, given, options, unread)
    del skeleton
    with step(progress, "loading"):
        model = source.load()
    return in_memory(model, plan, given, source=source, options=options, unread=unread)


def usual_targets(source: Source | OnnxSource) -> tuple[str, ...]:
    """What is written if nothing is asked for: weights, and of a program a program, else ONNX."""
    if isinstance(source, Source) and source.is_program:
        return ("safetensors", "pt2")
    return ("safetensors", "onnx")


def _planned(
    source: Source, recipe: Recipe, recipe_name: str, options: Options
) -> tuple[nn.Module, Plan]:
    """The model on the meta device, and what becomes of it."""
    skeleton = source.skeleton()
    program, located = captured_and_located(skeleton, source.example)
    options.watch("capture", program)
    options.watch("locate", located)
    plan = make_plan(located, recipe, recipe_name=recipe_name)
    plan = plan.requiring(options.runtimes, options.architecture)
    check_model(skeleton, plan)
    options.watch("plan", plan)
    destination(skeleton, plan)
    return skeleton, plan


def in_memory(
    model: nn.Module,
    plan: Plan,
    given: CalibrationInput | None,
    *,
    source: Source | None = None,
    example: ExampleInputs | None = None,
    sources: Sources | None = None,
    options: Options = DEFAULTS,
    unread: tuple[str, ...] = (),
) -> InMemory:
    """The same for a module that is in memory.

    Args:
        model: with its weights.
        plan: what its FFNs become.
        given: data of the user, for calibration and verification.
        source: where it comes from.
        example: inputs that the user gave; those of `source` if None.
        sources: the models that experts are taken from; opened by their names if None.
        options: how to convert and to write it.
        unread: the stored tensors that nothing in it reads.

    Raises:
        UsageError: a parameter has NaN or infinity in it.
    """
    directory = source.directory if source else None
    check_finite(source.name if source else type(model).__name__, model.named_parameters())
    if example is None and source is not None:
        example = source.example
    text, held = verification_inputs(model, plan.recipe, given, directory=directory)
    if sources is None:
        sources = open_sources(plan.recipe.experts.sources, model, source)
    return InMemory(
        model,
        plan,
        data=_data(model, plan, given, source, example),
        source=source,
        sources=sources,
        example=held if example is None else example,
        text=text,
        options=options,
        unread=unread,
    )


def _data(
    model: nn.Module,
    plan: Plan,
    given: CalibrationInput | None,
    source: Source | None,
    example: ExampleInputs | None,
) -> CalibrationData | None:
    """What is shown to the model; None if the recipe needs nothing."""
    if not needs(plan.recipe):
        return None
    count = plan.specs[0].num_experts
    return calibration_data(
        model,
        plan.recipe,
        given,
        directory=source.directory if source else None,
        trust_remote_code=source is not None and source.trust_remote_code,
        example=example,
        domains=count,
    )


def _check_data(skeleton: nn.Module, plan: Plan, source: Source, given: CalibrationInput) -> None:
    directory, trust = source.directory, source.trust_remote_code
    text, example = verification_inputs(skeleton, plan.recipe, given, directory=directory)
    evaluation_for(
        skeleton, directory=directory, trust_remote_code=trust, example=example, text=text
    )
    _data(skeleton, plan, given, source, None)


def _is_streamed(source: Source, estimate: Costs, options: Options) -> bool:
    if options.stream is not None or options.resume:
        return options.stream or options.resume
    return source.directory is not None and must_stream(estimate)


def must_stream(costs: Costs) -> bool:
    """Whether the dense and the converted model together would fill most of the free memory."""
    return costs.peak_bytes > 0.8 * free_memory()


def _mapped(
    source: Source,
    plan: Plan,
    skeleton: nn.Module,
    given: CalibrationInput | None,
    options: Options,
    unread: tuple[str, ...],
) -> Mapped:
    """The model as a memory-mapped checkpoint.

    Raises:
        UsageError: it is no directory of safetensors files, or something needs all of it.
        UnsupportedError: the checkpoint names its tensors otherwise than the model does.
    """
    directory, experts = source.directory, plan.recipe.experts
    if directory is None or source.dtype is not None or source.device != "cpu":
        raise UsageError(
            "a model that is converted piece by piece is a directory of safetensors files in its "
            "own dtype, on the CPU; leave `dtype` and `device` out, or pass `stream=False`"
        )
    if tuple(options.targets) != ("safetensors",):
        raise UsageError(
            "a model that is converted piece by piece is never whole in memory, and an export to "
            "ONNX or to a program needs that; pass `targets=safetensors`"
        )
    if experts.sources and needs(plan.recipe):
        raise UsageError(
            "a model that is converted piece by piece cannot be calibrated on the merge of several "
            "models, which would be whole in memory; take a router that needs no data, or pass "
            "`stream=False`"
        )
    if not has_weights(directory):
        raise UsageError(
            f"{directory}: it has no safetensors files, which alone are read piece by piece; "
            "convert it in memory (`stream=False`)"
        )
    found = fit(directory, read_tensors(directory), skeleton)
    if isinstance(found, str):
        raise UnsupportedError(
            f"{directory}: the checkpoint has no tensor {found}, so it cannot be converted "
            "piece by piece; convert it in memory (`stream=False`)"
        )
    tensors = found.tensors
    sources = open_sources(experts.sources, skeleton, source, held=tensors)
    if sources.names:
        tensors = merged_tensors(tensors, sources, experts.merge)
    mapped = source.load(mapped=True) if needs(plan.recipe) else skeleton
    data = _data(mapped, plan, given, source, source.example)
    return Mapped(source, skeleton, tensors, plan, data, sources, options, unread)
