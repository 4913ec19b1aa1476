"""How fast each form of an MoE layer is in ONNX Runtime on a CPU, and the figures that follow.

    python benchmarks/onnx_forms.py [--quick] [--size 2048 8192 16 4] [--warm]

Every form of a layer is timed on 1, 16, 256 and 1024 tokens: the CPU time of the one thread that
runs it, which other work on the machine does not lengthen by much; the lower quartile of several
runs, in turns with the dense FFN of all neurons, each with its weights out of the caches. Then, for
each form, the nanoseconds of a call, an expert, a weight that is read or arranged, a product, a
token that is carried and an activation are fitted (not negative, relative errors), as
`upcycle.targets.onnx.forms.cost_model` has them. It takes some six minutes.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from torch import nn

from upcycle.kernels.activations import NAMED_POINTWISE
from upcycle.layers.config import LayerConfig
from upcycle.layers.experts import SharedExpert
from upcycle.layers.moe import MoE
from upcycle.pointwise import Pointwise
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.onnx.forms.cost_model import Work

GELU, SWIGLU = NAMED_POINTWISE["gelu_tanh"], NAMED_POINTWISE["swiglu"]
FORMS = {
    "fused": Onnx(form="fused"),
    "unrolled": Onnx(form="unrolled"),
    "dense": Onnx(form="dense"),
    "int8": Onnx(form="quantised", quantise=8, block="row"),
    "int8 blocks": Onnx(form="quantised", quantise=8, block=32),
    "int4": Onnx(form="quantised", quantise=4, block="row"),
    "int4 blocks": Onnx(form="quantised", quantise=4, block=32),
}
EXACT = ("fused", "unrolled", "dense")
# d_model, all neurons, experts, experts of a token
SIZES = [(384, 1536, 4, 1), (384, 1536, 16, 4), (384, 1536, 64, 8), (1024, 4096, 16, 4)]
SIZES += [(2048, 8192, 16, 4), (576, 1536, 16, 8), (576, 1536, 64, 32)]
TOKENS = (1, 16, 256, 1024)
FFN = "the dense FFN"
OTHERS = np.ones(1 << 24, np.float32)  # read in between, as a model reads its other layers' weights


def layer(pointwise: Pointwise, d_model: int, neurons: int, count: int, k: int) -> MoE:
    """Distinct random experts that together have `neurons` neurons."""
    router = {"kind": "linear", "num_experts": count, "d_model": d_model, "scale": 1.0}
    router |= {"select": {"rule": "top_k", "k": k}, "weights": "renormalised"}
    config = {
        "num_experts": count,
        "width": neurons // count,
        "d_model": d_model,
        "d_out": d_model,
        "pointwise": pointwise.to_json(),
        "up_bias": False,
        "output_bias": False,
        "router": router,
        "hidden_dropout": 0.0,
        "output_dropout": 0.0,
    }
    made = MoE(LayerConfig.from_json(config))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return made.eval()


def session(
    model: nn.Module, d_model: int, options: Onnx, *, profile: str = ""
) -> onnxruntime.InferenceSession:
    """One thread, and ONNX Runtime's own way with weights; `profile`: how its profile is named."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        export_onnx(model, (torch.randn(3, d_model),), path=path, stored={}, options=options)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        settings.enable_profiling = bool(profile)
        settings.profile_file_prefix = profile
        return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def timed(
    sessions: dict[str, onnxruntime.InferenceSession], x: torch.Tensor, *, warm: bool
) -> dict[str, float]:
    """Seconds of CPU time of one call of each, the lower quartile."""
    feeds = {"x": x.numpy()}
    for each in sessions.values():
        each.run(None, {each.get_inputs()[0].name: feeds["x"]})
    runs: dict[str, list[float]] = {name: [] for name in sessions}
    budget = time.thread_time() + 0.35 * len(sessions)
    while time.thread_time() < budget or len(runs[FFN]) < 3:
        for name, each in sessions.items():
            given = {each.get_inputs()[0].name: feeds["x"]}
            if not warm:
                OTHERS.sum()
            start = time.thread_time()
            each.run(None, given)
            runs[name].append(time.thread_time() - start)
    return {name: float(np.quantile(found, 0.25)) for name, found in runs.items()}


