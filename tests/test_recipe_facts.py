"""What the list of recipes says of them is what they do."""

import pytest

from upcycle.cli.recipe_facts import GOALS, recipe_facts
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.shipped import recipe_names


@pytest.mark.parametrize(
    ("name", "overrides", "promise", "active", "needs"),
    [
        ("sparse-upcycling", [], "exact", "2x", "nothing but the model"),
        ("granular", [], "exact", "1x", "nothing but the model"),
        ("factorllm", [], "exact with all experts", "0.5x", "nothing but the model"),
        ("split-all", [], "exact", "1x", "nothing but the model"),
        ("harder-tasks", [], "exact", "at most 16x", "nothing but the model"),
        ("dynmole", [], "exact", "at most 6x", "nothing but the model"),
        ("adamoe", [], "approximate", "at most 3x", "nothing but the model"),
        ("factorllm", ["router.method=ridge"], "exact with all experts", "0.5x", "activations"),
        ("factorllm", ["compensate.mean=true"], "approximate", "0.5x", "activations"),
        (
            "factorllm",
            ["experts.shared=1", "router.top_k=1"],
            "exact with all experts",
            "0.5x",
            "nothing",
        ),
        (
            "factorllm",
            ["experts.shared=1", "router.top_k=1", "experts.shared_by=importance"],
            "exact with all experts",
            "0.5x",
            "gradients",
        ),
    ],
)
def test_facts(name: str, overrides: list[str], promise: str, active: str, needs: str) -> None:
    found = recipe_facts(load_recipe(name, overrides)).text().split("; ")
    assert found[:2] == [promise, f"{active} the FFN compute per token"]
    assert found[3].startswith(f"needs {needs}")


def test_it_is_one_line() -> None:
    assert recipe_facts(load_recipe("granular")).text() == (
        "exact; 1x the FFN compute per token; 4.0x parameters; needs nothing but the model"
    )


def test_the_goal_follows_from_the_method() -> None:
    goals = {name: recipe_facts(load_recipe(name)).goal for name in recipe_names()}
    assert goals["sparse-upcycling"] == goals["granular"] == goals["residual-moe"] == "train"
    assert goals["upcycle"] == goals["emoe"] == goals["moebert"] == "faster"
    assert [name for name, goal in goals.items() if goal == "check"] == ["split-all"]
    merging = {name for name, goal in goals.items() if goal == "merge"}
    assert merging == {"btx", "clip-moe", "uni-moe", "medplib"}
    assert set(goals.values()) == set(GOALS)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_has_facts(name: str) -> None:
    assert recipe_facts(load_recipe(name)).parameters >= 1
