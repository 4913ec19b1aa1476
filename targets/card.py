"""The model card of a conversion, out of its plan and report."""

from collections.abc import Iterator, Sequence

from upcycle.ir.measured import Distance
from upcycle.ir.report import Report, plain
from upcycle.ir.spec import Plan
from upcycle.recipe.reader import dump_recipe
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.model_card import model_card
from upcycle.targets.native.tempered import is_tempered

MAX_LAYERS = 12  # in the card; report.json has all


def card(
    name: str,
    plan: Plan,
    report: Report,
    targets: Sequence[str],
    written: Checkpoint | None = None,
    *,
    is_pair: bool = False,
) -> str:
    """README.md as text, of a checkpoint `written` with `targets` or of a converted ONNX file.

    With `is_pair` the ONNX files are an encoder and a decoder.
    """
    formats = ["onnx_pair" if is_pair else "onnx"] if "onnx" in targets else []
    notes = [*_notes(plan, targets)]
    runtimes: dict[str, str] = {}
    if written is not None:
        form = written.destination
        formats = [form.form, *formats]
        runtimes = {runtime: support.text() for runtime, support in form.runtimes.items()}
        if "onnx" not in targets:
            del runtimes["onnxruntime"]
        if is_tempered(form.target, plan.specs):
            notes += _tempered(report)
    return model_card(
        name=name,
        base_model=report.model,
        promise=plan.promise,
        recipe_name=plan.recipe_name,
        recipe_text=dump_recipe(plan.recipe),
        numbers=dict(_numbers(plan, report)),
        checks=report.checks,
        targets=formats,
        auto_class=written.auto_class if written else "",
        runtimes=runtimes,
        notes=notes,
        library="transformers" if written else "onnx",
    )


def _numbers(plan: Plan, report: Report) -> Iterator[tuple[str, str]]:
    first = plan.specs[0]
    yield "converted FFNs", f"{len(plan.specs)} of {len(plan.located.ffns)}"
    yield "experts per layer", f"{first.num_experts} of {first.width} neurons"
    yield "experts that a token visits", f"{first.top_k}"
    if costs := report.costs:
        yield "parameters", f"{costs.parameters_after:,} (dense {costs.parameters_before:,})"
        yield "parameters that a token meets", f"{costs.active_parameters:,}"
    if calibration := report.calibration:
        yield "calibrated on", calibration.data
        for usage in calibration.layers[:MAX_LAYERS]:
            path, tokens, load, dead, entropy, mass = usage.cells()
            text = f"{load} of {tokens} tokens per expert, {dead} experts without any"
            yield f"load of `{path}`", f"{text}, entropy {entropy}, captured mass {mass}"
    for output, found in report.tempered.outputs.items() if report.tempered else ():
        text = f"relative error {found.relative:.2e}, cosine {_cosines(found)}"
        yield f"{output}: these files and the model before its routers were tempered", text
    if end := report.end_to_end:
        yield "compared on", end.inputs
        for output, found in end.outputs.items():
            yield f"{output}: relative error", f"{found.relative:.2e}"
            yield f"{output}: cosine, smallest and mean", _cosines(found)
        for key, value in plain(end.language_model).items() if end.language_model else ():
            yield key.replace("_", " "), f"{value:.6g}"
    layers = report.layers or ()
    for row in layers[:MAX_LAYERS]:
        text = f"relative error {row.relative:.2e}, cosine {_cosines(row)}"
        yield f"layer `{row.path}`", text
    if len(layers) > MAX_LAYERS:
        yield f"{len(layers) - MAX_LAYERS} more layers", "in report.json"


def _cosines(found: Distance) -> str:
    return f"{found.min_cosine:.6f}, {found.mean_cosine:.6f}"


def _notes(plan: Plan, targets: Sequence[str]) -> Iterator[str]:
    names = {spec.ffn.pointwise.name for spec in plan.specs}
    if "onnx" in targets and names & {"gelu", "geglu"}:
        yield (
            "The dense model's GELU is the erf form. The ONNX file computes that form too, in "
            "standard operations: the fused kernel of ONNX Runtime has the tanh form, which "
            "differs by up to 5e-4 for each neuron and is not used here."
        )


def _tempered(report: Report) -> Iterator[str]:
    yield (
        "The routers in these files are tempered: multiplied by a small power of two, so that the "
        "experts of a token have nearly the weight that the recipe gives them. Multiply them back "
        "before training."
    )
    if found := report.tempered:
        yield (
            f"On the evaluation text {found.elsewhere} of {found.tokens} choices fell on "
            "other experts because their scores had come too near. The output of such a token may "
            "be another; the tables show by how much."
        )
    else:
        yield (
            "How far they are from the recipe was not measured, as the model was not run; convert "
            "it in memory and with verification for that."
        )
