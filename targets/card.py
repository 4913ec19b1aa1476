"""The README.md of a converted model: what it is, how far it is from the dense one, how to load it.

The same plan and report give the same text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from upcycle.ir.measured import Check, Distance
from upcycle.ir.report import Report, plain
from upcycle.ir.spec import Plan
from upcycle.recipe.reader import dump_recipe
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.native.tempered import is_tempered

MAX_LAYERS = 12  # in the card; report.json has all

# How to load each kind of output; {auto_class} is a class of transformers.
LOADING: dict[str, tuple[str, str]] = {
    "native": (
        "With transformers, no other package",
        "from transformers import {auto_class}\n\n"
        'model = {auto_class}.from_pretrained("path/to/this/directory")',
    ),
    "remote_code": (
        "With transformers; the code in this directory is run. A tokenizer or processor that is "
        "here wants `trust_remote_code=True` as well. After `import upcycle` its own classes are "
        "used, and no flag is needed",
        "from transformers import {auto_class}\n\n"
        "model = {auto_class}.from_pretrained(\n"
        '    "path/to/this/directory", trust_remote_code=True\n'
        ")",
    ),
    "module": (
        "With upcycle; `dense` is an instance of the dense model's class",
        'import upcycle\n\nmodel = upcycle.load("path/to/this/directory", dense)',
    ),
    "onnx": (
        "With ONNX Runtime",
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("path/to/this/directory/model.onnx")',
    ),
    "onnx_pair": (
        "With ONNX Runtime; the encoder runs once, and the decoder reads what it returns and its "
        "own past (`present.*` of one run is `past_key_values.*` of the next)",
        "import onnxruntime\n\n"
        'directory = "path/to/this/directory/"\n'
        'encoder = onnxruntime.InferenceSession(directory + "encoder_model.onnx")\n'
        'decoder = onnxruntime.InferenceSession(directory + "decoder_with_past_model.onnx")',
    ),
}

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
    yield "experts per token", f"{first.top_k}"
    if costs := report.costs:
        yield "parameters", f"{costs.parameters_after:,} (dense {costs.parameters_before:,})"
        yield "active parameters", f"{costs.active_parameters:,}"
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


def model_card(
    *,
    name: str,
    base_model: str,
    promise: str,
    recipe_name: str,
    recipe_text: str,
    numbers: Mapping[str, str],
    checks: Sequence[Check],
    targets: Sequence[str],
    auto_class: str,
    runtimes: Mapping[str, str],
    notes: Sequence[str],
    library: str,
) -> str:
    """The text of the card.

    `base_model` is a Hub id, and then the Hub links to it, or any other name; `targets` are keys of
    `LOADING`. Without `checks` the model was not verified.
    """
    sections = [
        _front_matter(base_model, library),
        f"# {name}",
        f"A sparse Mixture of Experts, made from the dense model {_code(base_model)} by upcycle "
        f"with the recipe {_code(recipe_name)}.",
        "## What is exact",
        PROMISES[promise],
        *notes,
        "## In numbers",
        _table(("", ""), list(numbers.items())),
        "## Verification",
        _verification(checks),
        "## Loading",
        *(
            f"{title}:\n\n" + _fenced("python", code.format(auto_class=auto_class))
            for title, code in map(LOADING.__getitem__, targets)
        ),
    ]
    if runtimes:
        sections += [
            "Other software, judged by its source code; this model was not run in it:",
            _table(("software", "support"), list(runtimes.items())),
        ]
    sections += ["## Recipe", _fenced("yaml", recipe_text)]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def _front_matter(base_model: str, library: str) -> str:
    lines = ["---", f"library_name: {library}", "tags:", "- moe", "- upcycle"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not base_model.startswith("."):
        lines += [f"base_model: {base_model}"]
    return "\n".join([*lines, "---"])


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
