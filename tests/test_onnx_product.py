"""Every router x activation x form in ONNX Runtime, with the tokens that routers get wrong."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_case import ACTIVATIONS, save
from onnx_routers import (
    KINDS,
    MAIN,
    MIXED,
    RULES,
    SELECT,
    WEIGHTS,
    D,
    bound,
    exact,
    layer_of,
    weights,
)
from torch import Tensor, nn

from upcycle.errors import UnsupportedError
from upcycle.layers import selection
from upcycle.layers.config import WeightRule
from upcycle.layers.moe import MoE
from upcycle.layers.routers import ROUTER_KINDS
from upcycle.layers.token_context import tell_routers
from upcycle.onnx.run import session
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1e-5  # of the largest output: what every form promises in float32
KERNELS = ("relu", "silu", "gelu_tanh", "swiglu")
OTHERS = ("geglu", "gelu")
# Of the router the experts' part of a graph reads weights and nothing else, whatever it computes:
# behind each are two activations that have a kernel and one that has none; one of them is gated.
CASES = [
    (name, activation)
    for i, name in enumerate(MAIN)
    for activation in (KERNELS[i % 4], KERNELS[(i + 1) % 4], OTHERS[i // 2 % 2])
]
FILE = 12  # layers of one file: the time that torch takes grows with the square
FORMS = ("fused", "function", "unrolled", "dense")
REFUSED = {"oracle"}


class Side(nn.Module):
    """Layers side by side."""

    def __init__(self, layers: list[MoE]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        tell_routers(self, {f"layers.{i}": layer.router for i, layer in enumerate(layers)})

    def forward(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def product() -> list[MoE]:
    """One layer for each of `CASES`."""
    return [layer_of(MAIN[name], act, seed=i) for i, (name, act) in enumerate(CASES)]


def export(model: Side, folder: Path, form: str) -> Path:
    example = (torch.randn(7, D), torch.arange(7))
    path, stored = folder / "model.onnx", save(model, folder)
    dynamic = {"x": {0: "tokens"}, "input_ids": {0: "tokens"}}
    options = Onnx(form=form)  # type: ignore[arg-type]
    return export_onnx(model, example, path=path, stored=stored, options=options, dynamic=dynamic)


def without_kernel(path: Path) -> Path:
    """The file with its MoE function under another name, which ONNX Runtime has no kernel for."""
    model = onnx.load(path, load_external_data=False)
    for found in (*model.functions, *model.graph.node):
        if found.domain == "com.microsoft":
            found.domain = "elsewhere"
    for entry in model.opset_import:
        if entry.domain == "com.microsoft":
            entry.domain = "elsewhere"
    other = path.with_name("function.onnx")
    onnx.save(model, other)
    return other


def tokens() -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens [T, D] and their ids [T], by what they try."""
    draw = torch.Generator().manual_seed(3)

    def some(count: int) -> tuple[Tensor, Tensor]:
        ids_T = torch.randint(0, 1000, (count,), generator=draw)
        return torch.randn(count, D, generator=draw), ids_T

    x_1D, ids_1 = some(1)
    return {
        "many": some(61),
        "one token": (x_1D, ids_1),
        "all on the same experts": (x_1D.expand(6, D).clone(), ids_1.expand(6).clone()),
        "ties": (torch.zeros(3, D), torch.tensor([0, 1, 2])),
    }


TOKENS = tokens()


@lru_cache
def runner(path: Path) -> Any:
    return session(path)


def run(paths: list[Path], x: Tensor, ids: Tensor) -> list[Tensor]:
    feeds, made = {"x": x.numpy(), "input_ids": ids.numpy()}, []
    for path in paths:
        known = [value.name for value in runner(path).get_inputs()]
        made += runner(path).run(None, {name: feeds[name] for name in known})
    return [torch.from_numpy(y) for y in made]


@pytest.fixture(scope="module")
def layers() -> list[MoE]:
    return product()


@pytest.fixture(scope="module")
def files(layers, one_trace, tmp_path_factory) -> dict[str, list[Path]]:
    models = [Side(layers[i : i + FILE]) for i in range(0, len(layers), FILE)]
    made = {
        form: [export(model, tmp_path_factory.mktemp(form), form) for model in models]
        for form in ("fused", "unrolled", "dense")
    }
    return {**made, "function": [without_kernel(path) for path in made["fused"]]}


@pytest.fixture(scope="module")
def expected(layers) -> dict[str, list[Tensor]]:
    return {name: [exact(layer, *given) for layer in layers] for name, given in TOKENS.items()}


