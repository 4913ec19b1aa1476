"""The model card of a conversion, out of its plan and report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from upcycle.ir.spec import Plan
from upcycle.passes.calibrate.usage import calibration_rows
from upcycle.recipe.reader import dump_recipe
from upcycle.targets import model_card
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.native.tempered import is_tempered

MAX_LAYERS = 12  # in the card; report.json has all


def card(
    name: str,
    plan: Plan,
    written: Checkpoint,
    targets: Sequence[str],
    report: Mapping[str, Any],
    *,
    is_pair: bool = False,
) -> str:
    """README.md as text.

    Args:
        name: title.
        plan: what was converted.
        written: the checkpoint.
        targets: what was asked for.
        report: as `upcycle.conversion.in_memory.convert` and `upcycle.conversion.emit.emit` fill it
            in.
        is_pair: the ONNX files are an encoder and a decoder.
    """
    onnx = ["onnx_pair" if is_pair else "onnx"] if "onnx" in targets else []
    return model_card.model_card(
        name=name,
        **_common(plan, report),
        targets=[written.form, *onnx],
        auto_class=written.auto_class,
        runtimes={
            name: support.text()
            for name, support in written.runtimes.items()
            if name != "onnxruntime" or "onnx" in targets
        },
        notes=[
            *_notes(plan, targets),
            *(_tempered(report) if is_tempered(written.target, plan.specs) else []),
        ],
    )


def onnx_card(name: str, plan: Plan, report: Mapping[str, Any]) -> str:
    """README.md of a converted ONNX file; arguments as for `card`."""
    return model_card.model_card(
        name=name,
        **_common(plan, report),
        targets=["onnx"],
        notes=list(_notes(plan, ["onnx"])),
        library="onnx",
    )


def _common(plan: Plan, report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "base_model": report["model"],
        "promise": plan.promise,
        "recipe_name": plan.recipe_name,
        "recipe_text": dump_recipe(plan.recipe),
        "numbers": dict(_numbers(plan, report)),
        "checks": [model_card.Check(c["what"], c["error"], c["allowed"]) for c in report["checks"]],
    }


def _numbers(plan: Plan, report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    first = plan.specs[0]
    yield "converted FFNs", f"{len(plan.specs)} of {len(plan.located.ffns)}"
    yield "experts per layer", f"{first.num_experts} of {first.width} neurons"
    yield "experts that a token visits", f"{first.top_k}"
    if costs := report.get("costs"):
        yield "parameters", f"{costs['parameters_after']:,} (dense {costs['parameters_before']:,})"
        yield "parameters that a token meets", f"{costs['active_parameters']:,}"
    if calibration := report.get("calibration"):
        yield "calibrated on", calibration["data"]
        for path, tokens, load, dead, entropy, mass in calibration_rows(calibration)[:MAX_LAYERS]:
            text = f"{load} of {tokens} tokens per expert, {dead} experts without any"
            yield f"load of `{path}`", f"{text}, entropy {entropy}, captured mass {mass}"
    for output, found in report.get("tempered", {}).get("outputs", {}).items():
        text = f"relative error {found['relative']:.2e}, cosine {_cosines(found)}"
        yield f"{output}: these files and the model before its routers were tempered", text
    end = report.get("end_to_end")
    if end is None:
        return
    yield "compared on", end["inputs"]
    for output, found in end["outputs"].items():
        yield f"{output}: relative error", f"{found['relative']:.2e}"
        yield f"{output}: cosine, smallest and mean", _cosines(found)
    for key, value in end.get("language_model", {}).items():
        yield key.replace("_", " "), f"{value:.6g}"
    for row in report["layers"][:MAX_LAYERS]:
        text = f"relative error {row['relative']:.2e}, cosine {_cosines(row)}"
        yield f"layer `{row['path']}`", text
    if len(report["layers"]) > MAX_LAYERS:
        yield f"{len(report['layers']) - MAX_LAYERS} more layers", "in report.json"


def _cosines(found: Mapping[str, float]) -> str:
    return f"{found['min_cosine']:.6f}, {found['mean_cosine']:.6f}"


def _notes(plan: Plan, targets: Sequence[str]) -> Iterator[str]:
    names = {spec.ffn.pointwise.name for spec in plan.specs}
    if "onnx" in targets and names & {"gelu", "geglu"}:
        yield (
            "The dense model's GELU is the erf form. The ONNX file computes that form too, in "
            "standard operations: the fused kernel of ONNX Runtime has the tanh form, which "
            "differs by up to 5e-4 for each neuron and is not used here."
        )


def _tempered(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "The routers in these files are tempered: multiplied by a small power of two, so that the "
        "experts of a token have nearly the weight that the recipe gives them. Multiply them back "
        "before training."
    )
    if found := report.get("tempered"):
        yield (
            f"On the evaluation text {found['elsewhere']} of {found['tokens']} choices fell on "
            "other experts because their scores had come too near. The output of such a token may "
            "be another; the tables show by how much."
        )
    else:
        yield (
            "How far they are from the recipe was not measured, as the model was not run; convert "
            "it in memory and with verification for that."
        )
