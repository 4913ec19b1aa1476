"""``torch.compile(model, backend="upcycle")`` converts the graphs that dynamo makes."""

import logging
from collections.abc import Iterator

import pytest
import small_models
import torch
import zoo_blocks
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from upcycle.errors import UsageError
from upcycle.ir.rounding import ROUNDING

EVERY = ["layers.every=1", "layers.start=1"]
COPIES = {"recipe": "sparse-upcycling", "overrides": EVERY}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No graph of another test is known to dynamo."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def converted(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name.endswith("compile_backend")]


def test_a_model_of_transformers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = small_models.build("llama").eval()
    ids = torch.randint(0, 300, (2, 7))
    compiled = torch.compile(model, backend="upcycle", options=COPIES)
    actual = compiled(input_ids=ids, use_cache=False).logits
    expected = model(input_ids=ids, use_cache=False).logits
    assert converted(caplog) == ["2 FFNs of a graph were converted"]
    error = (actual - expected).abs().max() / expected.abs().max()
    assert 0 < error <= ROUNDING[torch.float32]


def test_other_sizes_and_a_recipe_that_needs_data(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = nn.Sequential(zoo_blocks.Residual(zoo_blocks.mlp()))
    options = {
        "recipe": "moefication",
        "overrides": ["layers.skip_first=0", "experts.count=4", "router.top_k=2"],
    }
    compiled = torch.compile(model, backend="upcycle", options=options)
    for rows in (64, 3):
        x = torch.randn(rows, zoo_blocks.D)
        assert compiled(x).shape == x.shape
        assert not torch.equal(compiled(x), model(x))
    assert "1 FFNs of a graph were converted" in converted(caplog)


def test_a_graph_without_an_ffn_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x = torch.randn(4, 8)
    assert torch.equal(torch.compile(model, backend="upcycle", options=COPIES)(x), model(x))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "give a recipe"), ({"recipe": "emoe", "k": 2}, "`k` is unknown")],
)
def test_options_are_checked(options: dict[str, object], reason: str) -> None:
    compiled = torch.compile(zoo_blocks.mlp(), backend="upcycle", options=options)
    with pytest.raises(BackendCompilerFailed, match=reason):
        compiled(torch.randn(4, zoo_blocks.D))


def test_training_is_refused() -> None:
    compiled = torch.compile(zoo_blocks.mlp(), backend="upcycle", options=COPIES)
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(torch.randn(4, zoo_blocks.D))
    assert isinstance(caught.value.inner_exception, UsageError)
    assert "no gradient" in str(caught.value)
