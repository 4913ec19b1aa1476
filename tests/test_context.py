"""Routers that look at ids: they get those of the tokens, however the model is called."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numerics
import pytest
import small_models
import torch
from torch import nn

from upcycle.conversion.api import Conversion, convert
from upcycle.errors import UnsupportedError
from upcycle.layers.moe import MoE
from upcycle.layers.token_context import TokenContext, domains

SPLIT: dict[str, object] = {"method": "contiguous", "count": 4}
IDS = torch.arange(3, 23).reshape(2, 10)


def converted(name: str, *, top_k: int = 1, layers: Any = None, **router: object) -> Conversion:
    """Splits: a wrong expert shows."""
    routing = {"method": "hash", "entries": 300, "top_k": top_k, "weights": "one", **router}
    recipe = numerics.make_recipe(SPLIT, routing, **({"layers": layers} if layers else {}))
    return convert(small_models.build(name), recipe, verify=False)


def layers_of(model: nn.Module) -> list[MoE]:
    return [m for m in model.modules() if isinstance(m, MoE)]


def visited(model: nn.Module, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the model, and which expert each token visits in the last layer."""
    seen: list[torch.Tensor] = []
    router = layers_of(model)[-1].router
    handle = router.register_forward_hook(lambda _, args, out: seen.append(out[2][:, 0]))
    with torch.no_grad():
        logits = model(**inputs)[0]
    handle.remove()
    return logits, seen[-1]


def test_a_token_visits_the_expert_of_its_id() -> None:
    model = converted("llama").model
    _, expert_T = visited(model, input_ids=IDS)
    for layer in layers_of(model):
        assert layer.router.expert.shape == (300, 1)
    assert torch.equal(expert_T, layers_of(model)[-1].router.expert[IDS.flatten(), 0])
    large = IDS.clone()
    model.get_submodule("model").embed_tokens = nn.Embedding(900, 32)
    large[0, 0] += 300  # an id beyond the table starts over
    assert torch.equal(visited(model, input_ids=large)[1], expert_T)


def test_positions_of_arguments_do_not_matter() -> None:
    model = converted("llama").model
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(input_ids=IDS).logits)


def test_generation_with_a_cache_is_generation_without() -> None:
    model = converted("llama").model
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    cached = model.generate(**prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**prompt, use_cache=False, **options))
    beams = model.generate(**prompt, num_beams=2, use_cache=True, **options)
    assert beams.shape == cached.shape


def test_an_encoder_and_a_decoder_have_their_own_ids() -> None:
    model = converted("t5").model
    expert_of = {}
    for path, module in model.named_modules():
        if isinstance(module, MoE):
            expert_of[path.split(".")[0]] = module.router
    seen: dict[str, torch.Tensor] = {}
    for side, router in expert_of.items():
        router.register_forward_hook(
            lambda _, args, out, side=side: seen.__setitem__(side, out[2][:, 0])
        )
    decoder_ids = torch.tensor([[0, 7, 9], [0, 4, 2]])
    with torch.no_grad():
        model(input_ids=IDS, decoder_input_ids=decoder_ids)
    for side, ids in (("encoder", IDS), ("decoder", decoder_ids)):
        assert torch.equal(seen[side], expert_of[side].expert[ids.flatten(), 0])
    tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 2


def test_token_types_of_bert() -> None:
    model = converted("bert", method="assigned", by="type", entries=2).model
    types = torch.tensor([[0] * 4 + [1] * 6] * 2)
    assert torch.equal(visited(model, input_ids=IDS, token_type_ids=types)[1], types.flatten())
    plain, expert_T = visited(model, input_ids=IDS)
    assert not expert_T.any()
    with torch.no_grad():
        zeros = model(input_ids=IDS, token_type_ids=torch.zeros_like(IDS)).logits
    assert torch.equal(plain, zeros)


