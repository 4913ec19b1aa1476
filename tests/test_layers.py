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
    "upcycle.cli.main": 6,
    "upcycle.cli.commands": 6,
    "upcycle.cli.group": 6,
    # 5: the driver
    "upcycle.bench": 5,
    "upcycle.data.calibration": 5,
    "upcycle.data.calibration_files": 5,
    "upcycle.data.images": 5,
    "upcycle.passes.calibrate.usage": 5,
    "upcycle.data.text_domains": 5,
    "upcycle.cli.recipe_facts": 5,
    "upcycle.conversion.streamed_calibration": 5,
    "upcycle.targets.card": 5,
    "upcycle.conversion.in_memory": 5,
    "upcycle.verification.in_memory": 5,
    "upcycle.passes.plan.costs": 5,
    "upcycle.conversion.workers": 5,
    "upcycle.conversion.named_models": 5,
    "upcycle.cli.preview": 5,
    "upcycle.conversion.streamed": 5,
    "upcycle.verification.checks": 5,
    "upcycle.verification.layers": 5,
    "upcycle.conversion.emit": 5,
    "upcycle.data.evaluation": 5,
    "upcycle.data.text": 5,
    "upcycle.targets.load": 5,
    "upcycle.data.onnx_calibration": 5,
    "upcycle.verification.near_ties": 5,
    "upcycle.verification.onnx.choices": 5,
    "upcycle.conversion.onnx_file": 5,
    "upcycle.verification.onnx.files": 5,
    "upcycle.verification.onnx.precision": 5,
    "upcycle.conversion.onnx_rewrite": 5,
    "upcycle.verification.onnx.rounding": 5,
    "upcycle.models.onnx_file": 5,
    "upcycle.verification.onnx.layers": 5,
    "upcycle.cli.tables_of_reports": 5,
    "upcycle.cli.inspection": 5,
    "upcycle.cli.tables_of_inspection": 5,
    "upcycle.cli.difference": 5,
    "upcycle.targets.provenance_file": 5,
    "upcycle.cli.tables": 2,
    "upcycle.models.dense": 5,
    "upcycle.models.expert_sources": 5,
    "upcycle.models.module_tensors": 5,
    "upcycle.verification.whole_model": 5,
    "upcycle.conversion.objectives": 5,
    "upcycle.conversion.survey": 5,
    # 4: the steps
    "upcycle.passes": 4,
    # 3: one method, one format
    "upcycle.passes.experts": 3,
    "upcycle.passes.transform.least_squares": 3,
    "upcycle.passes.routers": 3,
    "upcycle.targets": 3,
    # 2: what the steps work on
    "upcycle.capture.capture": 2,
    "upcycle.cli.console": 2,
    "upcycle.verification.distinct_experts": 2,
    "upcycle.capture.guess_inputs": 2,
    "upcycle.capture.input_shapes": 2,
    "upcycle.capture.known_values": 2,
    "upcycle.capture.transformers_inputs": 2,
    "upcycle.capture.function_caches": 2,
    "upcycle.verification.metrics": 2,
    "upcycle.recipe.onnx": 2,
    "upcycle.recipe.section": 2,
    "upcycle.recipe.yaml_places": 2,
    "upcycle.verification.traced_rows": 2,
    "upcycle.recipe.schema": 2,
    "upcycle.recipe.reader": 2,
    "upcycle.recipes": 2,
    "upcycle.capture.recorder": 2,
    "upcycle.models.sample_store": 2,
    "upcycle.models.samples": 2,
    "upcycle.recipe.shipped": 2,
    "upcycle.ir.spec": 2,
    "upcycle.capture.repeated_blocks": 2,
    # 1: data, and the layer that a converted model contains
    "upcycle.kernels.activation_names": 1,
    "upcycle.ir.ffn_inputs": 1,
    "upcycle.util.cache_folder": 1,
    "upcycle.kernels.compiled": 1,
    "upcycle.layers.token_context": 1,
    "upcycle.errors": 1,
    "upcycle.util.memory": 1,
    "upcycle.kernels.torch_cpu": 1,
    "upcycle.layers.experts": 1,
    "upcycle.ir.ffn": 1,
    "upcycle.ir.layer_weights": 1,
    "upcycle.ir.partial_projection": 1,
    "upcycle.kernels": 1,
    "upcycle.util.eval_mode": 1,
    "upcycle.util.named_callable": 1,
    "upcycle.layers.moe": 1,
    "upcycle.auto_classes": 4,
    "upcycle.kernels.torch_operation": 1,
    "upcycle.util.json_text": 1,
    "upcycle.pointwise": 1,
    "upcycle.layers.pretrained": 1,
    "upcycle.util.progress": 1,
    "upcycle.util.quiet_transformers": 1,
    "upcycle.layers.routers": 1,
    "upcycle.layers.router": 1,
    "upcycle.layers.selection": 1,
    "upcycle.layers.tap": 1,
    "upcycle.kernels.triton": 1,
    "upcycle.kernels.triton.launch": 1,
    "upcycle.kernels.triton.operation": 1,
    "upcycle.kernels.triton.source": 1,
    "upcycle.version": 1,
    "upcycle.ir.weights": 1,
}

# Methods and formats do not know each other.
STRANGERS = [
    ("upcycle.targets", "upcycle.passes.experts"),
    ("upcycle.targets", "upcycle.passes.routers"),
    ("upcycle.passes.experts", "upcycle.targets"),
    ("upcycle.passes.routers", "upcycle.targets"),
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
        ("upcycle.passes.locate.locate", "upcycle.cli.main", "imports upcycle.cli.main (layer 6)"),
        ("upcycle.onnx.nodes", "upcycle.passes.routers.normal", "do not know each other"),
        ("upcycle.recipe.schema", "upcycle.newcomer", "upcycle.newcomer has no layer"),
    ],
)
def test_a_wrong_import_is_seen(importer: str, imported: str, words: str) -> None:
    assert words in (complaint(importer, imported) or "")


def test_an_import_inside_a_function_is_seen() -> None:
    source = (
        "def f():\n    from upcycle import cli\n    import upcycle.layers.moe\n    import torch\n"
    )
    assert imports(source, FILES) == {"upcycle.cli.main", "upcycle.layers.moe"}
