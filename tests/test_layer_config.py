"""The configuration of a layer: its JSON is what every version wrote, and nothing else is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from upcycle.layers.config import LayerConfig, RouterConfig, SelectConfig

WRITTEN = Path(__file__).parent / "written_before"
LINEAR: dict[str, Any] = {
    "kind": "linear",
    "num_experts": 4,
    "d_model": 8,
    "select": {"rule": "top_k", "k": 2},
    "weights": "one",
    "scale": 1.0,
    "bias": False,
    "tied": False,
    "frozen": False,
    "balance": False,
    "nulls": 0,
}
RELU = {"arity": 1, "name": "relu", "steps": [["relu", ["z0"], {}]]}
LAYER: dict[str, Any] = {
    "num_experts": 4,
    "width": 3,
    "shared": 2,
    "low_rank": 1,
    "d_model": 8,
    "d_out": 8,
    "axis": 1,
    "pointwise": RELU,
    "up_bias": True,
    "output_bias": False,
    "router": LINEAR,
    "hidden_dropout": 0,
    "output_dropout": 0.1,
}
ROUTERS: list[dict[str, Any]] = [
    {},
    {"extended": True},
    {"kind": "mlp", "hidden": 3},
    {"kind": "cosine", "hidden": 3},
    {"kind": "table", "entries": 5, "by": "domain"},
    {"kind": "neurons", "pointwise": RELU, "up_bias": True},
    {"select": {"rule": "top_p", "k": 2, "mass": 0.4}},
    {"select": {"rule": "entropy", "k": 2, "mass": 0.4, "above": 0.9, "q": 1.1}},
    {"select": {"rule": "null", "k": 2, "nulls": 3}, "nulls": 3},
]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_json_is_read_and_written_byte_for_byte(router: dict[str, Any]) -> None:
    text = json.dumps({**LAYER, "router": {**LINEAR, **router}})
    config = LayerConfig.from_json(json.loads(text))
    assert json.dumps(config.to_json()) == text
    assert LayerConfig.from_json(config.to_json()) == config


def test_what_was_written_before_is_read_and_written_byte_for_byte() -> None:
    for path in sorted(WRITTEN.glob("*/provenance.json")):
        for layer in json.loads(path.read_text("utf-8"))["layers"]:
            text = json.dumps(layer["layer"])
            assert json.dumps(LayerConfig.from_json(layer["layer"]).to_json()) == text


def test_keys_that_early_versions_did_not_write_have_defaults() -> None:
    router = {k: v for k, v in LINEAR.items() if v not in (False, 0) or k == "scale"}
    early = {k: v for k, v in LAYER.items() if k not in ("shared", "low_rank", "axis")}
    config = LayerConfig.from_json({**early, "router": router})
    assert (config.shared, config.low_rank, config.axis) == (0, 0, -1)
    assert config.router == RouterConfig.from_json(LINEAR)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ({"depth": 3}, "layer has `depth`, which is unknown"),
        ({"width": "3"}, "layer.width is '3' and not of type int"),
        ({"width": True}, "layer.width is True and not of type int"),
        ({"up_bias": 1}, "layer.up_bias is 1 and not of type bool"),
        ({"router": 3}, "layer.router is 3 and no object"),
        ({"pointwise": {**RELU, "steps": [["system", [], {}]]}}, "layer.pointwise is {"),
        ({"pointwise": None}, "layer.pointwise is None and no known function"),
        ({"router": {"kind": "linear"}}, "layer.router has no `num_experts`"),
        ({"router": {**LINEAR, "hidden": 3}}, "layer.router has `hidden`, which is unknown"),
        ({"router": {**LINEAR, "kind": "mlp"}}, "layer.router has no `hidden`"),
        ({"router": {**LINEAR, "kind": "best"}}, "layer.router.kind is 'best' and not one of "),
        ({"router": {**LINEAR, "scale": None}}, "layer.router.scale is None and not of type float"),
        (
            {"router": {**LINEAR, "select": {"rule": "top_k", "k": 2, "mass": 0.5}}},
            "layer.router.select has `mass`, which is unknown",
        ),
    ],
    ids=str,
)
def test_what_is_refused(layer: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="; read it with the version of upcycle that") as error:
        LayerConfig.from_json({**LAYER, **layer})
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "is_plain"),
    [
        ({}, True),
        ({"weights": "renorm_detach", "bias": True, "tied": True}, True),
        ({"weights": "gain"}, False),
        ({"balance": True}, False),
        ({"kind": "noisy"}, False),
        ({"select": {"rule": "all", "k": 4}}, False),
        ({"nulls": 1}, False),
    ],
    ids=str,
)
def test_the_plain_router(changes: dict[str, Any], is_plain: bool) -> None:
    assert RouterConfig.from_json({**LINEAR, **changes}).is_plain is is_plain


def test_a_rule_gets_its_own_arguments_alone() -> None:
    assert SelectConfig(rule="top_k", k=2, mass=0.3).arguments == {"k": 2}
    assert SelectConfig(rule="null", k=2, nulls=3).arguments == {"k": 2, "nulls": 3}
