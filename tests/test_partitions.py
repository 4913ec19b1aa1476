"""Splits deal out each neuron once, to groups of nearly equal size."""

import dataclasses
import re

import numerics
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.ir.ffn import Located
from upcycle.ir.weights import ExpertWeights, FFNWeights
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.cluster import features_of
from upcycle.passes.experts.split import deal, group_sizes
from upcycle.passes.plan.plan import make_plan, needs
from upcycle.passes.transform.transform import transform

SPLITS = [name for name, method in EXPERTS.items() if method.kind == "split"]


def experts_of(
    ffn: FFNWeights, method: str, count: int, seed: int, **more: object
) -> ExpertWeights:
    recipe = numerics.make_recipe(
        {"method": method, "count": count, **more},
        {"method": "normal", "top_k": 1, "weights": "one"},
        seed=seed,
    )
    (spec,) = make_plan(Located(ffns=(numerics.site(ffn),)), recipe).specs
    generator = torch.Generator().manual_seed(seed)
    importance_EF = torch.rand(spec.num_experts, ffn.up_MFD.shape[1], generator=generator)
    data = dataclasses.replace(numerics.seen(ffn, count=64), importance_NF=importance_EF)
    return transform(ffn, spec, data if needs(recipe) else None).experts


sizes = st.integers(1, 40).flatmap(lambda d_ff: st.tuples(st.just(d_ff), st.integers(1, d_ff)))


@settings(deadline=None, max_examples=40)
@given(shape=sizes, seed=st.integers(0, 2**40), name=st.sampled_from(["gelu", "swiglu"]))
@pytest.mark.parametrize("method", SPLITS)
def test_a_split_is_a_partition(method: str, shape: tuple[int, int], seed: int, name: str) -> None:
    d_ff, count = shape
    ffn = numerics.random_ffn(name, d_model=5, d_ff=d_ff, d_out=3, seed=seed % 1000)
    experts = experts_of(ffn, method, count, seed)
    neuron_EI = experts.neuron_EI
    assert neuron_EI.shape == (count, -(-d_ff // count))
    assert neuron_EI[neuron_EI >= 0].sort().values.tolist() == list(range(d_ff))
    filled_E = (neuron_EI >= 0).sum(1)
    assert int(filled_E.max() - filled_E.min()) <= 1
    # Padding comes last, and is neurons of zeros.
    for e in range(count):
        assert (neuron_EI[e, : filled_E[e]] >= 0).all()
    up_EMID = experts.up_EGD.reshape(count, ffn.pointwise.arity, neuron_EI.shape[1], -1)
    assert (up_EMID.transpose(1, 2)[neuron_EI < 0] == 0).all()
    assert (experts.down_EOI.transpose(1, 2)[neuron_EI < 0] == 0).all()
    again = experts_of(ffn, method, count, seed)
    assert torch.equal(neuron_EI, again.neuron_EI)


@pytest.mark.parametrize("method", ["random", "cluster"])
def test_two_seeds_give_two_partitions(method: str) -> None:
    ffn = numerics.random_ffn("gelu")
    one, other = (experts_of(ffn, method, 6, seed).neuron_EI for seed in (0, 1))
    assert not torch.equal(one, other)


def test_group_sizes_differ_by_at_most_one() -> None:
    assert group_sizes(10, 4) == [3, 3, 2, 2]
    assert group_sizes(8, 4) == [2, 2, 2, 2]
    assert deal(torch.tensor([4, 2, 0, 1, 3]), 2, 3).tolist() == [[0, 2, 4], [1, 3, -1]]


def test_granular_slices_are_the_same_in_each_copy() -> None:
    ffn = numerics.random_ffn("swiglu", d_ff=12)
    recipe = numerics.make_recipe(
        {"method": "granular", "count": 2, "granularity": 3},
        {"method": "virtual_group", "top_k": 3, "weights": "renormalised"},
    )
    _, weights, _ = numerics.convert(ffn, recipe)
    neuron_EI = weights.experts.neuron_EI
    assert neuron_EI.tolist() == [[4 * g + i for i in range(4)] for _ in range(2) for g in range(3)]
    assert torch.equal(weights.experts.up_EGD[:3], weights.experts.up_EGD[3:])
    assert torch.equal(weights.experts.up_EGD[1, :4], ffn.up_MFD[0, 4:8])
    assert torch.equal(weights.experts.up_EGD[1, 4:], ffn.up_MFD[1, 4:8])


@pytest.mark.parametrize("which", ["gate", "up", "both"])
def test_features_are_rows_of_length_one(which: str) -> None:
    gated, plain = numerics.random_ffn("swiglu"), numerics.random_ffn("gelu")
    norms = features_of(gated, which).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
    assert torch.equal(features_of(plain, which), features_of(plain, "gate"))
    cosine = torch.nn.functional.normalize(gated.up_MFD[{"gate": 0}.get(which, 1)].float(), dim=1)
    width = gated.up_MFD.shape[-1]
    part = features_of(gated, which)[:, -width:]
    scale = 2**0.5 if which == "both" else 1
    torch.testing.assert_close(part * scale, cosine, rtol=0, atol=1e-6)


def test_clusters_are_found_through_the_method() -> None:
    # Three directions, of different lengths: the length of a key does not matter to the cosine.
    ffn = numerics.random_ffn("gelu", d_model=16, d_ff=12, bias=False)
    direction = torch.arange(12) % 3
    length_F1 = torch.arange(1, 13).double()[:, None]
    up_FD = torch.eye(16).double()[direction] * length_F1
    ffn = FFNWeights(ffn.pointwise, up_FD[None], None, ffn.down_OF, None)
    groups = {tuple(row) for row in experts_of(ffn, "cluster", 3, 0).neuron_EI.tolist()}
    assert groups == {(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)}


def test_l2_compares_rows_as_they_are() -> None:
    gated = numerics.random_ffn("swiglu")
    both = features_of(gated, "both", "l2")
    assert torch.equal(both, torch.cat([gated.up_MFD[0], gated.up_MFD[1]], dim=1).float())
    assert torch.equal(features_of(gated, "up", "l2"), gated.up_MFD[1].float())
    # Two lengths along one direction, which the cosine cannot tell apart.
    ffn = numerics.random_ffn("gelu", d_model=16, d_ff=8, bias=False)
    length_F1 = torch.tensor([1.0, 9, 1, 9, 1, 9, 1, 9]).double()[:, None]
    ffn = FFNWeights(ffn.pointwise, (torch.ones(8, 16) * length_F1)[None], None, ffn.down_OF, None)
    groups = {tuple(r) for r in experts_of(ffn, "cluster", 2, 0, metric="l2").neuron_EI.tolist()}
    assert groups == {(0, 2, 4, 6), (1, 3, 5, 7)}


def test_every_method_names_its_paper() -> None:
    for name, method in EXPERTS.items():
        assert method.name == name
        assert re.search(r"Source:\n[^:]*https://", method.build.__doc__ or "")
