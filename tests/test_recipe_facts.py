"""What the list of recipes says of them is what they do."""

import pytest

from upcycle.cli.recipe_facts import recipe_facts
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.shipped import recipe_names


@pytest.mark.parametrize(
    ("name", "overrides", "promise", "active", "needs"),
    [
        ("sparse-upcycling", [], "exact", "200%", "nothing but the model"),
        ("granular", [], "exact", "100%", "nothing but the model"),
        ("factorllm", [], "exact when K = N", "50%", "nothing but the model"),
        ("split-all", [], "exact", "100%", "nothing but the model"),
        ("harder-tasks", [], "exact", "at most 1600%", "nothing but the model"),
        ("dynmole", [], "exact", "at most 600%", "nothing but the model"),
        ("adamoe", [], "approximate", "at most 300%", "nothing but the model"),
        ("factorllm", ["router.method=ridge"], "exact when K = N", "50%", "activations"),
        ("factorllm", ["compensate.mean=true"], "approximate", "50%", "activations"),
        ("factorllm", ["experts.shared=1", "router.top_k=1"], "exact when K = N", "50%", "nothing"),
        (
            "factorllm",
            ["experts.shared=1", "router.top_k=1", "experts.shared_by=importance"],
            "exact when K = N",
            "50%",
            "gradients",
        ),
    ],
)
def test_facts(name: str, overrides: list[str], promise: str, active: str, needs: str) -> None:
    found = recipe_facts(load_recipe(name, overrides)).split("; ")
    assert found[:2] == [promise, f"a token meets {active} of the FFN"]
    assert found[2].startswith(f"needs {needs}")


def test_it_is_one_line() -> None:
    assert recipe_facts(load_recipe("granular")) == (
        "exact; a token meets 100% of the FFN; needs nothing but the model"
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_has_facts(name: str) -> None:
    assert recipe_facts(load_recipe(name))
