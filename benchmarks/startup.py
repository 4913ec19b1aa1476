"""What users wait for before anything happens: python benchmarks/startup.py [--rounds 5].

Each figure is of a process of its own, and the median over the rounds; its first round, which may
read files from the disk, is left out. The first line of progress says that the model is captured.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

UPCYCLE = str(Path(sys.executable).with_name("upcycle"))
# As installed packages are: compiled once.
ENVIRONMENT = {name: value for name, value in os.environ.items() if "BYTECODE" not in name}


def whole(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def conversion(out: Path) -> dict[str, float]:
    """Seconds until the first line of progress, those of capture by its own account, and all."""
    command = [UPCYCLE, "convert", "sample:minilm", "--recipe", "emoe", "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    begun = time.perf_counter() - start
    said = first + process.stderr.read()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    captured = re.search(r"capturing: 1 of 1, ([0-9.]+) s", said)
    assert captured is not None, said
    return {
        "first line of progress": begun,
        "capture": float(captured[1]),
        "whole conversion": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    figures: dict[str, list[float]] = {}
    work = Path(tempfile.mkdtemp())
    try:
        for i in range(rounds + 1):
            found = {
                "upcycle --help": whole([UPCYCLE, "--help"]),
                "import upcycle": whole([sys.executable, "-c", "import upcycle"]),
                "import torch": whole([sys.executable, "-c", "import torch"]),
                "import AutoModel of transformers": whole(
                    [sys.executable, "-c", "import transformers.modeling_utils"]
                ),
            }
            found |= conversion(work / f"out{i}")
            for name, seconds in found.items():
                figures.setdefault(name, []).append(seconds)
    finally:
        shutil.rmtree(work)
    table = Table("what", "seconds", "fastest to slowest")
    for name, (_, *seconds) in figures.items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        table.add_row(name, f"{statistics.median(seconds):.2f}", spread)
    Console().print(table)


if __name__ == "__main__":
    main()
