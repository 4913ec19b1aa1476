"""Where the time of an unrolled MoE layer goes in ONNX Runtime, beside the dense FFN it splits.

    python benchmarks/onnx_profile.py [--size 2048 8192 16 4] [--form unrolled]

ONNX Runtime's own profile of one thread, the median over its runs of the time in products (Gemm)
and in all other operations, which it lists by name. A layer can be no faster than its products: at
one token they read the weights of the chosen experts, at many tokens those of all.
"""

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from onnx_forms import FORMS, SWIGLU, TOKENS, layer, session
from rich.console import Console
from rich.table import Table
from torch import nn

from upcycle.layers.experts import SharedExpert
from upcycle.recipe.onnx import Onnx

PRODUCTS = ("Gemm", "MatMul", "MoE", "QMoE")
RUNS = 20


def profile(model: nn.Module, d_model: int, options: Onnx, tokens: int) -> Counter[str]:
    """Milliseconds of each operation, medians over the runs; `model_run` is the whole of them."""
    with tempfile.TemporaryDirectory() as folder:
        runner = session(model, d_model, options, profile=f"{folder}/profile")
        feeds = {runner.get_inputs()[0].name: torch.randn(tokens, d_model).numpy()}
        for _ in range(RUNS):
            runner.run(None, feeds)
        events = json.loads(Path(runner.end_profiling()).read_text())
    runs: list[Counter[str]] = [Counter()]
    for event in sorted((e for e in events if "dur" in e), key=lambda e: int(e["ts"] + e["dur"])):
        if event["name"] == "model_run":
            runs[-1]["model_run"] = event["dur"]
            runs.append(Counter())
        elif event["name"].endswith("_kernel_time"):
            runs[-1][event["args"]["op_name"]] += event["dur"]
    found: defaultdict[str, list[int]] = defaultdict(list)
    for run in runs[1:-1]:  # the first run makes room for what the others use
        for name in runs[1]:
            found[name].append(run[name])
    return Counter({name: float(np.median(values)) / 1e3 for name, values in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=4, default=[2048, 8192, 16, 4])
    parser.add_argument("--form", choices=FORMS, default="unrolled")
    arguments = parser.parse_args()
    d_model, neurons, *_ = arguments.size
    torch.manual_seed(0)
    models = {
        "dense FFN": (SharedExpert(d_model, neurons, d_model, pointwise=SWIGLU, bias=False), None),
        arguments.form: (layer(SWIGLU, *arguments.size), FORMS[arguments.form]),
    }
    table = Table("tokens", "", "ms", "speed-up", "products", "speed-up", "the rest", "most of it")
    for tokens in TOKENS:
        base: tuple[float, float] | None = None
        for name, (model, options) in models.items():
            times = profile(model.eval(), d_model, options or Onnx(), tokens)
            whole = times.pop("model_run")
            products = sum(times.pop(each, 0.0) for each in PRODUCTS)
            base = base or (whole, products)
            rest = ", ".join(f"{op} {ms:.2f}" for op, ms in times.most_common(4))
            ratios = (f"{base[0] / whole:.2f}", f"{base[1] / products:.2f}")
            cells = (f"{whole:.2f}", ratios[0], f"{products:.2f}", ratios[1])
            table.add_row(str(tokens), name, *cells, f"{whole - products:.2f}", rest)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
