"""Neurons that are active together share an expert."""

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from upcycle.passes.experts.balanced import assign
from upcycle.passes.experts.markers import Markers, mark
from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import deal, group_sizes, split

EDGES = 16  # of each neuron in the graph that is bisected, those of the largest counts
STEPS = 20  # of the refinement at most

Ints = npt.NDArray[np.int64]


def coactivation(dense: DenseLayer) -> torch.Tensor:
    """Cut the graph of neurons that are active together into groups of nearly equal size.

    In each token the ``experts.markers`` neurons of largest ``|h|`` are active, and none whose h is
    zero; so with as many markers as neurons a ReLU counts as in the paper. The weight of an edge is
    the number of tokens in which both ends are active. The strongest edges of each neuron are cut
    by repeated Kernighan-Lin bisection (the paper takes METIS, and then moves neurons at random
    until the sizes are right); then all neurons at once go where they are active together with the
    most others, subject to the sizes, as long as that gains anything.

    Exact when every expert is chosen with weight one.
    Memory: F * T / 8 bytes of marks, and 12 bytes for each pair that is ever active together: with
    K markers at most ``T K^2`` pairs, and ``F^2``.

    Source:
        Zhang et al., "MoEfication", 2021, section 3.1, https://arxiv.org/abs/2110.01786
        Kernighan and Lin, 1970, https://doi.org/10.1002/j.1538-7305.1970.tb01770.x
    """
    spec = dense.spec
    together_FF = counts(mark(dense.ffn, dense.data, spec.experts.markers, unit=False))
    sizes = group_sizes(together_FF.shape[0], spec.num_experts)
    labels_F = refined(together_FF, bisected(together_FF, sizes, dense.generator), sizes)
    return deal(torch.from_numpy(labels_F).argsort(stable=True), spec.num_experts, spec.width)


def counts(markers: Markers) -> sparse.csr_array:
    """In how many tokens two neurons are both marked, [F, F]; zero on the diagonal."""
    bits_FT = sparse.hstack([sparse.csr_array(bits_Ft.numpy()) for bits_Ft in markers.chunks()])
    together_FF = sparse.csr_array(bits_FT @ bits_FT.T)
    together_FF.setdiag(0)
    together_FF.eliminate_zeros()
    return together_FF


def bisected(together_FF: sparse.csr_array, sizes: list[int], generator: torch.Generator) -> Ints:
    """The group of each node, by bisecting the graph of the strongest edges again and again."""
    import networkx as nx  # other methods do without

    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(together_FF.shape[0]))
    for node in graph:
        row = slice(together_FF.indptr[node], together_FF.indptr[node + 1])
        strongest = np.argsort(-together_FF.data[row], kind="stable")[:EDGES]
        others, weights = together_FF.indices[row][strongest], together_FF.data[row][strongest]
        graph.add_weighted_edges_from(
            (node, other, weight)
            for other, weight in zip(others.tolist(), weights.tolist(), strict=True)
        )
    labels_F = np.zeros(len(graph), dtype=np.int64)
    pieces = [(list(graph), 0, len(sizes))]
    while pieces:
        nodes, first, last = pieces.pop()
        if last - first == 1:
            labels_F[nodes] = first
            continue
        middle = (first + last) // 2
        order = torch.randperm(len(nodes), generator=generator).tolist()
        size = sum(sizes[first:middle])
        halves = {nodes[i] for i in order[:size]}, {nodes[i] for i in order[size:]}
        # It moves one node of each half at a time, so the sizes stay.
        left, right = nx.community.kernighan_lin_bisection(graph.subgraph(nodes), halves)
        if len(left) != size:
            left, right = right, left
        pieces += [(sorted(left), first, middle), (sorted(right), middle, last)]
    return labels_F


def refined(together_FF: sparse.csr_array, labels_F: Ints, sizes: list[int]) -> Ints:
    """Reassign all neurons, exactly, to the groups they are most together with, while it gains."""
    sizes_K, prices_K = np.asarray(sizes), np.zeros(len(sizes))
    every, best = np.arange(len(labels_F)), within(together_FF, labels_F)
    for _ in range(STEPS):
        member_FK = np.zeros((len(labels_F), len(sizes)))
        member_FK[every, labels_F] = 1
        cost_KF = np.ascontiguousarray(-(together_FF @ member_FK).T)
        new_F, prices_K = assign(cost_KF, sizes_K, prices_K)
        gained = within(together_FF, new_F)
        if gained <= best:
            break
        labels_F, best = new_F, gained
    return labels_F


def within(together_FF: sparse.csr_array, labels_F: Ints) -> float:
    """The part of all joint activity that is of neurons of one group; zero if there is none."""
    pairs = together_FF.tocoo()
    total = float(pairs.data.sum())
    return float(pairs.data[labels_F[pairs.row] == labels_F[pairs.col]].sum()) / (total or 1.0)


COACTIVATION = ExpertMethod(
    name="coactivation", kind="split", build=split(coactivation), needs="activations"
)
