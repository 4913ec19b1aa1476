"""K, the rows of a tied router, and what a router tells of itself, wherever it is asked."""

import copy
import io
from pathlib import Path
from typing import Any

import numerics
import pytest
import small_models
import torch
from torch import nn

import upcycle
from upcycle.layers.config import RouterConfig, SelectConfig
from upcycle.layers.moe import MoE
from upcycle.layers.pretrained import load_balance
from upcycle.layers.router import Router

IDS = torch.arange(24).reshape(2, 12)


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "tie_router")]


def layer(router: dict[str, Any], method: str = "contiguous") -> MoE:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    made = numerics.make_recipe({"method": method, "count": 8}, router)
    return numerics.convert(ffn, made)[2]


def test_k_is_one_number() -> None:
    made = layer({"method": "normal", "std": 1.0, "top_k": 2, "weights": "one"})
    other = layer({"method": "normal", "std": 1.0, "top_k": 5, "weights": "one"})
    x_TD = numerics.random_tokens(40, 16, torch.float32)
    few = made(x_TD[:1])
    made.router.top_k = 5
    assert made.router.config.select.k == made.config.router.select.k == 5
    with torch.no_grad():
        for some in (x_TD[:1], x_TD):  # router and experts in one call, and one after the other
            assert (made(some) - other(some)).abs().max() < 1e-5
            assert made.router(some)[2].shape[1] == 5
        assert (made(x_TD[:1]) - few).abs().max() > 1e-2
        made.router_size = 2**40  # no single call
        assert (made(x_TD[:1]) - other(x_TD[:1])).abs().max() < 1e-5


def mean_keys(made: Any) -> torch.Tensor:
    up_EGD = made.experts.up_EGD[:, : made.experts.intermediate_dim]
    mean_ED: torch.Tensor = up_EGD.sum(1) / (up_EGD != 0).any(-1).sum(-1, keepdim=True)
    return mean_ED


def trained(made: nn.Module, x: torch.Tensor, optimizer: Any) -> None:
    made.train()
    steps = optimizer([p for p in made.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        steps.zero_grad()
        made(x).square().sum().backward()
        steps.step()


TIED = {"method": "avg_key", "tied": True, "top_k": 2, "weights": "one"}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("way", ["eval", "saved", "forward", "compiled"])
def test_tied_rows_are_fresh_after_the_last_step(way: str, optimizer: Any) -> None:
    made = layer(TIED)
    x_TD = numerics.random_tokens(40, 16, torch.float32)
    run: Any = torch.compile(made, backend="eager") if way == "compiled" else made
    trained(run, x_TD, optimizer)
    if way == "forward":  # no `eval` of the layer itself
        made.training = made.router.training = False
        made(x_TD[:2])
        rows_ED = made.router.weight
    elif way == "saved":
        rows_ED = made.state_dict()["router.weight"]
    else:
        run.eval()
        made.eval()
        rows_ED = made.router.weight
    assert (rows_ED - mean_keys(made)).abs().max() < 1e-5
    torch.compiler.reset()


def test_rows_that_were_given_are_kept() -> None:
    """Those of a file, whose experts may be rounded."""
    made = layer(TIED)
    with torch.no_grad():
        made.router.weight += 0.5
    given_ED = made.router.weight.clone()
    made.train().eval()
    made(numerics.random_tokens(9, 16, torch.float32))
    assert torch.equal(made.state_dict()["router.weight"], given_ED)
    copied = copy.deepcopy(made)
    assert torch.equal(copied.router.weight, given_ED)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).router.weight, given_ED)


def test_the_files_of_a_trained_model_have_fresh_rows(tmp_path: Path) -> None:
    recipe = numerics.make_recipe(
        {"method": "contiguous", "count": 8}, TIED, verify={"max_relative_error": 9.0}
    )
    done = upcycle.convert(small_models.build("bert"), recipe)
    model = done.model.train()
    steps = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(input_ids=IDS, labels=IDS).loss.backward()
    steps.step()
    done.save(tmp_path / "ours", targets=["safetensors"])
    loaded = layers_of(upcycle.load(tmp_path / "ours"))
    assert loaded
    for made in loaded:
        assert (made.router.weight - mean_keys(made)).abs().max() < 1e-6


