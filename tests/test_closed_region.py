"""What lies between two nodes of a graph, and each way in which the rest is tied to it.

A region is compared with dominance on random graphs, and with the FFNs of recorded models.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import networkx as nx
import pytest
import torch
from small_models import gpt2, llama
from torch import fx, nn
from torch.nn import functional as F

from upcycle.capture.capture import capture
from upcycle.capture.recorder import Program
from upcycle.graphs.closed_region import between, flow_of, leaks
from upcycle.passes.locate.behind import live_nodes
from upcycle.passes.locate.locate import locate

D, H, T = 8, 24, 5
Part = Callable[[Any], Any]


def gelu(s: Any) -> torch.Tensor:
    return F.gelu(s.h)


class FFN(nn.Module):
    """``x + down(inner)`` in the middle of a model that does something else besides.

    The parts get what there is: x, h (the expansion, then the hidden tensor), a second input
    `other`, and a buffer `cache`.
    """

    def __init__(self, inner: Part = gelu, after: Part = lambda s: None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.register_buffer("cache", torch.zeros(T, H))
        self.inner, self.after = inner, after

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:
        """The output, and what `after` returns."""
        s = SimpleNamespace(x=x.tanh(), other=other, cache=self.cache)
        s.h = self.up(s.x)
        s.h = self.inner(s)
        more = self.after(s)
        return s.x + self.down(s.h) + other.sum(), more


def region_of(model: nn.Module) -> tuple[Program, fx.Node, fx.Node]:
    """What was recorded, what the first linear map reads, and what the last one makes."""
    program = capture(model, (torch.zeros(T, D), torch.zeros(T, H)))
    maps = [node for node in program.graph.nodes if node.target is F.linear]
    return program, maps[0].args[0], maps[-1]


def leaks_of(model: nn.Module) -> list[tuple[str, str, str]]:
    program, *ends = region_of(model)
    found = leaks(flow_of(program.graph), *ends, live_nodes(program.graph))
    return [(leak.kind, leak.inside.name, leak.outside.name) for leak in found]


def test_the_nodes_between_are_those_on_the_ways() -> None:
    program, x, output = region_of(FFN())
    flow = flow_of(program.graph)
    assert {node.name for node in between(flow, x, output)} == {"linear", "gelu", "linear_1"}
    assert between(flow, output, x) == between(flow, x, x) == frozenset()
    other = next(node for node in flow if node.name == "input_1")
    assert between(flow, other, output) == frozenset()


@pytest.mark.parametrize(
    "inner",
    [
        gelu,
        lambda s: gelu(s) * torch.ones(H) * s.cache.t().t().exp(),
        lambda s: F.relu_(s.h),
        lambda s: s.h.view(T, H).relu_() + s.h,
        lambda s: gelu(s) + F.linear(s.x, torch.ones(H, D)).tanh(),
        lambda s: s.h.new_zeros(T, H).copy_(s.h).tanh(),
    ],
    ids=["plain", "constants", "in place", "view in place", "two ways from x", "memory of its own"],
)
def test_what_stays_inside_is_no_leak(inner: Part) -> None:
    assert leaks_of(FFN(inner)) == []


@pytest.mark.parametrize(
    ("after", "want"),
    [
        (lambda s: s.h, [("is read", "gelu", "output")]),
        (lambda s: s.h.sum(), [("is read", "gelu", "sum_1")]),
        (lambda s: s.h.view(-1)[:2], [("is read", "gelu", "view")]),
        (lambda s: [s.h.exp(), s.h], [("is read", "gelu", "exp"), ("is read", "gelu", "output")]),
        (lambda s: s.x, []),
        (lambda s: s.h.sum() is None, []),
    ],
    ids=["output", "function", "view", "two", "of x", "dead"],
)
def test_a_reader_outside(after: Part, want: list[Any]) -> None:
    """x may be read by anything, and what is made of a dead reader is nothing."""
    assert leaks_of(FFN(after=after)) == want
    program, *_ = region_of(FFN(after=after))
    assert len(locate(program).ffns) == (0 if want else 1)


@pytest.mark.parametrize(
    ("inner", "want"),
    [
        (lambda s: gelu(s) * s.other, [("reads", "mul", "input_1")]),
        (lambda s: gelu(s) * (s.cache * s.other), [("reads", "mul_1", "mul")]),
        (lambda s: gelu(s) * s.cache.add_(s.other), [("reads", "mul", "add")]),
    ],
    ids=["input", "constant with an input", "buffer after a write"],
)
def test_a_second_input(inner: Part, want: list[Any]) -> None:
    assert leaks_of(FFN(inner)) == want


def written_to(s: Any) -> torch.Tensor:
    s.x.mul_(2)
    return gelu(s)


@pytest.mark.parametrize(
    ("inner", "after", "want"),
    [
        (gelu, lambda s: s.cache.copy_(s.h) is None, [("is read", "gelu", "copy")]),
        (gelu, lambda s: s.cache.copy_(s.h * 2) is None, [("is read", "gelu", "mul")]),
        (gelu, lambda s: s.cache.__setitem__(0, s.h[0]), [("is read", "gelu", "getitem")]),
        (lambda s: s.cache.copy_(s.h), lambda s: None, [("writes", "copy", "cache")]),
        (
            lambda s: torch.cat([s.x.mul_(2)] * 3, -1) * s.h,
            lambda s: None,
            [("writes", "mul", "tanh"), ("is read", "mul", "add")],
        ),
        (written_to, lambda s: None, [("is written", "tanh", "mul")]),
        (gelu, lambda s: s.x.mul_(2) is None, [("is written", "tanh", "mul")]),
    ],
    ids=["dead copy", "of a copy", "setitem", "buffer", "x inside", "x outside", "x at the end"],
)
def test_a_write_in_place_across_the_border(inner: Part, after: Part, want: list[Any]) -> None:
    assert leaks_of(FFN(inner, after)) == want


def test_a_write_to_x_before_or_after_the_region_is_no_leak() -> None:
    maps = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)
    model = nn.Sequential(nn.Tanh(), nn.ReLU(inplace=True), *maps, nn.ReLU(inplace=True))
    program = capture(model, (torch.zeros(T, D),))
    assert sum("writes" in node.meta for node in program.graph.nodes) == 2
    maps = [node for node in program.graph.nodes if node.target is F.linear]
    x, live = maps[0].args[0], live_nodes(program.graph)
    assert leaks(flow_of(program.graph), x, maps[1], live) == []


def graph_of(draw: random.Random) -> fx.Graph:
    """Some calls, each of two nodes before it, of two inputs and a parameter; some are dead."""
    graph = fx.Graph()
    nodes = [graph.placeholder("a"), graph.placeholder("b"), graph.get_attr("weight")]
    for _ in range(12):
        nodes.append(graph.call_function(torch.add, tuple(draw.choices(nodes[-6:], k=2))))
    graph.output(tuple(draw.sample(nodes[-4:], 2)))
    return graph


def above(idom: dict[Any, Any], node: Any) -> list[Any]:
    """The dominators of `node`; none if it cannot be reached."""
    found = []
    while idom.get(node, node) is not node:
        node = idom[node]
        found.append(node)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_without_a_leak_x_dominates_and_the_output_postdominates(seed: int) -> None:
    graph = graph_of(random.Random(seed))
    flow, live = flow_of(graph), live_nodes(graph)
    end = next(node for node in flow if node.op == "output")
    assert live == {node for node in flow if nx.has_path(flow, node, end)}
    whole: Any = nx.DiGraph(flow)
    whole.add_edges_from(("start", node) for node in flow if node.op == "placeholder")
    before = nx.immediate_dominators(whole, "start")
    after = nx.immediate_dominators(whole.reverse(), end)
    seen = set()
    for x in flow:
        for output in flow:
            region = between(flow, x, output)
            assert region == {n for way in nx.all_simple_paths(flow, x, output) for n in way[1:]}
            kinds = {leak.kind for leak in leaks(flow, x, output, live)}
            entered = any(n in before and x not in above(before, n) for n in region)
            left = any(n in live and output not in above(after, n) for n in region - {output})
            assert (("reads" in kinds), ("is read" in kinds)) == (entered, left)
            seen.add((bool(region), entered, left))
    assert len(seen) >= 4  # closed ones, and such as are open


@pytest.mark.parametrize("model", [llama, gpt2])
def test_the_ffns_of_models_are_closed_between_the_ends_of_their_modules(model: Any) -> None:
    """And not if they end at the residual stream, which comes from before them."""
    tokens = {"input_ids": torch.zeros(2, T, dtype=torch.long)}
    program = capture(model(), tokens)
    flow, live = flow_of(program.graph), live_nodes(program.graph)
    found = locate(program).ffns
    assert len(found) == 2
    for ffn in found:
        (call,) = program.calls[ffn.path]
        x, output = call.inputs[0], call.outputs[0]
        assert output in between(flow, x, output)
        assert leaks(flow, x, output, live) == []
        stream = next(iter(output.users))
        assert {leak.kind for leak in leaks(flow, x, stream, live)} == {"reads"}
