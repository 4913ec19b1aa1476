"""Files for other software, one format per module; imported as ``upcycle.targets``."""

if __name__ != "upcycle.targets":
    raise ImportError(
        "import upcycle.targets, not targets: run `pip install -e .` in the repository root"
    )
