"""Imports point down: a module may import its own layer and the ones below it, nothing above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A name stands for the module, or the package with everything in it, that has no longer entry.
LAYERS = {
    "upcycle": 5,  # its public names
    # 6: the command line
    "upcycle.__main__": 6,
    "upcycle.cli": 6,
    "upcycle.commands": 6,
    "upcycle.program": 6,
    # 5: the driver
    "upcycle.bench": 5,
    "upcycle.calibration": 5,
    "upcycle.calibration_files": 5,
    "upcycle.image_inputs": 5,
    "upcycle.usage": 5,
    "upcycle.text_domains": 5,
    "upcycle.recipe_facts": 5,
    "upcycle.streamed_calibration": 5,
    "upcycle.card": 5,
    "upcycle.compiler": 5,
    "upcycle.conversion_report": 5,
    "upcycle.costs": 5,
    "upcycle.executors": 5,
    "upcycle.driver": 5,
    "upcycle.preview": 5,
    "upcycle.streaming": 5,
    "upcycle.checks": 5,
    "upcycle.layer_report": 5,
    "upcycle.emit": 5,
    "upcycle.evaluation": 5,
    "upcycle.text_inputs": 5,
    "upcycle.loading": 5,
    "upcycle.onnx_calibration": 5,
    "upcycle.near_ties": 5,
    "upcycle.onnx_choices": 5,
    "upcycle.onnx_convert": 5,
    "upcycle.onnx_output": 5,
    "upcycle.onnx_precision": 5,
    "upcycle.onnx_rewrite": 5,
    "upcycle.onnx_rounding": 5,
    "upcycle.onnx_source": 5,
    "upcycle.onnx_verify": 5,
    "upcycle.report": 5,
    "upcycle.inspection": 5,
    "upcycle.inspection_report": 5,
    "upcycle.difference": 5,
    "upcycle.origins": 5,
    "upcycle.tables": 2,
    "upcycle.source": 5,
    "upcycle.sources": 5,
    "upcycle.module_tensors": 5,
    "upcycle.verification": 5,
    "upcycle.objectives": 5,
    "upcycle.survey": 5,
    # 4: the steps
    "upcycle.passes": 4,
    # 3: one method, one format
    "upcycle.passes.experts": 3,
    "upcycle.passes.least_squares": 3,
    "upcycle.passes.gates": 3,
    "upcycle.targets": 3,
    # 2: what the steps work on
    "upcycle.capture": 2,
    "upcycle.console": 2,
    "upcycle.distinct": 2,
    "upcycle.inputs": 2,
    "upcycle.input_shapes": 2,
    "upcycle.known": 2,
    "upcycle.model_inputs": 2,
    "upcycle.caches": 2,
    "upcycle.metrics": 2,
    "upcycle.onnx_options": 2,
    "upcycle.section": 2,
    "upcycle.places": 2,
    "upcycle.provenance": 2,
    "upcycle.recipe": 2,
    "upcycle.recipe_file": 2,
    "upcycle.recipes": 2,
    "upcycle.recorder": 2,
    "upcycle.sample_store": 2,
    "upcycle.samples": 2,
    "upcycle.shipped": 2,
    "upcycle.spec": 2,
    "upcycle.structure": 2,
    # 1: data, and the layer that a converted model contains
    "upcycle.activation_names": 1,
    "upcycle.activations": 1,
    "upcycle.cache_home": 1,
    "upcycle.compiled": 1,
    "upcycle.context": 1,
    "upcycle.errors": 1,
    "upcycle.heap": 1,
    "upcycle.expert_kernels": 1,
    "upcycle.experts": 1,
    "upcycle.ffn": 1,
    "upcycle.layer_weights": 1,
    "upcycle.kept": 1,
    "upcycle.kernels": 1,
    "upcycle.modes": 1,
    "upcycle.named": 1,
    "upcycle.moe": 1,
    "upcycle.auto": 4,
    "upcycle.operation": 1,
    "upcycle.plain_json": 1,
    "upcycle.pointwise": 1,
    "upcycle.pretrained": 1,
    "upcycle.progress": 1,
    "upcycle.quiet": 1,
    "upcycle.routers": 1,
    "upcycle.routing": 1,
    "upcycle.selection": 1,
    "upcycle.tap": 1,
    "upcycle.triton_kernels": 1,
    "upcycle.triton_launch": 1,
    "upcycle.triton_operation": 1,
    "upcycle.triton_source": 1,
    "upcycle.version": 1,
    "upcycle.weights": 1,
}

# Methods and formats do not know each other.
STRANGERS = [
    ("upcycle.targets", "upcycle.passes.experts"),
    ("upcycle.targets", "upcycle.passes.gates"),
    ("upcycle.passes.experts", "upcycle.targets"),
    ("upcycle.passes.gates", "upcycle.targets"),
]


def module_files() -> dict[str, Path]:
    """Every module of the product, by the name under which it is imported."""
    found = {}
    for folder in ("upcycle", "passes", "targets", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "upcycle" else ("upcycle", *parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


FILES = module_files()


def entry(module: str, table: dict[str, int] | None = None) -> str | None:
    """The entry of the table that `module` belongs to."""
    table = LAYERS if table is None else table
    name = module
    while name not in table:
        name = name.rpartition(".")[0]
    return None if name == "upcycle" and module != "upcycle" else name


def imports(source: str, modules: dict[str, Path]) -> set[str]:
    """The modules of upcycle that `source` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return {name for name in found if name.split(".")[0] == "upcycle"}


def complaint(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`, if so."""
    above, below = entry(importer), entry(imported)
    for name, where in ((importer, above), (imported, below)):
        if where is None:
            return f"{name} has no layer: add it to LAYERS in tests/test_layers.py"
    assert above is not None
    assert below is not None
    if LAYERS[below] > LAYERS[above]:
        return f"{importer} (layer {LAYERS[above]}) imports {imported} (layer {LAYERS[below]})"
    if (above, below) in STRANGERS:
        return f"{importer} imports {imported}: methods and formats do not know each other"
    return None


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_nothing_above_it(module: str) -> None:
    assert entry(module), f"{module} has no layer: add it to LAYERS in tests/test_layers.py"
    source = FILES[module].read_text("utf-8")
    complaints = [complaint(module, imported) for imported in sorted(imports(source, FILES))]
    assert not any(complaints), "\n".join(filter(None, complaints))


def test_every_layer_entry_exists() -> None:
    assert set(LAYERS) <= set(FILES)


@pytest.mark.parametrize(
    ("importer", "imported", "words"),
    [
        ("upcycle.passes.locate", "upcycle.cli", "imports upcycle.cli (layer 6)"),
        ("upcycle.targets.onnx.nodes", "upcycle.passes.gates.normal", "do not know each other"),
        ("upcycle.recipe", "upcycle.newcomer", "upcycle.newcomer has no layer"),
    ],
)
def test_a_wrong_import_is_seen(importer: str, imported: str, words: str) -> None:
    assert words in (complaint(importer, imported) or "")


def test_an_import_inside_a_function_is_seen() -> None:
    source = "def f():\n    from upcycle import cli\n    import upcycle.moe\n    import torch\n"
    assert imports(source, FILES) == {"upcycle.cli", "upcycle.moe"}
