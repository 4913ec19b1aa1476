"""Sizes and layout of the groups that a split deals the neurons of an FFN into."""

import torch


def membership(neuron_EI: torch.Tensor, d_ff: int) -> torch.Tensor:
    """1 where expert e holds neuron f, [E, F] float32; a negative number is no neuron."""
    member_EF = torch.zeros(len(neuron_EI), d_ff + 1)
    # Padding and neurons drawn anew go to an extra column.
    member_EF.scatter_(1, torch.where(neuron_EI < 0, d_ff, neuron_EI), 1.0)
    return member_EF[:, :d_ff]


def group_sizes(d_ff: int, count: int) -> list[int]:
    """`count` sizes that sum to `d_ff`, the longer ones first; they differ by at most one."""
    short, longer = divmod(d_ff, count)
    return [short + (group < longer) for group in range(count)]


def deal(order_F: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Deal neurons to `count` experts: `group_sizes` consecutive ones of `order_F` to each.

    Returns [count, width] int64; -1 fills the short groups. Neurons are in ascending order within
    a group, so that one partition has one layout.
    """
    neuron_EI = torch.full((count, width), -1, dtype=torch.int64)
    start = 0
    for row_I, size in zip(neuron_EI, group_sizes(len(order_F), count), strict=True):
        row_I[:size] = order_F[start : start + size].sort().values
        start += size
    return neuron_EI


def by_turns(order_F: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """As `deal`, but like cards: expert e gets neurons e, e + count, ... of `order_F`."""
    turns = [order_F[expert::count] for expert in range(count)]
    return deal(torch.cat(turns), count, width)
