"""What the list of recipes says of them is what they do."""

import pytest

from upcycle.recipe_facts import recipe_facts, shipped_facts
from upcycle.recipe_file import load_recipe


@pytest.mark.parametrize(
    ("name", "overrides", "promise", "active", "needs"),
    [
        ("sparse-upcycling", [], "exact: it starts", "200%", "nothing but the model"),
        ("granular", [], "exact: it starts", "100%", "nothing but the model"),
        ("factorllm", [], "exact when all", "50%", "nothing but the model"),
        ("split-all", [], "exact: all experts", "100%", "nothing but the model"),
        ("factorllm", ["router.method=ridge"], "exact when all", "50%", "activations"),
        ("factorllm", ["compensate.mean=true"], "approximate: comp", "50%", "activations"),
        ("factorllm", ["experts.shared=1", "router.top_k=1"], "exact when all", "50%", "nothing"),
        (
            "factorllm",
            ["experts.shared=1", "router.top_k=1", "experts.shared_by=importance"],
            "exact when all",
            "50%",
            "gradients",
        ),
    ],
)
def test_facts(name: str, overrides: list[str], promise: str, active: str, needs: str) -> None:
    facts = recipe_facts(load_recipe(name, overrides))
    assert facts.promise.startswith(promise)
    assert facts.active == f"{active} of the FFN"
    assert facts.needs.startswith(needs)


def test_it_is_one_line() -> None:
    assert str(shipped_facts("granular")) == (
        "exact: it starts as the dense model; a token meets 100% of the FFN; needs nothing but the "
        "model"
    )