def gaps(made: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The largest difference of each layer."""
    pairs = zip(made, expected, strict=True)
    return [(y.double() - want).abs().max().item() for y, want in pairs]


def allowed(
    layers: list[MoE], given: tuple[Tensor, Tensor], expected: list[Tensor]
) -> Iterator[float]:
    """The smaller of what rounding explains, and what is promised."""
    x_TD, ids_T = given
    are_equal = len(x_TD) > 1 and bool((x_TD == x_TD[0]).all() and x_TD.any())
    for layer, want in zip(layers, expected, strict=True):
        if are_equal and layer.config.router.select.rule == "expert_choice":
            # The last bit of a score depends on its row in a product of matrices, and so does
            # which of several equal tokens an expert takes.
            yield math.inf
        else:
            yield min(bound(layer, x_TD, ids_T), CLOSE * want.abs().max().item())


def test_the_product_is_complete() -> None:
    """Whoever adds a router, a selection or a weight rule adds it here."""
    assert set(KINDS) | REFUSED == set(ROUTER_KINDS)
    assert set(SELECT) == set(selection.SELECT)
    assert set(WEIGHTS) == set(WeightRule.__args__)
    assert {config["kind"] for config in MAIN.values()} == set(KINDS)
    assert {config["select"]["rule"] for config in MAIN.values()} == set(SELECT)
    assert {config["weights"] for config in MAIN.values()} == set(WEIGHTS)
    pairs = [(c["select"]["rule"], c["weights"]) for c in (MAIN | RULES).values()]
    assert set(pairs) == {(rule, weight) for rule in SELECT for weight in WEIGHTS}
    assert (len(MAIN), len(CASES), len(RULES), len(MIXED)) == (18, 54, 20, 24)
    behind = {name: {a for n, a in CASES if n == name} for name in MAIN}
    assert all(len(those & set(KERNELS)) == 2 < len(those) for those in behind.values())
    assert all(those & {"swiglu", "geglu"} for those in behind.values())
    assert min(Counter(a for _, a in CASES)[a] for a in ACTIVATIONS) >= 8


@pytest.mark.parametrize("given", TOKENS)
@pytest.mark.parametrize("form", FORMS)
def test_every_router_and_activation(layers, files, expected, form: str, given: str) -> None:
    found = gaps(run(files[form], *TOKENS[given]), expected[given])
    most = allowed(layers, TOKENS[given], expected[given])
    wrong = {c: (g, m) for c, g, m in zip(CASES, found, most, strict=True) if not g <= m}
    assert not wrong


def visits(layer: MoE, given: str) -> Tensor:
    """Which token goes to which expert, [T, E] bool."""
    x_TD, ids_T = TOKENS[given]
    return weights(layer, x_TD.double(), ids_T) != 0


def test_the_tokens_are_what_they_are_meant_to_be(layers) -> None:
    for (name, _), layer in zip(CASES, layers, strict=True):
        rule = layer.config.router.select.rule
        if rule == "null":
            assert (~visits(layer, "many").any(1)).any(), name  # a token that visits nobody
        if rule in ("top_k", "top_p") and layer.config.router.weights != "gain":
            same_TE = visits(layer, "all on the same experts")
            assert (same_TE == same_TE[0]).all(), name
            assert not same_TE.all(0).all(), name  # and the others are idle
        if rule == "top_k" and "table" not in name:
            balance = layer.config.router.balance
            assert balance or visits(layer, "ties")[:, :2].all(), name


def may_be_negative(layer: MoE) -> bool:
    """Whether 1 + g p may be: the kernel takes logarithms."""
    return layer.router.weights == "gain" and bool(layer.router.gain.min() <= -1)


def test_the_forms_are_what_they_are_said_to_be(layers, files) -> None:
    domains = {"fused": "com.microsoft", "function": "elsewhere", "unrolled": "upcycle"}
    domains["dense"] = "upcycle"
    for form, paths in files.items():
        made: list[str] = []
        for path in paths:
            onnx.checker.check_model(path, full_check=True)
            nodes = onnx.load(path, load_external_data=False).graph.node
            made += [node.domain for node in nodes if node.op_type.startswith("MoE")]
        for (name, activation), layer, domain in zip(CASES, layers, made, strict=True):
            has_one = activation in KERNELS and not may_be_negative(layer)
            assert domain == (domains[form] if has_one else "upcycle"), name


@pytest.mark.parametrize("group", ["rules", "mixed"])
def test_selections_with_weight_rules_and_kinds(tmp_path: Path, group: str) -> None:
    """All that was not combined above, each with one activation."""
    configs = list((RULES if group == "rules" else MIXED).values())
    acts = list(ACTIVATIONS)
    layers = [layer_of(config, acts[i % 6], seed=i) for i, config in enumerate(configs)]
    form, paths = "fused" if group == "rules" else "unrolled", []
    for i in range(0, len(layers), FILE):
        folder = tmp_path / str(i)
        folder.mkdir()
        paths.append(export(Side(layers[i : i + FILE]), folder, form))
    for tried in TOKENS.values():
        wants = [exact(layer, *tried) for layer in layers]
        found = zip(gaps(run(paths, *tried), wants), allowed(layers, tried, wants), strict=True)
        assert all(gap <= most for gap, most in found)


# What it would notice


def test_other_experts_and_other_weights_are_noticed(layers, files, expected) -> None:
    given = TOKENS["many"]
    made = run(files["fused"], *given)
    for case, layer, y, want in zip(CASES, layers, made, expected["many"], strict=True):
        most = next(allowed([layer], given, [want]))
        before = layer.experts.down_proj.data
        layer.experts.down_proj.data = before.roll(1, dims=0)
        assert gaps([y], [exact(layer, *given)])[0] > most, case
        layer.experts.down_proj.data = before
        bias = layer.output_bias
        assert gaps([y], [(want - bias) * 1.001 + bias])[0] > most, case


def test_of_equal_scores_the_lowest_expert_wins(layers, files, expected) -> None:
    given = TOKENS["ties"]
    made = run(files["unrolled"], *given)
    seen = 0
    for case, layer, y, want in zip(CASES, layers, made, expected["ties"], strict=True):
        other = exact(layer, *given, last=True)
        if (other - want).abs().max() > CLOSE * want.abs().max():
            seen += 1
            assert gaps([y], [other])[0] > next(allowed([layer], given, [want])), case
    assert seen > len(CASES) / 3


def changed(paths: list[Path], name: str, edit: Callable[[onnx.NodeProto], None]) -> list[Path]:
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        functions = [node for function in model.functions for node in function.node]
        for node in [*model.graph.node, *functions]:
            edit(node)
        onnx.save(model, path.with_name(name))
    return [path.with_name(name) for path in paths]


def test_a_file_with_one_expert_less_is_wrong(layers, files, expected) -> None:
    def one_less(node: onnx.NodeProto) -> None:
        for attribute in node.attribute if node.domain == "com.microsoft" else ():
            if attribute.name == "k" and attribute.i > 1:
                attribute.i -= 1

    made = run(changed(files["fused"], "less.onnx", one_less), *TOKENS["many"])
    found = gaps(made, expected["many"])
    most = allowed(layers, TOKENS["many"], expected["many"])
    for (name, activation), layer, gap, limit in zip(CASES, layers, found, most, strict=True):
        rule = layer.config.router.select.rule
        uses_all = rule in ("top_k", "all", "null")
        if activation in KERNELS and not may_be_negative(layer) and uses_all:
            assert gap > limit, (name, activation)


def test_a_file_that_leaves_experts_of_a_token_out_is_wrong(layers, files, expected) -> None:
    def least(node: onnx.NodeProto) -> None:
        if node.op_type == "ReduceMax":
            node.op_type = "ReduceMin"

    made = run(changed(files["unrolled"][:1], "less.onnx", least), *TOKENS["many"])
    found = gaps(made, expected["many"][:FILE])
    most = allowed(layers[:FILE], TOKENS["many"], expected["many"][:FILE])
    for case, layer, gap, limit in zip(CASES[:FILE], layers[:FILE], found, most, strict=True):
        experts = visits(layer, "many").sum(1)
        assert (gap > limit) == (experts > experts.min().clamp(max=1)).any(), case


# What is refused


class Alone(nn.Module):
    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"kind": "oracle"},
            "layer: an oracle runs every expert to choose some, which is for comparing other "
            "routers with; use another router",
        ),
        *(
            (
                {**KINDS["table"], "kind": "table", "by": by},
                f"layer: its router reads {by} ids, and an ONNX graph has no input that is known "
                "to hold them; use another router, or instead of an ONNX file convert the model "
                "that it was exported from",
            )
            for by in ("token", "type", "domain")
        ),
    ],
    ids=["oracle", "token", "type", "domain"],
)
def test_what_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    layer = layer_of({"select": {"rule": "top_k", "k": 2}, "weights": "one", **config}, "relu")
    with pytest.raises(UnsupportedError) as refused:
        export_onnx(Alone(layer), (torch.randn(3, D),), path=tmp_path / "x.onnx", stored={})
    assert str(refused.value) == message
    assert not list(tmp_path.iterdir())


# Shapes


@settings(max_examples=6, deadline=None)
@given(
    form=st.sampled_from(["fused", "unrolled", "dense"]),
    config=st.sampled_from([c for c in (MAIN | MIXED).values() if c["kind"] != "table"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    experts=st.integers(2, 7),
    width=st.integers(1, 20),
    d_model=st.integers(2, 20),
    count=st.integers(1, 30),
    data=st.data(),
)
def test_any_shape(
    tmp_path_factory, form, config, activation, experts, width, d_model, count, data
) -> None:
    select = dict(config["select"])
    select["k"] = experts if select["rule"] == "all" else data.draw(st.integers(1, experts))
    shape = {"num_experts": experts, "width": width, "d_model": d_model, "bias": False}
    layer = layer_of({**config, "select": select}, activation, seed=count, **shape)
    folder = tmp_path_factory.mktemp("any")
    path = export_onnx(
        layer,
        (torch.randn(3, d_model),),
        path=folder / "model.onnx",
        stored=save(layer, folder),
        options=Onnx(form=form),
    )
    x_TD = torch.randn(count, d_model, generator=torch.Generator().manual_seed(count))
    (y,) = session(path).run(None, {"x": x_TD.numpy()})
    ids_T = torch.zeros(count, dtype=torch.int64)
    assert gaps([torch.from_numpy(y)], [exact(layer, x_TD, ids_T)])[0] <= bound(layer, x_TD, ids_T)
