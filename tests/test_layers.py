"""Imports point down: a module may import its own layer and the ones below it, nothing above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom to the top: folders, and the modules beside them. What stands in a row may be
# imported by all that comes after it.
ORDER = [
    *("errors", "version", "util", "pointwise", "kernels", "compiled", "layers"),
    *(
        "recipes",
        "recipe",
        "ir",
        "capture",
        "graphs",
        "onnx",
        "passes",
        "models",
        "routing",
        "data",
        "targets",
    ),
    *("auto_classes", "verification", "drawing", "page", "conversion", "operations"),
    *("bench", "cli", "upcycle"),
    "__main__",
]

# Beside the order, which forbids the other direction: targets know no method, passes no format.
STRANGERS = {("targets", "passes")}


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


def home(module: str) -> str:
    """The entry of ORDER that `module` belongs to: its folder, or itself."""
    return module.split(".")[1] if "." in module else module


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
    above, below = home(importer), home(imported)
    for module, name in ((importer, above), (imported, below)):
        if name not in ORDER:
            return f"{module} has no place: add {name} to ORDER in tests/test_layers.py"
    if ORDER.index(below) > ORDER.index(above):
        return f"{importer} imports {imported}, and {below} stands above {above}"
    if (above, below) in STRANGERS:
        return f"{importer} imports {imported}: passes know no format, and targets no method"
    return None


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_nothing_above_it(module: str) -> None:
    source = FILES[module].read_text("utf-8")
    complaints = [complaint(module, imported) for imported in sorted(imports(source, FILES))]
    assert home(module) in ORDER
    assert not any(complaints), "\n".join(filter(None, complaints))


def test_every_entry_exists_once() -> None:
    assert sorted(ORDER) == sorted({home(module) for module in FILES})


@pytest.mark.parametrize(
    ("importer", "imported", "words"),
    [
        ("upcycle.passes.locate.locate", "upcycle.cli.main", "cli stands above passes"),
        ("upcycle.layers.moe", "upcycle", "upcycle stands above layers"),
        ("upcycle.passes.rewrite", "upcycle.targets.load", "targets stands above passes"),
        ("upcycle.targets.onnx.export", "upcycle.passes.routers.normal", "targets no method"),
        ("upcycle.recipe.schema", "upcycle.newcomer", "add newcomer to ORDER"),
    ],
)
def test_a_wrong_import_is_seen(importer: str, imported: str, words: str) -> None:
    assert words in (complaint(importer, imported) or "")


def test_an_import_inside_a_function_is_seen() -> None:
    source = (
        "def f():\n    from upcycle import cli\n    import upcycle.pointwise\n    import torch\n"
    )
    assert imports(source, FILES) == {"upcycle.cli", "upcycle.pointwise"}
