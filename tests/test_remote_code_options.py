"""What transformers may ask of a converted model: how its experts run, and its routers' logits."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import remote_models
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from upcycle.conversion.api import convert
from upcycle.layers.experts import Experts
from upcycle.util.quiet import quiet_transformers

t: Any = transformers

IDS = torch.arange(3, 13).reshape(2, 5)
EPS = torch.finfo(torch.float32).eps
ULPS = 4 * (4 * 32 + 32 + 64) + 32  # as in test_remote_code_models.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("options") / "moe"
    convert(remote_models.build("gpt2"), "sparse-upcycling", verify=False).save(out, verify=False)
    return out


def opened(directory: Path, **options: Any) -> Any:
    with quiet_transformers():
        return t.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.double()
    return found


@pytest.mark.parametrize("name", ["upcycle", "eager", "grouped_mm", "batched_mm"])
def test_a_way_to_run_the_experts_is_asked_for_on_loading(name: str, folder: Path) -> None:
    model, reference = opened(folder, experts_implementation=name), opened(folder)
    assert model.config._experts_implementation == name
    expected = logits(reference)
    assert (logits(model) - expected).abs().max() <= ULPS * EPS * expected.abs().max()


def test_the_default_is_the_kernels_of_upcycle(folder: Path) -> None:
    assert opened(folder).get_experts_implementation() == {"": "upcycle"}


def test_the_function_that_was_asked_for_is_the_one_that_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that transformers does not know, and after a change on the model."""
    ran = []

    def noted(experts: Any, *given: torch.Tensor) -> torch.Tensor:
        ran.append(type(experts))
        return batched_mm_experts_forward(experts, *given)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "noted", noted)
    model = opened(folder)
    expected = logits(model)
    assert not ran
    model.set_experts_implementation("noted")
    assert (logits(model) - expected).abs().max() <= ULPS * EPS * expected.abs().max()
    assert ran == [Experts, Experts]


@pytest.mark.parametrize("name", ["sonicmoe", "deepgemm", "deepgemm_megamoe", "nonsense"])
def test_what_may_compute_another_function_is_refused(name: str, folder: Path) -> None:
    message = f'experts_implementation="{name}": it is not known to compute what these experts'
    with pytest.raises(ValueError, match=message):
        opened(folder, experts_implementation=name)
    with pytest.raises(ValueError, match=message):
        opened(folder).get_correct_experts_implementation(name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_runs_in_every_dtype(dtype: torch.dtype, folder: Path) -> None:
    model, slow = opened(folder, dtype=dtype), opened(folder, experts_implementation="eager")
    expected = logits(slow.to(dtype))
    eps = torch.finfo(dtype).eps
    assert (logits(model) - expected).abs().max() <= ULPS * eps * expected.abs().max()


def test_router_logits_are_returned_when_asked_for(folder: Path) -> None:
    model = opened(folder)
    assert "router_logits" not in model(IDS)
    out = model(IDS, output_router_logits=True)
    layers = model.config.upcycle["sites"]
    assert len(out.router_logits) == len(layers) == 2
    count = layers[0]["layer"]["num_experts"]
    assert all(found.shape == (IDS.numel(), count) for found in out.router_logits)
    weight = model.transformer.h[0].mlp.router.weight
    assert torch.equal(out.logits, model(IDS).logits)
    out.aux_loss.backward()
    assert weight.grad.abs().sum() > 0


def test_the_balance_of_the_routers_joins_the_loss(folder: Path) -> None:
    model = opened(folder, output_router_logits=True, router_aux_loss_coef=0.5)
    out = model(IDS, labels=IDS)
    plain = model(IDS, labels=IDS, output_router_logits=False)
    assert "aux_loss" not in plain
    assert torch.allclose(out.loss, plain.loss + 0.5 * out.aux_loss, rtol=4 * EPS, atol=0)


def test_even_routers_have_the_least_loss_and_it_is_top_k(folder: Path) -> None:
    """With equal logits every probability is 1 / E, and K of the E experts are visited."""
    model = opened(folder)
    sites = model.config.upcycle["sites"]
    for block in model.transformer.h:
        block.mlp.router.weight.data.zero_()
    out = model(IDS, output_router_logits=True)
    assert out.aux_loss.item() == pytest.approx(sites[0]["layer"]["router"]["select"]["k"])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointing_does_not_count_a_router_twice(folder: Path) -> None:
    model = opened(folder).train()
    model.gradient_checkpointing_enable()
    out = model(IDS, labels=IDS, output_router_logits=True)
    assert len(out.router_logits) == 2
    out.loss.backward()
    assert len(out.router_logits) == 2


def test_the_signature_of_the_dense_model_stays(folder: Path) -> None:
    """Trainers and `generate` look at it."""
    expected = inspect.signature(t.GPT2LMHeadModel.forward)
    assert inspect.signature(type(opened(folder)).forward) == expected
