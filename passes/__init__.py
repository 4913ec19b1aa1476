"""What is done to the graph, one step per file; imported as ``upcycle.passes``."""

if __name__ != "upcycle.passes":
    raise ImportError(
        "import upcycle.passes, not passes: run `pip install -e .` in the repository root"
    )
