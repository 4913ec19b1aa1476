"""What it costs to load an ONNX file: weights inside it against weights in the safetensors file.

    python benchmarks/onnx_load.py [--model sample:smollm2]

Converts the model into a directory of its own (``sparse-upcycling`` with two experts, so that the
file is larger than the dense one), writes the same graph once more with all weights inside, and
prints the sizes, the time to make a session of ONNX Runtime, and the memory that this and the
first run take. Each figure is the median of three processes that do nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from upcycle.cli.commands.convert import convert

_KINDS = {"in the safetensors file": "model.onnx", "inside the file": "inline.onnx"}


def memory(what: str) -> float:
    """MB of this process: ``VmHWM`` (peak) or ``RssAnon`` (its own, which no file backs)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1e3


def load(path: Path) -> dict[str, float]:
    """What one process sees that loads `path` and runs it once."""
    import numpy as np
    import onnxruntime

    before = memory("VmHWM")
    start = time.perf_counter()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    loaded = {"load s": seconds, "peak MB": memory("VmHWM") - before, "own MB": memory("RssAnon")}
    feeds = {}
    for value in session.get_inputs():
        sizes = [
            size if isinstance(size, int) else 0 if "past" in size else 8 for size in value.shape
        ]
        if value.name.startswith("past"):
            sizes = [size if isinstance(size, int) else 0 for size in value.shape]
            sizes[0] = 8
        dtype = np.int64 if "int64" in value.type else np.float32
        feeds[value.name] = np.ones(
            [8 if s == 0 and "mask" in value.name else s for s in sizes], dtype
        )
    start = time.perf_counter()
    session.run(None, feeds)
    loaded["first run s"] = time.perf_counter() - start
    return loaded | {"peak MB, run": memory("VmHWM") - before}


def write_inline(directory: Path) -> None:
    """The same graph with its weights in the file."""
    model = onnx.load(directory / "model.onnx")
    for tensor in model.graph.initializer:
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    onnx.save(model, directory / "inline.onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [arguments.model, "--recipe", "sparse-upcycling", "--set", "experts.count=2"]
        command += ["--set", "onnx.form=fused", "--out", str(out), "--no-verify"]
        convert.main(command, standalone_mode=False)
        write_inline(out)
        stored = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e6
        rows = {}
        for kind, name in _KINDS.items():
            found = []
            for _ in range(4):  # the first one fills the cache of the disk
                process = [sys.executable, __file__, "--load", str(out / name)]
                output = subprocess.run(process, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(output.splitlines()[-1]))
            rows[kind] = {key: statistics.median(f[key] for f in found[1:]) for key in found[0]}
        table = Table("weights", ".onnx MB", "both files MB", *next(iter(rows.values())))
        for kind, name in _KINDS.items():
            size = (out / name).stat().st_size / 1e6
            both = size + stored  # PyTorch needs the checkpoint in both cases
            figures = [
                f"{value:.2f}" if " s" in key else f"{value:.0f}"
                for key, value in rows[kind].items()
            ]
            table.add_row(kind, f"{size:.1f}", f"{both:.1f}", *figures)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
