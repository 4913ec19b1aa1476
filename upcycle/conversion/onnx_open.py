"""Open an ONNX file for the pipeline, and refuse what cannot be done to one."""

from pathlib import Path

from upcycle.conversion.onnx_file import NO_GRADIENTS, OnnxFile
from upcycle.conversion.options import Options
from upcycle.data.calibration_files import CalibrationInput
from upcycle.data.onnx_calibration import onnx_calibration, verification_feeds
from upcycle.errors import UnsupportedError, UsageError
from upcycle.models.checkpoint_fit import check_finite
from upcycle.models.onnx_file import OnnxSource
from upcycle.onnx.inputs import describe
from upcycle.onnx.run import run
from upcycle.passes.plan.costs import costs
from upcycle.passes.plan.plan import needs
from upcycle.recipe.schema import Recipe
from upcycle.targets.destination import onnx_destination
from upcycle.targets.files.tensor_file import check_disk
from upcycle.targets.onnx.layers import check_router
from upcycle.verification.onnx.layers import feeds_for


def open_onnx_file(
    source: OnnxSource,
    recipe: Recipe,
    recipe_name: str,
    out: Path,
    given: CalibrationInput | None,
    options: Options,
) -> OnnxFile:
    """The file with its plan; arguments as for `upcycle.conversion.open.open_dense`.

    Raises:
        UsageError: the file is broken, or another target than ONNX is asked for.
        UnsupportedError: no FFN can be converted, or ONNX Runtime cannot run the file.
        PlanError: the recipe does not fit.
    """
    if options.stream or options.resume:
        raise UsageError("`stream`: it does not apply to an ONNX file; leave it out")
    if "gradients" in needs(recipe):
        raise UsageError(NO_GRADIENTS)
    if recipe.experts.sources:
        raise UsageError(
            "an ONNX file is read by itself, and the recipe takes experts from other models; "
            "convert the model directory that it came from"
        )
    if "onnx" not in options.targets:
        raise UsageError("`targets=safetensors`: an ONNX file becomes an ONNX file; leave it out")
    options.watch("capture", source.found.program)
    options.watch("locate", source.found.located)
    plan = source.plan(recipe, recipe_name).requiring(options.runtimes, options.architecture)
    onnx_destination(plan)
    for spec in plan.specs:
        check_router(spec.ffn.path, spec.router_config(), has_ids=False)
    if recipe.onnx.dtype not in ("auto", "float32"):
        raise UsageError(
            f"onnx.dtype: {recipe.onnx.dtype}: an ONNX file keeps its type, and its layers compute "
            "in float32; leave it out, or convert the model that the file was exported from"
        )
    options.watch("plan", plan)
    check_disk(out, costs(plan, *source.size).bytes_on_disk)
    names = [name for spec in plan.specs for name in spec.ffn.parameters]
    weights = source.found.weights
    check_finite(source.path, ((name, weights[name]) for name in names))
    own = verification_feeds(source, given)
    feeds = feeds_for(source, recipe.seed) if own is None else own
    shown = onnx_calibration(source, recipe, given) if needs(recipe) else None
    try:
        outputs = run(source.path, feeds) if options.verify else None  # or why it cannot be run
    except UnsupportedError as error:
        if own is not None or source.example is not None:
            raise
        raise UnsupportedError(
            f"{error}; it was given {describe(feeds)}: if they do not fit, give others with "
            "`example_inputs`"
        ) from error
    return OnnxFile(source, plan, feeds, outputs, shown, options)
