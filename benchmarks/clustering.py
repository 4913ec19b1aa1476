"""Time and quality of balanced clustering on shapes of real FFNs: python benchmarks/clustering.py.

Two kinds of rows: independent normal ones, which is the hardest case (there is nothing to find),
and rows drawn around as many centres as there are groups, with unequal numbers of rows per centre.
Peak RSS is that of the process, so each line runs in its own.
"""

import multiprocessing
import resource
import time

import torch

from upcycle.passes.experts.balanced import balanced_clusters, objective

SHAPES = ((1536, 384, 64), (3072, 768, 16), (11008, 4096, 16), (11008, 4096, 64))


def rows(points: int, features: int, centres: int, *, mixed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(points, features, generator=generator)
    if mixed:
        odds = torch.arange(1.0, centres + 1)
        centre = torch.multinomial(odds, points, replacement=True, generator=generator)
        x += torch.randn(centres, features, generator=generator)[centre]
    return torch.nn.functional.normalize(x, dim=1)


def measure(points: int, features: int, groups: int, mixed: bool) -> None:
    x = rows(points, features, groups, mixed=mixed)
    sizes = [len(part) for part in torch.arange(points).tensor_split(groups)]
    start = time.perf_counter()
    labels = balanced_clusters(x, sizes, generator=torch.Generator().manual_seed(1))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    chance = labels[torch.randperm(points, generator=torch.Generator().manual_seed(2))]
    ratio = objective(x, labels) / objective(x, chance)
    kind = "mixed" if mixed else "normal"
    size = f"{points} x {features}"
    print(f"{size:>14} {groups:>6}  {kind:<6} {seconds:>8.2f} {ratio:>10.4f} {peak:>9.0f}")


def main() -> None:
    print(
        f"{'size':>14} {'groups':>6}  {'rows':<6} {'seconds':>8} {'vs random':>10} {'peak MiB':>9}"
    )
    spawn = multiprocessing.get_context("spawn")
    for shape in SHAPES:
        for mixed in (False, True):
            process = spawn.Process(target=measure, args=(*shape, mixed))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
