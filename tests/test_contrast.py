"""Decoding by the contrast with other experts."""

import math
from typing import Any

import native_moes
import pytest
import small_models
import torch

import upcycle
from upcycle.errors import UnsupportedError, UsageError
from upcycle.operations.contrast import SelfContrast

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[0, :3] = 0  # the first text is shorter
INPUTS = {"input_ids": TOKENS, "attention_mask": MASK}
NEW = 8


def converted(recipe: str, *sets: str) -> Any:
    sets = ("experts.count=4", "verify.max_relative_error=99", *sets)
    return upcycle.convert(small_models.build("llama"), recipe, overrides=sets).model.eval()


@pytest.fixture(scope="module", params=["ours", "native"])
def model(request: pytest.FixtureRequest) -> Any:
    """Experts that differ."""
    if request.param == "ours":
        return converted("drop-upcycling", "router.std=1")
    return native_moes.native("Mixtral")


def text(model: Any, *contrast: SelfContrast, **more: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    found: torch.Tensor = model.generate(
        **INPUTS, logits_processor=list(contrast), **{**options, **more}
    )
    return found


@pytest.mark.parametrize("options", [{"ranks": (1, 2)}, {"alpha": 1.0}, {"beta": 0.0}])
def test_without_a_contrast_it_is_greedy(model: Any, options: dict[str, Any]) -> None:
    assert torch.equal(text(model, SelfContrast(model, INPUTS, **options)), text(model))


def test_equal_experts_have_no_contrast() -> None:
    model = converted("sparse-upcycling")
    assert torch.equal(text(model, SelfContrast(model, INPUTS, beta=0.9)), text(model))


def test_other_experts_have_one(model: Any) -> None:
    assert not torch.equal(text(model, SelfContrast(model, INPUTS, beta=0.9)), text(model))


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_two_caches_are_two_whole_passes(model: Any, row: int) -> None:
    """Of each text by itself, without its padding, and computed anew for every token."""
    found = text(model, SelfContrast(model, INPUTS, beta=0.5))[row]
    tokens = TOKENS[row : row + 1, MASK[row].bool()]
    for _ in range(NEW):
        strong = model(input_ids=tokens).logits[:, -1]
        with upcycle.override(model, ranks=[2]):
            weak = model(input_ids=tokens).logits[:, -1]
        contrast = 1.5 * strong - 0.5 * weak
        contrast[strong.softmax(-1) < 0.1 * strong.softmax(-1).max()] = -math.inf
        contrast[:, model.generation_config.eos_token_id or 2] = -math.inf  # min_new_tokens
        tokens = torch.cat([tokens, contrast.argmax(-1, keepdim=True)], 1)
    assert found[MASK.shape[1] :].tolist() == tokens[0, -NEW:].tolist()


def test_samples_are_drawn_from_the_contrast(model: Any) -> None:
    """The same seed draws the same, and a temperature of nearly nothing is greedy."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(text(model, SelfContrast(model, INPUTS), do_sample=True))
    assert torch.equal(*drawn)
    cold = text(model, SelfContrast(model, INPUTS), do_sample=True, temperature=1e-4)
    assert torch.equal(cold, text(model, SelfContrast(model, INPUTS)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"beta": -1.0}, "beta: -1.0"),
        ({"beta": math.inf}, "beta: inf"),
        ({"ranks": (9,)}, "ranks: 9: "),
    ],
)
def test_wrong_numbers_are_refused(model: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SelfContrast(model, **options)


def test_what_it_cannot_decode_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="no MoE layer"):
        SelfContrast(small_models.build("llama"))
    with pytest.raises(UnsupportedError, match="no decoder that generates"):
        SelfContrast(small_models.build("t5"))
    used = SelfContrast(model, INPUTS)
    text(model, used)
    with pytest.raises(UsageError, match="one call of generate"):
        text(model, used)
    with pytest.raises(UsageError, match="beams"):
        text(model, SelfContrast(model, INPUTS), num_beams=2)
