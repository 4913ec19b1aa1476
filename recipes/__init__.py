"""The shipped recipes, as YAML files; imported as ``upcycle.recipes``."""

if __name__ != "upcycle.recipes":
    raise ImportError(
        "import upcycle.recipes, not recipes: run `pip install -e .` in the repository root"
    )
