"""Markers of activity, and the neurons that represent experts."""

import dataclasses

import numerics
import pytest
import torch

from upcycle.passes.experts.markers import Markers, mark
from upcycle.passes.routers.representative import representatives


def bits(markers: Markers) -> torch.Tensor:
    """All bits [T, F] of data whose chunks are filled up: 512 tokens come as 200, 200 and 112."""
    return torch.cat(list(markers.chunks()), dim=1).t()


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_markers_are_the_strongest_neurons_of_unit_tokens_and_rows(name: str) -> None:
    ffn = numerics.random_ffn(name, bias=False)
    data = numerics.seen(ffn)
    up_MFD = torch.nn.functional.normalize(ffn.up_MFD, dim=-1)
    unit = dataclasses.replace(ffn, up_MFD=up_MFD)
    x_TD = torch.nn.functional.normalize(torch.cat(data.x).double(), dim=-1)
    want_TF = torch.zeros(len(x_TD), 48)
    want_TF.scatter_(1, unit.hidden(x_TD).abs().topk(5, dim=1).indices, 1.0)
    got = mark(ffn, data, 5)
    assert torch.equal(bits(got), want_TF)
    assert torch.equal(got.rate(), want_TF.mean(0))
    raw_TF = ffn.hidden(torch.cat(data.x).double()).abs()
    raw = mark(ffn, data, 5, unit=False)
    assert torch.equal(bits(raw), torch.zeros_like(want_TF).scatter_(1, raw_TF.topk(5).indices, 1))
    assert not torch.equal(bits(raw), want_TF)


def test_all_markers_of_relu_are_what_is_not_zero() -> None:
    ffn = numerics.random_ffn("relu")
    data = numerics.seen(ffn)
    is_on_TF = ffn.to(torch.float32).hidden(torch.cat(data.x)) > 0
    assert torch.equal(bits(mark(ffn, data, 48)).bool(), is_on_TF)


def test_distances_are_those_of_the_definition() -> None:
    ffn = numerics.random_ffn("swiglu")
    markers = mark(ffn, numerics.seen(ffn), 7)
    member_KF = torch.arange(48)[None] % 5 == torch.arange(5)[:, None]
    rows_FT = bits(markers).t()
    mean_KT = torch.stack([rows_FT[member].mean(0) for member in member_KF])
    want_KF = torch.cdist(mean_KT, rows_FT, p=1)
    # Sums of 512 numbers of at most one, in float32.
    bound = 512 * 512 * 2**-24
    torch.testing.assert_close(markers.distances(member_KF), want_KF, rtol=0, atol=bound)


def test_a_representative_is_the_member_nearest_to_the_mean() -> None:
    ffn = numerics.random_ffn("swiglu")
    data = numerics.seen(ffn)
    neuron_EI = torch.full((7, 7), -1)
    neuron_EI.view(-1)[:48] = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    got_E = representatives(ffn, neuron_EI, data, markers=5)
    rows_FT = bits(mark(ffn, data, 5)).t().double()
    for chosen, neurons in zip(got_E.tolist(), neuron_EI.tolist(), strict=True):
        members = [n for n in neurons if n >= 0]
        far = (rows_FT[members] - rows_FT[members].mean(0)).abs().sum(1)
        assert chosen in members
        # Near ties are decided by rounding.
        assert far[members.index(chosen)] <= far.min() + 512 * 512 * 2**-24
