"""Time and quality of balanced clustering on shapes of real FFNs: python benchmarks/clustering.py.

    python benchmarks/clustering.py [--only keys,activations,peers]

Keys: two kinds of rows, independent normal ones, which is the hardest case (there is nothing to
find), and rows drawn around as many centres as there are groups, with unequal numbers of rows per
centre. FFNInputs: neurons of a gated FFN of normal weights, by the tokens of 2048 that they are
among the strongest for; the marks are timed apart. Peers: our clusters beside those of
k-means-constrained and of scikit-learn's KMeans, whose groups have any size, where these are
installed, on sizes that they finish. Peak RSS is that of the process, so each line runs in its own.
"""

import argparse
import importlib.util
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights
from upcycle.kernels.activations import NAMED_POINTWISE
from upcycle.passes.experts.activation_carve import carve
from upcycle.passes.experts.balanced import balanced_clusters
from upcycle.passes.experts.coactivation import bisected, counts, refined
from upcycle.passes.experts.markers import mark

SHAPES = ((1536, 384, 64), (3072, 768, 16), (11008, 4096, 16), (11008, 4096, 64))
SMALL = ((1536, 384, 16), (3072, 768, 16), (3072, 768, 64))
TOKENS, MARKERS = 2048, 10
SWIGLU = NAMED_POINTWISE["swiglu"]


def objective(features_FD: torch.Tensor, labels_F: torch.Tensor) -> float:
    """Sum of squared distances of the rows to the mean of their group, in float64."""
    total = 0.0
    for group in range(int(labels_F.max()) + 1):
        rows = features_FD[labels_F == group].double()
        total += float((rows - rows.mean(0)).square().sum()) if len(rows) else 0.0
    return total


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
    start, begun = time.perf_counter(), time.process_time()
    labels = balanced_clusters(x, sizes, generator=torch.Generator().manual_seed(1))
    seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    chance = labels[torch.randperm(points, generator=torch.Generator().manual_seed(2))]
    ratio = objective(x, labels) / objective(x, chance)
    kind = "mixed" if mixed else "normal"
    size = f"{points} x {features}"
    print(
        f"{size:>14} {groups:>6}  {kind:<6} {seconds:>8.2f} {cpu:>7.2f} {ratio:>10.4f} {peak:>9.0f}"
    )


def measure_activations(neurons: int, d_model: int, groups: int, method: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * d_model**-0.5

    up_MFD, down_OF = draw(2, neurons, d_model), draw(d_model, neurons)
    ffn = FFNWeights(SWIGLU, up_MFD, None, down_OF, None)
    data = FFNInputs((torch.randn(TOKENS, d_model, generator=generator),))
    sizes = [len(part) for part in torch.arange(neurons).tensor_split(groups)]
    start = time.perf_counter()
    markers = mark(ffn, data, MARKERS, unit=method == "activation_carve")
    marked, begun = time.perf_counter(), time.process_time()
    if method == "activation_carve":
        carve(markers, sizes)
    else:
        together_FF = counts(markers)
        refined(together_FF, bisected(together_FF, sizes, generator), sizes)
    seconds, cpu = time.perf_counter() - marked, time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size, marking = f"{neurons} x {d_model}", marked - start
    figures = f"{seconds:>8.2f} {cpu:>7.2f} {marking:>8.2f} {peak:>9.0f}"
    print(f"{size:>14} {groups:>6}  {method:<17} {figures}")


def measure_peer(points: int, features: int, groups: int, who: str) -> None:
    x = rows(points, features, groups, mixed=True)
    sizes = [len(part) for part in torch.arange(points).tensor_split(groups)]
    start, begun = time.perf_counter(), time.process_time()
    if who == "upcycle":
        labels = balanced_clusters(x, sizes, generator=torch.Generator().manual_seed(1))
    elif who == "k-means-constrained":
        from k_means_constrained import KMeansConstrained

        balanced = {"size_min": min(sizes), "size_max": max(sizes)}
        model = KMeansConstrained(groups, **balanced, n_init=1, random_state=1)
        labels = torch.from_numpy(model.fit_predict(x.double().numpy())).long()
    else:
        from sklearn.cluster import KMeans

        labels = torch.from_numpy(KMeans(groups, n_init=1, random_state=1).fit_predict(x)).long()
    seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    count = torch.bincount(labels, minlength=groups)
    size = f"{points} x {features}"
    found = f"{objective(x, labels):>10.1f} {int(count.min()):>7} to {int(count.max())}"
    print(f"{size:>14} {groups:>6}  {who:<19} {seconds:>8.2f} {cpu:>7.2f} {found}")


def alone(measured: Callable[..., None], *args: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=measured, args=args)
    process.start()
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="keys,activations,peers")
    only = parser.parse_args().only.split(",")
    if "keys" in only:
        print("          size groups  rows    seconds   CPU s  vs random  peak MiB")
        for shape in SHAPES:
            for mixed in (False, True):
                alone(measure, *shape, mixed)
    if "activations" in only:
        print("          size groups  method             seconds   CPU s    marks  peak MiB")
        for groups in (16, 64):
            for method in ("activation_carve", "coactivation"):
                alone(measure_activations, 11008, 4096, groups, method)
    if "peers" in only:
        print("          size groups  who                  seconds   CPU s  objective   sizes")
        for shape in SMALL:
            alone(measure_peer, *shape, "upcycle")
            for who, module in (
                ("k-means-constrained", "k_means_constrained"),
                ("sklearn KMeans", "sklearn"),
            ):
                if importlib.util.find_spec(module) is None:
                    print(f"{who}: not installed")
                else:
                    alone(measure_peer, *shape, who)


if __name__ == "__main__":
    main()
