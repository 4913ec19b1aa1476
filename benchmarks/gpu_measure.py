"""What `gpu.py` measures: the machine, the time of a call, and the error against float64.

Shape suffixes: T tokens, t some of them, D d_model, K chosen experts.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_experts import Sample, Shape
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

CHECKED = 64  # tokens that are compared


def exact(experts: MixtralExperts, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens in float64, and how far bfloat16 may be from that, [t, D] each.

    Each number that is stored in bfloat16 is off by u = eps / 2 of itself, independently: gate, up,
    activation, their product, the expert's output, the weighted output, the sum. With R the root of
    the sum of squares of what they move the output by, the error exceeds 6 u R with a probability
    below 3e-8. Sums of n products in float32 add n 2^-24 of the sum of magnitudes.
    """
    x_TD, index_TK, weights_TK = (t[:CHECKED] for t in sample)
    x_TD, weights_TK = x_TD.double(), weights_TK.double()
    y_TD, squares_TD, sums_TD = (torch.zeros_like(x_TD) for _ in range(3))
    for expert in range(experts.num_experts):
        token, slot = torch.where(index_TK == expert)
        up, down = experts.gate_up_proj[expert].double(), experts.down_proj[expert].double()
        x_tD, w_t1 = x_TD[token], weights_TK[token, slot, None]
        gate, z = (x_tD @ up.t()).chunk(2, -1)
        much_gate, much_z = (x_tD.abs() @ up.abs().t()).chunk(2, -1)
        sigmoid = gate.sigmoid()
        act, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
        h, y = act * z, act * z @ down.t()
        moved = (slope * z * gate).square() + 3 * h.square()  # gate; up, activation, product
        y_TD.index_add_(0, token, w_t1 * y)
        squares = moved @ down.square().t() + 3 * y.square()  # output, weight, weighted output
        squares_TD.index_add_(0, token, w_t1.square() * squares)
        much = (slope * z).abs() * much_gate + act.abs() * much_z + h.abs()
        sums_TD.index_add_(0, token, w_t1 * (much @ down.abs().t()))
    squares_TD += y_TD.square()
    terms = sum(experts.down_proj.shape[1:]) + index_TK.shape[1]
    u = torch.finfo(torch.bfloat16).eps / 2
    return y_TD, 6 * u * squares_TD.sqrt() + terms * 2.0**-24 * sums_TD


def clock(call: Callable[[], Any], seconds: float = 0.05) -> float:
    """Seconds of one call, by events of the GPU around as many as fit into `seconds`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats, passed = 1, 0.0
    while True:
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        passed = start.elapsed_time(end) / 1e3
        if passed >= seconds or repeats >= 1000:
            return passed / repeats
        repeats = min(1000, max(2 * repeats, int(1.2 * repeats * seconds / max(passed, 1e-6))))


def machine() -> dict[str, Any]:
    """The matrix rate in FLOP/s and the bandwidth in bytes/s that were measured here."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    rate = 2 * n**3 / min(clock(lambda: a @ b, 0.2) for _ in range(3))
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda").view(torch.float32).zero_()
    other = torch.empty_like(big)
    copied = 2 * big.nbytes / min(clock(lambda: other.copy_(big), 0.1) for _ in range(3))
    read = big.nbytes / min(clock(big.sum, 0.1) for _ in range(3))
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "flops": rate,
        "bandwidth": max(copied, read),
    }


def floor(shape: Shape, sets: list[Sample], here: dict[str, Any]) -> float:
    """The least seconds that the case can take, mean of its sets."""
    _, chosen, d_model, width = shape
    tokens = len(sets[0][0])
    products = 6 * tokens * chosen * d_model * width / here["flops"]
    visited = statistics.mean(len(index_TK.unique()) for _, index_TK, _ in sets)
    read = (visited * 3 * d_model * width + 2 * tokens * d_model) * 2 / here["bandwidth"]
    return max(products, read)