def test_routers_tell_the_scores_of_null_experts() -> None:
    router = {"method": "normal", "std": 1.0, "select": "null", "nulls": 8, "top_k": 3}
    made = layer({**router, "weights": "renormalised"}, method="copy")
    x_TD = numerics.random_tokens(40, 16, torch.float32)
    logits_TE, weights_TK, index_TK = made.router(x_TD)
    assert logits_TE.shape == (40, 16)
    assert torch.equal(logits_TE[:, 8:], logits_TE[:, :8])  # rows of nulls are copies
    assert torch.equal(made.router.selection_scores(logits_TE), logits_TE)
    with torch.no_grad():
        made.router.weight[8:] *= 3
    logits_TE, weights_TK, index_TK = made.router(x_TD)
    # By its definition (AdaMoE): nulls share their visits.
    best_TE = torch.zeros(40, 16).scatter(1, logits_TE.topk(3, dim=-1).indices, 1.0)
    f_E = best_TE.mean(0)
    f_E[8:] = f_E[8:].mean()
    expected = 16 * (f_E * logits_TE.softmax(-1).mean(0)).sum()
    found = load_balance(made.router.config, logits_TE, weights_TK, index_TK)
    assert f_E[8:].sum() > 0.5
    assert abs(found - expected) < 1e-5


def test_routers_tell_what_the_selection_used() -> None:
    select = SelectConfig(rule="top_k", k=2)
    config = RouterConfig(
        kind="linear", num_experts=6, d_model=16, select=select, weights="one", scale=1.0,
        balance=True,
    )  # fmt: skip
    router = Router(config).eval()
    nn.init.normal_(router.weight)
    router.selection_bias[3] = 1.0
    logits_TE, _, index_TK = router(numerics.random_tokens(40, 16, torch.float32))
    best_TK = router.selection_scores(logits_TE).topk(2, dim=-1).indices
    assert torch.equal(index_TK, best_TK)
    assert not torch.equal(index_TK, logits_TE.topk(2, dim=-1).indices)


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "adamoe"])
def test_the_balance_loss_is_there_in_memory_as_from_disk(recipe: str, tmp_path: Path) -> None:
    dense = small_models.build("bert")
    done = upcycle.convert(dense, recipe)
    done.save(tmp_path / "out", targets=["safetensors"])
    loaded = upcycle.load(tmp_path / "out")
    batch = {"input_ids": IDS, "labels": IDS}
    plain = done.model(**batch)
    assert "aux_loss" not in plain
    out = done.model(**batch, output_router_logits=True)
    again = loaded(**batch, output_router_logits=True)
    assert out.aux_loss.item() == pytest.approx(again.aux_loss.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(again.loss.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(plain.loss.item() + 0.001 * out.aux_loss.item())
    count = 16 if recipe == "adamoe" else 8
    for name in ("router_logits", "router_scores"):
        assert [tuple(t.shape) for t in out[name]] == [(24, count)] * 2
        for mine, theirs in zip(out[name], again[name], strict=True):
            assert (mine - theirs).abs().max() < 1e-4
    assert dense(**batch).loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)


def test_in_memory_it_survives_errors_copies_and_pickles() -> None:
    done = upcycle.convert(small_models.build("bert"), "sparse-upcycling")
    with pytest.raises(ValueError, match=r"exactly one|have to specify"):
        done.model(output_router_logits=True)
    assert not any(m.router._forward_hooks for m in layers_of(done.model))
    file = io.BytesIO()
    torch.save(done.model, file)
    file.seek(0)
    for other in (copy.deepcopy(done.model), torch.load(file, weights_only=False)):
        assert len(other(input_ids=IDS, output_router_logits=True).router_logits) == 2
        other.config.output_router_logits = True
        assert "aux_loss" in other(input_ids=IDS)
    assert "aux_loss" not in done.model(input_ids=IDS)
