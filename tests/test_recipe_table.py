"""docs/recipes.md says of each recipe whether it starts exact, and what trains its router."""

import re
from dataclasses import replace
from pathlib import Path

import numerics
import pytest
import torch

from upcycle.ir.ffn import Located
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.layers.moe import MoE
from upcycle.passes.plan.plan import make_plan, needs
from upcycle.passes.transform.transform import transform
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.shipped import recipe_names

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
D_MODEL, D_FF, DOMAINS = 32, 256, 16
FLOAT64 = torch.finfo(torch.float64).eps


def table() -> dict[str, tuple[str, str]]:
    """Recipe -> the last two columns of its row."""
    text = PAGE.read_text("utf-8").split("## Why they are exact")[0]
    rows = [re.split(r" *\| *", line.strip("|\n ")) for line in text.splitlines() if "|" in line]
    return {row[0].strip("`"): (row[-2], row[-1]) for row in rows if row[0].startswith("`")}


def converted(name: str) -> tuple[float, MoE, torch.Tensor]:
    """The distance of a layer from its FFN, the layer, and tokens."""
    drawn = [
        numerics.random_ffn("gelu", d_model=D_MODEL, d_ff=D_FF, d_out=D_MODEL, seed=seed)
        for seed in range(4)
    ]
    recipe = load_recipe(name)
    if recipe.experts.method == "from_checkpoints":
        count = recipe.experts.count
        sources = [f"experts.sources=[{', '.join(['base'] * count)}]"]
        recipe, ffn = load_recipe(name, sources), replace(drawn[0], sources=tuple(drawn[:count]))
    else:
        ffn = drawn[0]
    # `layers` chooses among several FFNs.
    recipe = recipe.model_copy(update={"layers": type(recipe.layers)()})
    (spec,) = make_plan(Located(ffns=(numerics.site(ffn),)), recipe).specs
    draw = torch.Generator().manual_seed(7)
    x_TD = torch.randn(2048, D_MODEL, generator=draw)
    seen = FFNInputs(
        x=x_TD.split(500),
        id_T=torch.randint(50, (2048,), generator=draw),
        domain_T=torch.arange(2048) % DOMAINS,
        importance_NF=torch.rand(DOMAINS, D_FF, generator=draw),
    )
    weights = transform(ffn, spec, seen if needs(recipe) else None)
    layer = numerics.run_layer(spec, weights)
    x_TD = x_TD[:64].double()
    layer.router.stand_in(64)
    with torch.no_grad():
        apart = (layer.tokens(x_TD) - ffn(x_TD)).abs().max() / ffn(x_TD).abs().max()
    return float(apart), layer.train(), x_TD


def gradient(layer: MoE, x_TD: torch.Tensor) -> float:
    """The largest gradient of a random loss by the router."""
    layer.zero_grad()
    torch.manual_seed(0)
    y_TO = layer(x_TD)
    (y_TO * torch.randn(y_TO.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    found = [p.grad.abs().max().item() for p in layer.router.parameters() if p.grad is not None]
    return max(found, default=0.0)


@pytest.mark.parametrize("name", recipe_names())
def test_the_table_says_what_a_recipe_does(name: str) -> None:
    apart, layer, x_TD = converted(name)
    gains = getattr(layer.router, "gain", None)
    if gains is not None:
        gains.requires_grad_(False)  # the router that chooses is meant
    first = gradient(layer, x_TD)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        for parameter in (*layer.experts.parameters(), *([] if gains is None else [gains])):
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter += (0.1 * noise).to(parameter.dtype)
    later = gradient(layer, x_TD)
    exact = "yes" if apart < 1e5 * FLOAT64 else "no"
    trained = "no" if not later else "yes" if first > 1e-3 * later else "once experts differ"
    assert table()[name] == (exact, trained)


def test_every_recipe_has_a_row() -> None:
    assert sorted(table()) == sorted(recipe_names())
