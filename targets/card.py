"""The README.md of a converted model: what it is, how far it is from the dense one, how to load it.

The same plan and report give the same text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from upcycle.ir.measured import Check, Distance
from upcycle.ir.report import Published, Report, plain
from upcycle.ir.spec import Plan
from upcycle.recipe.reader import changes_of
from upcycle.targets.card_usage import TASKS, Usage
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.native.tempered import is_tempered

MAX_LAYERS = 12  # in the card; report.json has all

PROMISES: dict[str, str] = {
    "exact": "The outputs equal those of the dense model for every input, up to rounding.",
    "exact with all experts": (
        "With all experts chosen and weight one the outputs equal those of the dense model, up to "
        "rounding. With the top_k of this model they are an approximation, which the table shows."
    ),
    "approximate": "The outputs are an approximation of the dense model's; the table shows it.",
}


def card(
    name: str,
    plan: Plan,
    report: Report,
    targets: Sequence[str],
    written: Checkpoint | None = None,
    *,
    is_pair: bool = False,
    has_tokenizer: bool = False,
) -> str:
    """README.md as text, of a checkpoint `written` with `targets` or of a converted ONNX file.

    With `is_pair` the ONNX files are an encoder and a decoder; with `has_tokenizer` a tokenizer is
    beside them.
    """
    forms: tuple[str, ...] = ("onnx_pair" if is_pair else "onnx",) if "onnx" in targets else ()
    forms += ("pt2",) if "pt2" in targets and not is_pair else ()
    notes = [*_notes(plan, targets)]
    runtimes: dict[str, str] = {}
    if written is not None:
        form = written.destination
        forms = (form.form, *forms)
        runtimes = {runtime: support.text() for runtime, support in form.runtimes.items()}
        if "onnx" not in targets:
            del runtimes["onnxruntime"]
        if is_tempered(form.target, plan.specs):
            notes += _tempered(report)
    is_module = written is not None and written.destination.form == "module"
    auto_class = written.auto_class if written is not None and not is_module else ""
    usage = Usage(forms, auto_class, has_tokenizer)
    return model_card(
        name=name,
        report=report,
        notes=notes,
        numbers=dict(_numbers(plan, report)),
        usage=usage,
        runtimes=runtimes,
        library="pytorch" if is_module else "transformers" if written else "onnx",
        recipe_text=changes_of(plan.recipe),
    )


def _numbers(plan: Plan, report: Report) -> Iterator[tuple[str, str]]:
    first = plan.specs[0]
    yield "converted FFNs", f"{len(plan.specs)} of {len(plan.located.ffns)}"
    yield "experts per layer", f"{first.num_experts} of {first.width} neurons"
    yield "experts per token", f"{first.top_k}"
    if costs := report.costs:
        yield "parameters", f"{costs.parameters_after:,} (dense {costs.parameters_before:,})"
        yield "active parameters", f"{costs.active_parameters:,}"
    if calibration := report.calibration:
        yield "calibrated on", calibration.data
        for usage in calibration.layers[:MAX_LAYERS]:
            path, tokens, load, dead, entropy, mass = usage.cells()
            text = f"{load} of {tokens} tokens per expert, {dead} experts without any"
            text += f", entropy {entropy}, captured mass {mass}"
            yield f"load of `{path}`, on the calibration data", text
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
        yield f"layer `{row.path or '(root)'}`", text
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


def model_card(
    *,
    name: str,
    report: Report,
    notes: Sequence[str],
    numbers: Mapping[str, str],
    usage: Usage,
    runtimes: Mapping[str, str],
    library: str,
    recipe_text: str,
) -> str:
    """The text of the card; a model without checks was not verified."""
    verdict = report.verdict
    sections = [
        _front_matter(report, usage, library),
        f"# {name}",
        f"A sparse Mixture of Experts, made from the dense model {_code(report.model)} by upcycle "
        f"with the recipe {_code(report.recipe)}.",
        f"**{verdict.headline[0].upper()}{verdict.headline[1:]}.** {' '.join(verdict.lines)}",
        "## Use",
        *(f"{title}:\n\n" + _fenced("python", code) for title, code in usage.snippets()),
        *_training(report, usage),
        "## What is exact",
        ("Before the weights were rounded: " if report.rounding else "") + PROMISES[report.promise],
        *notes,
        "## In numbers",
        _table(("", ""), list(numbers.items())),
        "## Verification",
        _verification(report.checks),
    ]
    if runtimes:
        sections += [
            "Other software, judged by its source code; this model was not run in it:",
            _table(("software", "support"), list(runtimes.items())),
        ]
    sections += [
        "## Recipe",
        f"`recipe.yaml` has every key; this is what differs from the defaults "
        f"({_code(report.recipe)}):",
        _fenced("yaml", recipe_text),
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def _training(report: Report, usage: Usage) -> Iterator[str]:
    if report.verdict.level == "unknown" or not {"native", "remote_code"} & set(usage.forms):
        return
    yield "## Train"
    weights = report.resolved_recipe.get("router", {}).get("weights")
    if report.promise == "exact" and weights != "renorm_detach":
        yield (
            "The experts are equal until they are trained, and until then no choice of the router "
            "matters to the loss of the task. Turn the balance loss on, which moves the router:"
        )
        yield _fenced("python", "model.config.output_router_logits = True")
    yield (
        "`transformers.Trainer` trains it as any other model. `upcycle export` writes ONNX of the "
        "trained model, and `upcycle verify` compares it with the dense one."
    )


def _front_matter(report: Report, usage: Usage, library: str) -> str:
    """What the hub reads; a name that does not look like one is left out."""
    about = report.published or Published()
    task = about.pipeline_tag or TASKS.get(usage.auto_class)
    base = report.source.hub if report.source else report.model
    is_id = report.source is not None or re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    data: dict[str, Any] = {
        "license": about.license,
        "language": list(about.languages) or None,
        "library_name": library,
        "pipeline_tag": task,
        "base_model": base if is_id and not base.startswith(".") else None,
        "tags": ["moe", "mixture-of-experts", "upcycle"],
    }
    kept = {key: value for key, value in data.items() if value is not None}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False)}---"


def _verification(checks: Sequence[Check]) -> str:
    if not checks:
        return "The conversion was not verified."
    rows = [
        (c.what, f"{c.error:.2e}", f"{c.allowed:.2e}", "yes" if c.passed else "**no**")
        for c in checks
    ]
    table = _table(("compared with the dense model", "error", "allowed", "held"), rows)
    return f"{table}\n\nErrors are relative to the largest value of the dense model's output."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _fenced(language: str, text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.strip()}\n{fence}"
