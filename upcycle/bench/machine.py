"""What this machine can do at best: the floor that no implementation goes below."""

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Many short rounds: on a machine that does other things, too, some of them are not disturbed.
ROUNDS = 40
SIDE = 1024  # of the square matrices that are multiplied
MEGABYTES = 256  # of the matrix that is read once; more than any cache


@dataclass(frozen=True)
class Machine:
    """The best rates seen.

    Attributes:
        flops: multiplications and additions in a second, in a product of large matrices.
        bandwidth: bytes of a large matrix read in a second, in a product with one vector.
        dtype, threads: that it was measured with.
    """

    flops: float
    bandwidth: float
    dtype: str
    threads: int

    def floor(self, flops: float, weight_bytes: float) -> float:
        """Seconds that so many operations on so many bytes of weights take at least."""
        return max(flops / self.flops, weight_bytes / self.bandwidth)


@torch.no_grad()
def measure(dtype: torch.dtype = torch.float32) -> Machine:
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
    name = str(dtype).removeprefix("torch.")
    return Machine(
        flops=2 * SIDE**3 / best["product"],
        bandwidth=tall.numel() * dtype.itemsize / best["read"],
        dtype=name,
        threads=torch.get_num_threads(),
    )
