"""The public functions: convert, locate and verify, in every way they may be called."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import upcycle
from upcycle.recipe.schema import Layers, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

COPIES: dict[str, Any] = {
    "experts": {"method": "copy", "count": 3},
    "router": {"method": "normal", "top_k": 2, "weights": "renormalised"},
}
INPUTS = (torch.zeros(2, zoo.D),)


def test_a_recipe_object_a_name_and_a_path_do_the_same(tmp_path: Path) -> None:
    dense = zoo.model("mlps")
    path = tmp_path / "mine.yaml"
    shipped = upcycle.load_recipe("sparse-upcycling")
    text = shipped.model_dump_json(exclude_unset=True)
    path.write_text(text)
    made = [
        upcycle.convert(dense, r, INPUTS) for r in (shipped, "sparse-upcycling", path, str(path))
    ]
    states = [conversion.model.state_dict() for conversion in made]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][key]) for key, tensor in state.items())
    names = [conversion.plan.recipe_name for conversion in made]
    assert names[:2] == ["custom", "sparse-upcycling"]
    assert all(name.endswith("mine.yaml") for name in names[2:])
    assert all(check.passed for check in made[0].report.checks)


def test_locate_then_convert() -> None:
    dense = zoo.model("mlps")
    located = upcycle.locate(dense, INPUTS)
    assert len(located.ffns) == 5
    recipe = Recipe.model_validate({**COPIES, "layers": {"every": 2}})
    conversion = upcycle.convert(dense, recipe, INPUTS, located=located)
    assert [spec.ffn.path for spec in conversion.plan.specs] == ["1.inner", "3.inner"]
    assert sum(isinstance(m, upcycle.MoE) for m in conversion.model.modules()) == 2


def test_modes_are_kept() -> None:
    dense = zoo.model("mlps").train()
    dense[0].eval()
    conversion = upcycle.convert(dense, Recipe.model_validate(COPIES), INPUTS)
    assert conversion.model.training
    assert dense.training


def test_verify_measures_and_leaves_the_modes() -> None:
    dense = zoo.model("mlps").train()
    converted = upcycle.convert(dense, Recipe.model_validate(COPIES), INPUTS).model
    report = upcycle.verify(dense, converted, (torch.randn(4, zoo.D),))
    assert report.relative < 1e-5
    assert dense.training
    with torch.no_grad():
        next(m for m in converted.modules() if isinstance(m, upcycle.MoE)).experts.down_proj.zero_()
    assert upcycle.verify(dense, converted, (torch.randn(4, zoo.D),)).relative > 1e-2
    with pytest.raises(upcycle.VerificationError, match="does not return output"):
        upcycle.verify(dense, zoo.mlp(zoo.D, 8, 3), (torch.randn(4, zoo.D),))


def test_a_broken_promise_stops_the_conversion() -> None:
    split = {
        "experts": {"method": "contiguous", "count": 4},
        "router": {"method": "normal", "top_k": 1, "weights": "one"},
        "verify": {"max_relative_error": 1e-3},
    }
    with pytest.raises(upcycle.VerificationError, match="end to end: error"):
        upcycle.convert(zoo.model("mlps"), Recipe.model_validate(split), INPUTS)


@pytest.mark.parametrize(
    ("model", "recipe", "inputs", "error", "words"),
    [
        (nn.Linear(4, 4), COPIES, (torch.zeros(2, 4),), "UnsupportedError", "no dense FFN"),
        (zoo.mlp(4, 8, 4), COPIES, (torch.zeros(2, 5),), "CaptureError", r"inputs \{0: \[2, 5\]\}"),
        (zoo.mlp(4, 8, 4), "no-such-recipe", None, "UsageError", "no-such-recipe"),
        (
            zoo.mlp(4, 6, 4),
            {**COPIES, "router": {**COPIES["router"], "top_k": 4}},
            (torch.zeros(2, 4),),
            "PlanError",
            "cannot visit 4 of 3",
        ),
        (
            zoo.mlp(4, 6, 4),
            {**COPIES, "layers": {"include": "nothing"}},
            (torch.zeros(2, 4),),
            "RecipeError",
            "leave none of the 1",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    model: nn.Module, recipe: Any, inputs: Any, error: str, words: str
) -> None:
    given = recipe if isinstance(recipe, str) else Recipe.model_validate(recipe)
    with pytest.raises(getattr(upcycle, error), match=words):
        upcycle.convert(model, given, inputs)


def test_a_model_whose_inputs_nobody_can_guess() -> None:
    class Odd(nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
            return x["a"]

    with pytest.raises(upcycle.CaptureError, match="`example_inputs`"):
        upcycle.locate(Odd())


@pytest.mark.parametrize("values", [{"skip_first": -1}, {"skip_last": -2}, {"skip_last": 1.5}])
def test_layers_cannot_be_skipped_backwards(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="skip_"):
        Layers.model_validate(values)
    assert Layers.model_validate({"skip_first": 2, "skip_last": 0.5}).skip_first == 2


def test_seeds_and_purposes_draw_differently() -> None:
    located = upcycle.locate(zoo.mlp(), INPUTS)
    conversion = upcycle.convert(zoo.mlp(), Recipe.model_validate(COPIES), INPUTS, located=located)
    (spec,) = conversion.plan.specs
    draws = {tuple(torch.rand(2, generator=spec.generator(p)).tolist()) for p in ("a", "b", "ba")}
    assert len(draws) == 3
    again = [torch.rand(2, generator=spec.generator("a")) for _ in range(2)]
    assert torch.equal(*again)
