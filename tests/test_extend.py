"""One more expert: nothing changes until its bias is raised."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from onnx_case import moe

import upcycle
from upcycle.passes.extend import set_new_bias

TOKENS = torch.arange(60).reshape(3, 20)
BATCHES = [{"input_ids": TOKENS}]


def mixture(name: str = "llama", *overrides: str) -> Any:
    """A converted model whose experts differ from each other."""
    done = upcycle.convert(
        small_models.build(name),
        "drop-upcycling",
        verify=False,
        overrides=["experts.count=4", "router.std=1", *overrides],
    )
    return done.model.eval()


def logits(model: Any) -> torch.Tensor:
    """One expert after the other: with more experts the other kernels may round otherwise."""
    for module in model.modules():
        if hasattr(module, "eager_forward"):
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=TOKENS).logits
    return out


def layers_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, upcycle.MoE)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_nothing_changes_until_the_bias_is_raised(name: str, top_k: int) -> None:
    model = mixture(name, f"router.top_k={top_k}")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    extended = upcycle.extend(model, BATCHES)
    assert torch.equal(logits(extended), logits(model))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert torch.equal(extended.state_dict()[key][: len(tensor)], tensor)
    set_new_bias(extended, 0.0)
    for layer in layers_of(extended):
        layer.router.bias.data[-1] = 3.0
    assert (logits(extended) - logits(model)).abs().max() > 1e-3


def test_the_new_expert_is_a_copy_of_the_most_visited_one() -> None:
    model = mixture()
    seen: list[torch.Tensor] = []
    layer = layers_of(model)[1]
    handle = layer.router.register_forward_hook(lambda *args: seen.append(args[2][2]))
    logits(model)
    handle.remove()
    most = int(torch.bincount(seen[0].flatten(), minlength=4).argmax())
    extended = layers_of(upcycle.extend(model, BATCHES))[1]
    assert torch.equal(extended.experts.down_proj[4], layer.experts.down_proj[most])
    assert torch.equal(extended.experts.up_EGD[4], layer.experts.up_EGD[most])
    assert torch.equal(extended.router.weight[4], layer.router.weight[most])
    assert extended.router.bias.tolist() == [0, 0, 0, 0, -math.inf]


def test_a_tied_copy_without_the_bias_is_another_model() -> None:
    """Where the copied expert is the best one, both copies are chosen: what the bias is for."""
    model = mixture()
    assert (logits(upcycle.extend(model, BATCHES, bias=0.0)) - logits(model)).abs().max() > 1e-3


def test_it_trains_from_a_finite_bias() -> None:
    extended = upcycle.extend(mixture(), BATCHES).train()
    for bias in (-math.inf, -1.0):
        set_new_bias(extended, bias)
        extended.zero_grad()
        extended(input_ids=TOKENS, labels=TOKENS).loss.backward()
        experts = [layer.experts.down_proj.grad[4].abs().max() for layer in layers_of(extended)]
        assert all(
            torch.isfinite(p.grad).all() for p in extended.parameters() if p.grad is not None
        )
        assert any(g > 0 for g in experts) == (bias == -1.0)


def test_a_written_model_is_extended_and_written_again(tmp_path: Path) -> None:
    done = upcycle.convert(
        small_models.build("bert"), "drop-upcycling", overrides=["experts.count=4"]
    )
    done.save(tmp_path / "moe")
    loaded: Any = upcycle.load(tmp_path / "moe")
    one = "bert.encoder.layer.1.output.dense"
    extended = upcycle.extend(loaded, BATCHES, layers=[one])
    extended.save_pretrained(tmp_path / "extended")
    again = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "extended", trust_remote_code=True
    ).eval()
    assert again.get_submodule(one).experts.down_proj.shape[0] == 5
    assert again.get_submodule(one.replace("1", "0")).experts.down_proj.shape[0] == 4
    assert torch.equal(logits(again), logits(loaded))
    set_new_bias(again, 0.5)
    biases = [m.router.bias for m in again.modules() if type(m).__name__ == "TappedMoE"]
    assert [b is None or b.tolist() for b in biases] == [True, [0, 0, 0, 0, 0.5]]


@pytest.mark.usefixtures("own_kernels")
def test_layers_of_a_file_that_an_earlier_version_wrote() -> None:
    """Their configuration is plain data, and their code reads it as such."""
    path = Path(__file__).parent / "written_before/self_contained/modeling_upcycle.py"
    spec: Any = importlib.util.spec_from_file_location("written_before_modeling", path)
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    file.ROUTERS["linear"] = file.Router
    written = moe("relu", seed=1)
    layer = file.MoE(written.config.to_json())
    layer.load_state_dict(written.state_dict())
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(layer).eval()
    extended = upcycle.extend(model, [(x,)])
    with torch.no_grad():
        # The same sums of at most 32 products below 2, by another kernel: 2 * 32 * 2^-24 * 2.
        torch.testing.assert_close(extended(x), model(x), rtol=0, atol=1e-5)
        set_new_bias(extended, 9.0)
        assert (extended(x) - model(x)).abs().max() > 1e-3
    assert extended[0].config["router"] == extended[0].router.config
    assert extended[0].config["router"]["extended"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": []}, "UsageError", "there are no data"),
        ({"layers": ["lm_head"]}, "UsageError", "lm_head: no MoE layer of upcycle"),
    ],
)
def test_what_cannot_be_extended_is_said(options: Any, error: str, words: str) -> None:
    with pytest.raises(getattr(upcycle, error), match=words):
        upcycle.extend(mixture(), **{"batches": BATCHES, **options})


def test_other_models_and_routers_are_refused() -> None:
    with pytest.raises(upcycle.UsageError, match="the model: no MoE layer of upcycle"):
        upcycle.extend(small_models.build("llama"), BATCHES)
    balanced = mixture("llama", "router.balance=true")
    with pytest.raises(upcycle.UnsupportedError, match=r"layers\.0\.mlp: only a layer that takes"):
        upcycle.extend(balanced, BATCHES)