def test_domains_are_an_argument_and_a_context() -> None:
    model = converted("llama", method="assigned", by="domain", entries=4).model
    ids = torch.tensor([2, 3])
    wanted_T = ids.repeat_interleave(10)
    logits, expert_T = visited(model, input_ids=IDS, domain_ids=ids)
    assert torch.equal(expert_T, wanted_T)
    with domains(model, ids):
        assert torch.equal(visited(model, input_ids=IDS)[0], logits)
        both = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert not torch.equal(visited(model, input_ids=IDS)[0], logits)
    with domains(model, ids[:1]):
        first = model.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(both[:1], first)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_hooks_of_their_own(how: str) -> None:
    model = converted("bert").model
    expected, _ = visited(model, input_ids=IDS)
    other = copy.deepcopy(model)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    givens = [{id(layer.router.given) for layer in layers_of(m)} for m in (model, other)]
    assert not givens[0] & givens[1]
    visited(model, input_ids=IDS + 50)
    assert torch.equal(visited(other, input_ids=IDS)[0], expected)


def test_a_compiled_model_reads_the_ids_of_each_call() -> None:
    model = converted("bert").model
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ids in (IDS, IDS + 40):
        with torch.no_grad():
            expected, got = model(input_ids=ids).logits, compiled(input_ids=ids).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # logits are about 10


def test_training_reaches_the_experts() -> None:
    model = converted("bert").model.train()
    model(input_ids=IDS).logits.square().mean().backward()
    for layer in layers_of(model):
        visits = layer.router.expert[IDS.flatten(), 0].unique()
        gradient = layer.experts.down_proj.grad
        assert gradient is not None
        assert (gradient[visits].abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("target", [("safetensors",), ("safetensors", "onnx")])
def test_written_files_are_verified(target: tuple[str, ...], tmp_path: Path) -> None:
    """Loaded through the Auto class, and run in ONNX Runtime: `save` compares both."""
    done = converted("bert", method="assigned", by="type", entries=2)
    done.save(tmp_path / "out", targets=target)
    assert len(done.report.checks) == len(target)


def test_missing_ids_are_said_in_one_sentence() -> None:
    model = converted("llama").model
    with pytest.raises(RuntimeError, match="looks at input_ids, and they were not given"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    given = TokenContext("token", None)
    given.keep(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"has 4 tokens and input_ids of shape \[1, 5\]"):
        given.of_tokens(torch.zeros(4, 2))
    layer = MoE(layers_of(model)[0].config)
    with pytest.raises(RuntimeError, match="a router by token works inside a model"):
        layer(torch.zeros(1, 32))


@pytest.mark.parametrize(("name", "by"), [("vit", "token"), ("llama", "type")])
def test_a_model_without_such_ids_is_refused(name: str, by: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"the router looks at .*_ids, and no module around"
    ) as e:
        converted(name, by=by)
    assert "\n" not in str(e.value)


def test_domains_are_refused_in_onnx(tmp_path: Path) -> None:
    done = converted("bert", method="assigned", by="domain", entries=4)
    with pytest.raises(UnsupportedError, match="its router reads domain ids, and an ONNX graph"):
        done.save(tmp_path / "out", targets=("safetensors", "onnx"))
    assert not (tmp_path / "out").exists()


def choice(name: str, **layers: object) -> Conversion:
    routing = {"method": "normal", "top_k": 1, "weights": "one", "select": "expert_choice"}
    recipe = numerics.make_recipe(SPLIT, routing, **({"layers": layers} if layers else {}))
    return convert(small_models.build(name), recipe, verify=False)


def test_expert_choice_is_for_encoders() -> None:
    for name in ("bert", "vit"):
        assert choice(name).plan.specs
    assert choice("t5", include="encoder.*").plan.specs
    for name in ("llama", "gpt2", "t5"):
        with pytest.raises(UnsupportedError, match="what a token gets depends on later tokens"):
            choice(name)


@pytest.mark.parametrize("method", ["hash", "ridge", "mlp"])
def test_decoders_do_not_look_ahead(method: str) -> None:
    """Changing the last token leaves the outputs before it."""
    more = {} if method == "hash" else {"entries": 65536}
    model = converted("llama", method=method, **more).model
    changed = IDS.clone()
    changed[:, -1] = 99
    with torch.no_grad():
        before, after = model(input_ids=IDS).logits, model(input_ids=changed).logits
    # Logits are about 10, and tokens of other experts change in which order a kernel sums.
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=0, atol=1e-4)
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-2)