def fit(kind: str, rows: list[tuple[Work, float]]) -> list[float]:
    """Nanoseconds for each feature, none below zero, with the smallest relative errors."""
    features = np.array([work.features(kind) for work, _ in rows])
    times = np.array([1e9 * seconds for _, seconds in rows])
    scale = features.max(axis=0)
    found, _ = nnls(features / scale / times[:, None], np.ones(len(rows)))
    return [float(value) for value in found / scale]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small layer, to try the script")
    parser.add_argument("--size", type=int, nargs=4, help="d_model, neurons, experts, of a token")
    parser.add_argument("--warm", action="store_true", help="leave the caches to the layers")
    arguments = parser.parse_args()
    sizes, tokens = (SIZES[1:2], TOKENS[:2]) if arguments.quick else (SIZES, TOKENS)
    sizes = [tuple(arguments.size)] if arguments.size else sizes
    torch.manual_seed(0)
    table = Table("activation", "d_model", "neurons", "experts", "tokens", "FFN ms", *FORMS)
    measured: dict[str, list[tuple[Work, float]]] = {name: [] for name in FORMS}
    for pointwise, size in itertools.product((GELU, SWIGLU), sizes):
        d_model, neurons, count, k = size
        model = layer(pointwise, *size)
        dense = SharedExpert(d_model, neurons, d_model, pointwise=pointwise, bias=False).eval()
        sessions = {FFN: session(dense, d_model, Onnx())}
        sessions |= {name: session(model, d_model, options) for name, options in FORMS.items()}
        for number in tokens:
            seconds = timed(sessions, torch.randn(number, d_model), warm=arguments.warm)
            work = Work(
                tokens=number,
                num_experts=count,
                top_k=k,
                d_model=d_model,
                width=neurons // count,
                arity=pointwise.arity,
                gelu=pointwise is GELU,
            )
            for name in FORMS:
                measured[name].append((work, seconds[name]))
            ratios = (f"{seconds[FFN] / seconds[name]:.2f}" for name in FORMS)
            facts = (pointwise.name, *map(str, (d_model, neurons, f"{k} of {count}", number)))
            table.add_row(*facts, f"{1e3 * seconds[FFN]:.2f}", *ratios)
    console = Console(width=130)
    console.print(table, "speed over the dense FFN of all neurons; one thread")
    figures = {name: fit(name, rows) for name, rows in measured.items()}
    for name, values in figures.items():
        errors = [
            abs(np.dot(values, work.features(name)) / (1e9 * seconds) - 1)
            for work, seconds in measured[name]
        ]
        shown = ", ".join(f"{value:.3g}" for value in values)
        console.print(f'    "{name}": ({shown}),  # off by {np.median(errors):.0%} in the median')
    console.print_json(json.dumps(sorted(_agreement(measured, figures).items())))


def _agreement(
    measured: dict[str, list[tuple[Work, float]]], figures: dict[str, list[float]]
) -> dict[str, float]:
    """How often the figures name the fastest exact form, and what being wrong costs."""
    lost = []
    for rows in zip(*(measured[form] for form in EXACT), strict=True):
        times = [seconds for _, seconds in rows]
        guess = [
            np.dot(figures[form], work.features(form))
            for form, (work, _) in zip(EXACT, rows, strict=True)
        ]
        lost.append(times[int(np.argmin(guess))] / min(times) - 1)
    right = sum(each == 0 for each in lost)
    return {"right": right / len(lost), "lost_mean": float(np.mean(lost)), "lost_max": max(lost)}


if __name__ == "__main__":
    main()
