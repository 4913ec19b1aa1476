"""The table of activations, the kernels that have a switch of their own, and `same_function`."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import upcycle.kernels
from upcycle.ir.same_function import TOLERANCE, same_function
from upcycle.kernels.activations import (
    NAMED_ACTIVATIONS,
    NAMED_POINTWISE,
    NamedActivation,
    of_module,
)
from upcycle.pointwise import Pointwise
from upcycle.targets.native.layers import computes

KERNELS = Path(upcycle.kernels.__file__).parent
NUMBERS = {row.name: row.kernel for row in NAMED_ACTIVATIONS if row.kernel is not None}
CLASSES = {type(ACT2FN[name]).__name__: ACT2FN[name] for name in ACT2FN}
SILU = NAMED_POINTWISE["silu"]


def test_no_two_rows_share_a_name_or_a_number() -> None:
    columns = [
        [name for row in NAMED_ACTIVATIONS for name in (row.name, row.gated) if name],
        list(NUMBERS.values()),
        [name for row in NAMED_ACTIVATIONS for name in (row.onnx, row.onnx_gated) if name],
        [name for row in NAMED_ACTIVATIONS for name in row.classes],
    ]
    for column in columns:
        assert len(column) == len(set(column))


@pytest.mark.parametrize("name", NAMED_POINTWISE)
def test_every_row_is_another_function(name: str) -> None:
    """By a hundred times what may be the same."""
    known = NAMED_POINTWISE[name]
    others = [pointwise for other, pointwise in NAMED_POINTWISE.items() if other != name]
    assert same_function(known, known, tolerance=0)
    assert not any(same_function(known, other, 100 * TOLERANCE) for other in others)


def test_the_kernels_in_cpp_have_the_numbers_of_the_table() -> None:
    source = (KERNELS / "cpp" / "activations.h").read_text("utf-8")
    (enum,) = re.findall(r"enum Activation \{(.*?)\}", source)
    cases = re.findall(r"case (\w+):", source)
    assert {name.lower(): i for i, name in enumerate(re.findall(r"\w+", enum))} == NUMBERS
    assert {"none", *(case.lower() for case in cases)} == set(NUMBERS)


def test_the_triton_kernels_have_the_names_of_the_table() -> None:
    tree = ast.parse((KERNELS / "triton" / "source.py").read_text("utf-8"))
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    names = [ast.literal_eval(c.comparators[0]) for c in compared if ast.unparse(c.left) == "ACT"]
    assert sorted(["none", *names]) == sorted(NUMBERS)


@pytest.mark.parametrize("name", [n for row in NAMED_ACTIVATIONS for n in row.classes])
def test_a_class_computes_its_row(name: str) -> None:
    function = CLASSES.get(name) or getattr(nn, name)()
    known = of_module(SimpleNamespace(act_fn=function, has_gate=False))
    assert same_function(NAMED_POINTWISE[known or ""], function)


@pytest.mark.parametrize("row", NAMED_ACTIVATIONS, ids=lambda row: row.name)
def test_degrees(row: NamedActivation) -> None:
    """``a(3 z) = 3^d a(z)`` with the degree of the row, and with no degree where it has none."""
    function = row.forms()[0]
    found = [
        degree
        for degree in (0, 1, 2, 3)
        if same_function(function, lambda z, d=degree: function(3 * z) / 3**d)
    ]
    assert found == ([] if row.degree is None else [row.degree])


def test_same_function_allows_other_constants_and_sees_where_one_is_cut_off() -> None:
    gelu = NAMED_POINTWISE["gelu"]
    assert same_function(gelu, lambda z: 0.5 * z * (1 + torch.erf(z * 0.70710678)))
    assert not same_function(gelu, lambda z: F.gelu(z, approximate="tanh"))
    for limit in (6, 20, 65504):
        assert not same_function(SILU, lambda z, most=limit: F.silu(z).clamp(max=most))
        assert not same_function(
            NAMED_POINTWISE["swiglu"], lambda g, z, most=limit: F.silu(g) * z.clamp(-most, most)
        )
    assert not same_function(SILU, NAMED_POINTWISE["swiglu"])
    assert not same_function(SILU, lambda z: F.silu(z) * torch.nan)


def test_a_native_activation_is_exact() -> None:
    """It is found with transformers' constants alone, whatever it is called."""
    steps = (
        ("mul", ("z0", 0.70710678), {}),
        ("erf", ("t0",), {}),
        ("add", ("t1", 1.0), {}),
        ("mul", ("z0", "t2"), {}),
        ("mul", ("t3", 0.5), {}),
    )
    digits = Pointwise(1, steps, "gelu")
    assert same_function(digits, NAMED_POINTWISE["gelu"])
    assert not computes(digits, "gelu", gated=False)
    assert computes(NAMED_POINTWISE["gelu"], "gelu", gated=False)
    assert not computes(NAMED_POINTWISE["gelu"], "gelu", gated=True)
