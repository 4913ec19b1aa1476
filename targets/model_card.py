"""The README.md of a converted model: what it is, how far it is from the dense one, how to load it.

Plain data in, Markdown out; the same data gives the same text.
"""

import re
from collections.abc import Mapping, Sequence

from upcycle.ir.measured import Check

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
    "exact when K = N": (
        "With all experts chosen and weight one the outputs equal those of the dense model, up to "
        "rounding. With the top_k of this model they are an approximation, which the table shows."
    ),
    "approximate": "The outputs are an approximation of the dense model's; the table shows it.",
}


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
    auto_class: str = "AutoModelForCausalLM",
    runtimes: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    library: str = "transformers",
) -> str:
    """The text of the card, with `name` as its title and `notes` as further paragraphs.

    Args:
        base_model: the dense model: a Hub id (then the Hub links to it), or any other name.
        promise: a key of `PROMISES`.
        numbers: facts in the order in which they are shown, such as "experts per layer": "8".
        checks: the verification; if empty it was not run.
        targets: which of `LOADING` the directory contains.
        auto_class: the class of transformers that loads it, if one does.
        runtimes: other software and how it runs the model.
        library: what loads it, in the words of the Hub.
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
            "Other software, by its source and not by a run of this model:",
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
