"""The operations that programs are made of, and programs as data."""

import json
from typing import Any

import pytest
import torch

from upcycle.passes.locate.name_activation import recognise, swapped
from upcycle.pointwise import OPS, Pointwise

# Arguments besides the tensor, for operations that need some.
MORE: dict[str, list[tuple[Any, ...]]] = {
    "cast": [("float64",), ("bfloat16",)],
    "clamp": [(-0.5, 0.5)],
    "pow": [(2,), (3.0,)],
    "rsub": [(1.0,), ("other",)],
    "hardtanh": [(-0.3, 0.3)],
    "leaky_relu": [(0.2,)],
    "hardshrink": [(), (0.2,)],
    "softshrink": [(), (0.2,)],
    "threshold": [(0.4, 0.3)],
    "where": [("other", "other"), ("other", 0.7)],
    **{
        name: [("other",)]
        for name in ("cast_like", "maximum", "minimum", "logical_and", "logical_or")
    },
    **{name: [("other",), (0.7,)] for name in ("ge", "gt", "le", "lt")},
    **{name: [("other",), (0.7,)] for name in ("add", "sub", "mul", "div")},
}
CASES = [(name, more) for name in sorted(OPS) for more in MORE.get(name, [()])]


@pytest.mark.parametrize(("name", "more"), CASES, ids=lambda v: str(v))
def test_an_operation_moves_only_the_element_that_was_moved(
    name: str, more: tuple[Any, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 5, generator=generator) + 0.1  # a domain that log and sqrt have, too
    other = torch.rand(3, 5, generator=generator) + 0.1
    args = [other if arg == "other" else arg for arg in more]
    before = OPS[name](x, *args)
    assert before.shape == x.shape
    for i in range(x.numel()):
        moved = x.clone()
        moved.view(-1)[i] = 2.5 if name != "cast" else 7.0
        changed = (OPS[name](moved, *args) != before).view(-1)
        changed[i] = False
        assert not changed.any()
    for i in range(x.numel()):  # a second operand is read element by element as well
        if "other" in more:
            moved = other.clone()
            moved.view(-1)[i] = 2.5
            changed = (OPS[name](x, *(moved if a is other else a for a in args)) != before).view(-1)
            changed[i] = False
            assert not changed.any()


def test_the_check_above_sees_an_operation_that_mixes() -> None:
    x = torch.rand(3, 5)
    moved = x.clone()
    moved[0, 0] = 2.5
    changed = torch.softmax(moved, -1) != torch.softmax(x, -1)
    assert changed.sum() > 1


def test_a_program_survives_json() -> None:
    program = Pointwise(
        2,
        (
            ("cast", ("z0", "float32"), {}),
            ("gelu", ("t0",), {"approximate": "tanh"}),
            ("cast_like", ("t1", "z0"), {}),
            ("mul", ("t2", "z1"), {}),
        ),
        "geglu_tanh",
    )
    again = Pointwise.from_json(json.loads(json.dumps(program.to_json())))
    assert again == program
    z = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(again(*z), program(*z))
    assert again(*z).dtype == torch.bfloat16


def test_an_unknown_operation_is_refused() -> None:
    data = {"arity": 1, "name": "custom", "steps": [["system", ["z0"], {}]]}
    with pytest.raises(KeyError, match="system"):
        Pointwise.from_json(data)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((("square", ("z0",), {}), ("relu", ("z0",), {}), ("mul", ("t1", "t1"), {})), "relu2"),
        ((("sigmoid", ("z0",), {}), ("mul", ("z0", "t0"), {})), "silu"),
        (
            (
                ("mul", ("z0", 1.702), {}),
                ("sigmoid", ("t0",), {}),
                ("mul", ("t1", "z0"), {}),
            ),
            "quick_gelu",
        ),
        (
            (
                ("cast", ("z0", "float32"), {}),
                ("silu", ("t0",), {}),
                ("cast_like", ("t1", "z0"), {}),
            ),
            "silu",
        ),
        ((("sin", ("z0",), {}),), "custom"),
        ((("hardtanh", ("z0",), {"min_val": 0.0, "max_val": 6.0}),), "custom"),  # ReLU6
        ((("clamp", ("z0", 0.0, 20.0), {}),), "custom"),
    ],
)
def test_activations_are_recognised_by_what_they_compute(steps: tuple[Any, ...], name: str) -> None:
    assert recognise(Pointwise(1, steps)).name == name


def test_swapped_exchanges_gate_and_up() -> None:
    program = Pointwise(2, (("silu", ("z1",), {}), ("mul", ("z0", "t0"), {})))
    assert recognise(program).name == "custom"
    assert recognise(swapped(program)).name == "swiglu"
    z0, z1 = torch.randn(2, 5)
    assert torch.equal(program(z0, z1), swapped(program)(z1, z0))
