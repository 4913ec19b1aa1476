"""The best rates of this machine, below whose floor no implementation goes."""

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

ROUNDS = 40  # many and short, so that other load leaves some of them alone
SIDE = 1024  # of the square matrices that are multiplied
MEGABYTES = 256  # of the matrix that is read once; larger than any cache


@dataclass(frozen=True)
class Machine:
    """The best rates measured.

    Attributes:
        flops: per second, in a product of large matrices; a multiply-add is two.
        bandwidth: bytes of a large matrix read per second, in a product with one vector.
        dtype, threads: of the measurement.
    """

    flops: float
    bandwidth: float
    dtype: str
    threads: int

    def floor(self, flops: float, weight_bytes: float) -> float:
        """The least seconds for `flops` operations on `weight_bytes` bytes of weights."""
        return max(flops / self.flops, weight_bytes / self.bandwidth)


@torch.no_grad()
def measure(dtype: torch.dtype) -> Machine:
    """Measure this machine with torch's current number of threads; takes a second or two."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    rows = MEGABYTES * 2**20 // (dtype.itemsize * SIDE)
    tall, x = torch.randn(rows, SIDE).to(dtype), torch.randn(1, SIDE).to(dtype)
    best = {"product": float("inf"), "read": float("inf")}
    for _ in range(ROUNDS):
        for name, left, right in (("product", a, b), ("read", x, tall)):
            start = time.perf_counter()
            F.linear(left, right)
            best[name] = min(best[name], time.perf_counter() - start)
    return Machine(
        flops=2 * SIDE**3 / best["product"],
        bandwidth=tall.numel() * dtype.itemsize / best["read"],
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
