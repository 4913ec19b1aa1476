"""Wall time and peak memory of whole conversions, each in a process of its own.

    python benchmarks/conversion.py [--quick]

Prints a table. The figures are of `upcycle convert`, imports, verification and writing included;
`--no-verify` rows show the conversion alone. `--quick` leaves out the runs on SmolLM2.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUNS = [
    ("sample:minilm", "emoe", ()),
    ("sample:minilm", "sparse-upcycling", ()),
    ("sample:minilm", "granular", ()),
    ("sample:minilm", "sparse-upcycling", ("--target", "safetensors", "--no-verify")),
    ("sample:smollm2", "sparse-upcycling", ("--set", "experts.count=4")),
    ("sample:smollm2", "granular", ()),
    (
        "sample:smollm2",
        "sparse-upcycling",
        ("--set", "experts.count=4", "--target", "safetensors", "--no-verify"),
    ),
]


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MiB of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, cpu, usage.ru_maxrss / 1024


def size(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    table = Table("model", "recipe", "options", "wall s", "CPU s", "peak MiB", "written MB")
    upcycle = Path(sys.executable).with_name("upcycle")
    work = Path(tempfile.mkdtemp())
    try:
        for model, recipe, options in RUNS:
            if quick and "smollm2" in model:
                continue
            out = work / "out"
            command = [str(upcycle), "convert", model, "--recipe", recipe, "--out", str(out)]
            wall, cpu, peak = measure([*command, *options, "--overwrite"])
            figures = (f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}", f"{size(out):.0f}")
            table.add_row(model, recipe, " ".join(options), *figures)
            print(model, recipe, *options, *figures, file=sys.stderr)
    finally:
        shutil.rmtree(work)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
