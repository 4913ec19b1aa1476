"""Time of split experts relative to the dense FFN: python benchmarks/expert_kernels.py

SwiGLU in float32, a linear router included; the ways to run the experts take turns with the dense
FFN, so that other work on the machine slows all of them. Eight layers take turns, too, so that
weights come from memory as in a model (``--layers 1``: from the caches, where they fit). Median of
the ratios, and quartiles. ``ours`` is what a converted model runs, ``torch`` the same without a
C++ compiler; the others are implementations of transformers, in the same layer.
``--costs`` prints the table of `upcycle.kernels.torch_cpu` instead.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.nn import functional as F

from upcycle import kernels
from upcycle.kernels import torch_cpu as expert_kernels
from upcycle.kernels.activations import NAMED_POINTWISE
from upcycle.kernels.torch_cpu import ROWS
from upcycle.layers.config import LayerConfig
from upcycle.layers.moe import MoE

SHAPES = ((2048, 8192, 16, 4), (576, 1536, 16, 4), (576, 1536, 64, 8))
WAYS = {name: name for name in ("eager", "grouped_mm", "batched_mm")}
WAYS = {"ours": "upcycle", "torch": "upcycle", **WAYS}
COMPILED, NOTHING = (expert_kernels.run_compiled, kernels.run_routed), (None, None)
SWIGLU = NAMED_POINTWISE["swiglu"]


def split(
    d_model: int, d_ff: int, count: int, top_k: int, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor, str], torch.Tensor]]:
    """A dense FFN, and a layer of experts of its size, run in the way named."""
    up_FD = (torch.randn(2 * d_ff, d_model) / d_model**0.5).to(dtype)
    down_DF = (torch.randn(d_model, d_ff) / d_ff**0.5).to(dtype)
    router = {"kind": "linear", "num_experts": count, "d_model": d_model, "scale": 1.0}
    router |= {"select": {"rule": "top_k", "k": top_k}, "weights": "renormalised"}
    sizes = {"num_experts": count, "width": d_ff // count, "d_model": d_model, "d_out": d_model}
    plain = {"up_bias": False, "output_bias": False, "hidden_dropout": 0, "output_dropout": 0}
    config = {**sizes, **plain, "pointwise": SWIGLU.to_json(), "router": router}
    layer = MoE(LayerConfig.from_json(config))
    layer = layer.to(dtype).eval()
    for parameter in layer.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)

    def dense(x_TD: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = F.linear(x_TD, up_FD).chunk(2, -1)
        return F.linear(F.silu(gate_TF) * up_TF, down_DF)

    def sparse(x_TD: torch.Tensor, way: str) -> torch.Tensor:
        layer.experts.config._experts_implementation = WAYS[way]
        expert_kernels.run_compiled, kernels.run_routed = NOTHING if way == "torch" else COMPILED
        return layer(x_TD)

    return dense, sparse


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(
    shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, given: argparse.Namespace
) -> Iterator[tuple[str, list[float]]]:
    """For each way its first quartile, median and last quartile, relative to the dense FFN."""
    layers = [split(*shape, dtype) for _ in range(given.layers)]
    x_TD = torch.randn(tokens, shape[0]).to(dtype)
    ways = [way for way in given.ways if tokens == 1 or way != "batched_mm"]
    for (_, sparse), way in itertools.product(layers, ways):  # warm, and right
        torch.testing.assert_close(sparse(x_TD, way), sparse(x_TD, "eager"), rtol=0.02, atol=0.02)
    found: dict[str, list[float]] = {way: [] for way in ways}
    end = time.perf_counter() + given.seconds
    for (dense, sparse), step in zip(itertools.cycle(layers), itertools.count(), strict=False):
        if time.perf_counter() > end and step >= 16:
            break
        for way in ways:
            base = seconds(lambda dense=dense: dense(x_TD))
            found[way].append(seconds(lambda sparse=sparse, way=way: sparse(x_TD, way)) / base)
    for way, values in found.items():
        yield way, statistics.quantiles(values, n=4)


def costs(dtype: torch.dtype) -> None:
    """Nanoseconds for each weight and row: one expert for itself, and 16 side by side."""
    found: dict[str, list[float]] = {"ALONE": [], "BESIDE": []}
    vector: list[float] = []
    for rows in ROWS:
        per_weight: dict[str, list[float]] = {"ALONE": [], "BESIDE": []}
        for d_model, width in ((576, 96), (768, 192), (2048, 512)):
            up = torch.randn(16, 2 * width, d_model).to(dtype)
            down = torch.randn(16, d_model, width).to(dtype)
            x_NCD = torch.randn(16, rows, d_model).to(dtype)

            def alone(up=up, down=down, x_NCD=x_NCD) -> None:
                for e in range(16):
                    gate, value = F.linear(x_NCD[e], up[e]).chunk(2, -1)
                    F.linear(F.silu(gate) * value, down[e])

            def beside(up=up, down=down, x_NCD=x_NCD) -> None:
                gate, value = (x_NCD @ up.mT).chunk(2, -1)
                (F.silu(gate) * value) @ down.mT

            def one(up=up, down=down, x_D=x_NCD[0, 0]) -> None:
                for e in range(16):
                    gate, value = torch.mv(up[e], x_D).chunk(2, -1)
                    torch.mv(down[e], F.silu(gate) * value)

            turns = range(max(7, 300 // rows))
            times = [(seconds(alone) - 16 * CALL_SECONDS, seconds(beside)) for _ in turns]
            for name, spent in zip(per_weight, zip(*times, strict=True), strict=True):
                per_weight[name].append(min(spent) / (up.numel() + down.numel()) / rows * 1e9)
            if rows == 1:
                vector.append(min(seconds(one) - 16 * CALL_SECONDS for _ in turns))
                vector[-1] *= 1e9 / (up.numel() + down.numel())
        for name, figures in per_weight.items():
            found[name].append(statistics.median(figures))
    for name, figures in found.items():
        print(f"{name} = ({', '.join(f'{figure:.2g}' for figure in figures)})")
    print(f"ONE = {statistics.median(vector):.2g}")


CALL_SECONDS = 8e-6  # of the five operations of an expert on nothing


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each line")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--shape", type=int, choices=range(len(SHAPES)), help="one of them")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    if given.costs:
        costs(dtype)
        return
    print(
        f"{'d':>5} {'F':>5} {'E':>3} {'K':>2} {'T':>5}  " + "".join(f"{w:<18}" for w in given.ways)
    )
    for shape in SHAPES if given.shape is None else (SHAPES[given.shape],):
        d_model, d_ff, count, top_k = shape
        for tokens in given.tokens:
            cells = {
                way: f"{middle:.2f} ({low:.2f}-{high:.2f})"
                for way, (low, middle, high) in ratios(shape, tokens, dtype, given)
            }
            line = f"{d_model:>5} {d_ff:>5} {count:>3} {top_k:>2} {tokens:>5}  "
            print(line + "".join(f"{cells.get(way, ''):<18}" for way in given.ways), flush=True)


if __name__ == "__main__":
    main()
