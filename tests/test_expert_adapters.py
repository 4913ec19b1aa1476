"""Experts of a task, in a file of their own, and many of them served beside one model.

Shape suffixes: T tokens, K chosen experts, E experts.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import native_moes
import numpy as np
import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.cli.main import main
from upcycle.errors import UsageError
from upcycle.operations.adapters import adapters, remap_table
from upcycle.operations.esft import choose
from upcycle.operations.expert_adapter import ExpertAdapter
from upcycle.routing.contract import routed_layers
from upcycle.routing.trace import Trace

EPS = torch.finfo(torch.float32).eps
ROUNDING = 30 * 8 * EPS  # as in test_routing.py
TOKENS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["ours", *native_moes.FAMILIES])
def model(request: pytest.FixtureRequest) -> Any:
    return ours() if request.param == "ours" else native_moes.native(request.param)


def ours() -> Any:
    sets = ("experts.count=8", "verify.max_relative_error=99", "router.std=1")
    dense = small_models.build("llama")
    return upcycle.convert(dense, "drop-upcycling", overrides=sets).model.eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens).logits
    return found


def traced(model: Any) -> Trace:
    with upcycle.trace(model) as seen:
        logits(model)
    return seen.result()


@torch.no_grad()
def tuned(model: Any, seed: int, count: int = 3) -> ExpertAdapter:
    """An adapter for `count` experts of each layer, as training might have left it."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        layer.path: torch.randperm(layer.num_experts, generator=generator)[:count].tolist()
        for layer in routed_layers(model)
    }
    adapter = ExpertAdapter.taken(model, chosen)
    for rows in adapter.parameters():
        rows += rows.abs().mean() * torch.randn(rows.shape, generator=generator)
    return adapter


def merged(model: Any, adapter: ExpertAdapter) -> Any:
    other = copy.deepcopy(model)
    adapter.apply_to(other)
    return other


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


# Serving


def test_in_a_mixed_batch_each_sequence_has_its_own_model(model: Any) -> None:
    one, two = tuned(model, 1), tuned(model, 2, count=2)
    base = logits(model)
    with adapters(model, [one, two], adapter_ids=[1, -1, 0]):
        found = logits(model)
    for row, expected in ((0, merged(model, two)), (1, model), (2, merged(model, one))):
        assert_close(found[row], logits(expected)[row])
    assert (found - base)[[0, 2]].abs().max() > 1e3 * ROUNDING * base.abs().max()
    assert torch.equal(logits(model), base), "nothing is left of it"


def test_without_an_adapter_in_the_batch_nothing_changes_bit_for_bit() -> None:
    model = native_moes.native("Mixtral")
    base = logits(model)
    with adapters(model, [tuned(model, 1)], adapter_ids=[-1]) as serving:
        assert torch.equal(logits(model), base)
        serving.adapter_ids = [-1, 0, -1]
        found = logits(model)
    assert not torch.equal(found[1], base[1])
    # Beside others, sums are taken in other blocks.
    assert_close(found[[0, 2]], base[[0, 2]])


def test_untrained_experts_change_nothing(model: Any) -> None:
    chosen = {layer.path: [0, 2, 5] for layer in routed_layers(model)}
    with adapters(model, [ExpertAdapter.taken(model, chosen)]):
        assert_close(logits(model), logits(model))


def test_it_works_while_text_is_generated() -> None:
    model = native_moes.native("Qwen3Moe")
    adapter = tuned(model, 1)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with adapters(model, [adapter], adapter_ids=[0, -1, 0]):
        found = model.generate(TOKENS, **options)
    own = merged(model, adapter).generate(TOKENS, **options)
    base = model.generate(TOKENS, **options)
    assert torch.equal(found[[0, 2]], own[[0, 2]])
    assert torch.equal(found[1], base[1])


def test_the_places_of_the_paper() -> None:
    """Figure 4: 64 experts, then the 8 of one adapter and the 5 of another."""
    layer = replace(routed_layers(native_moes.native("Mixtral"))[0], num_experts=64)
    first, second = (2, 9, 17, 23, 38, 41, 50, 63), (6, 22, 40, 47, 59)
    of = {layer.path: 64}
    loaded = [ExpertAdapter({layer.path: chosen}, of, {}) for chosen in (first, second)]
    table = remap_table(layer, loaded)

    def places(adapter: int, chosen: list[int]) -> list[int]:
        place_K = table[adapter, chosen]
        return torch.where(place_K < 0, torch.tensor(chosen), 64 + place_K).tolist()

    assert places(0, [31, 13, 62, 12, 34, 9]) == [31, 13, 62, 12, 34, 65]
    assert places(1, [22, 31, 40, 59, 15, 6]) == [73, 31, 74, 76, 15, 72]
    assert places(-1, [22, 31, 40, 9, 15, 6]) == [22, 31, 40, 9, 15, 6]


@pytest.mark.parametrize("ids", [[0], [0, 0, 0], [-1, 2, 0], [0, 1], []])
def test_ids_that_do_not_fit_the_batch_are_refused(ids: list[int]) -> None:
    model = native_moes.native("Mixtral")
    with adapters(model, [tuned(model, 1), tuned(model, 2)], adapter_ids=ids) as serving:
        if ids in ([0], [0, 0, 0]):
            logits(model)
        else:
            tokens = TOKENS if len(ids) == 3 or not ids else TOKENS[:, :9]
            with pytest.raises(UsageError, match="adapter_ids"):
                logits(model, tokens)
        serving.adapter_ids = [1, -1, 0]
        logits(model)


def test_an_adapter_of_another_model_is_refused() -> None:
    adapter = tuned(native_moes.native("Mixtral"), 1)
    other = native_moes.native("Qwen3Moe", num_hidden_layers=2, moe_intermediate_size=24)
    with pytest.raises(UsageError, match="another model"), adapters(other, [adapter]):
        pass
    with pytest.raises(UsageError, match="there is none"), adapters(other, []):
        pass


# Training


def test_training_an_adapter_moves_its_experts_alone(model: Any) -> None:
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    experts = {one.path: one.experts for one in choose(traced(model), 0.5)}
    adapter = ExpertAdapter.taken(model, experts)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    with adapters(model, [adapter]):
        for _ in range(4):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    # What was trained is what is served, and what is merged.
    with adapters(model, [adapter]):
        served = logits(model)
    assert_close(served, logits(merged(model, adapter)))


# Which experts


def one_layer(*index: int, weights: tuple[float, ...] = (), experts: int = 4) -> Trace:
    index_T1 = np.array(index, dtype=np.int32)[:, None]
    weights_T1 = np.array(weights or [1.0] * len(index), dtype=np.float32)[:, None]
    tokens = (np.arange(len(index)),)
    return Trace(("mlp",), (experts,), (index_T1,), (weights_T1,), tokens, tokens)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.2, (2,)), (0.5, (2,)), (0.51, (2, 0)), (0.8, (2, 0)), (0.81, (2, 0, 3)), (1, (2, 0, 3))],
)
def test_the_fewest_experts_with_that_share(p: float, expected: tuple[int, ...]) -> None:
    trace = one_layer(2, 0, 2, 2, 0, 2, 0, 2, 3, 3)  # 5, 3 and 2 of 10
    (found,) = choose(trace, p)
    assert found.experts == expected
    assert found.share >= p - 1e-9
    assert choose(trace, 1.0)[0].share == 1


def test_by_gate_the_weights_count() -> None:
    trace = one_layer(0, 0, 0, 1, weights=(0.1, 0.1, 0.1, 0.9))
    assert choose(trace, 0.7)[0].experts == (0,)
    assert choose(trace, 0.7, by="gate")[0].experts == (1,)


@pytest.mark.parametrize("p", [0, -1, 1.1])
def test_a_share_is_above_zero_and_up_to_one(p: float) -> None:
    with pytest.raises(UsageError, match=f"p: {p} is no share"):
        choose(one_layer(1), p)


# Files


def test_a_file_has_these_experts_alone(tmp_path: Path) -> None:
    model = native_moes.native("Mixtral")
    adapter = tuned(model, 1)
    adapter.save(tmp_path / "a.safetensors")
    again = ExpertAdapter.load(tmp_path / "a.safetensors")
    assert again.experts == adapter.experts
    ours, theirs = dict(again.named_parameters()), dict(adapter.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    held = load_file(tmp_path / "a.safetensors")
    assert {len(rows) for rows in held.values()} == {3}
    layers = routed_layers(model)
    whole = sum(stack.numel() for layer in layers for stack in layer.experts.parameters())
    assert sum(rows.numel() for rows in held.values()) == whole * 3 // layers[0].num_experts


@pytest.mark.parametrize(
    "header",
    [
        None,
        "no json",
        '{"form": 1}',
        '{"form": 1, "experts": {"mlp": [0, 9]}, "of": {"mlp": 4}}',
        '{"form": 1, "experts": {"mlp": [1, 1]}, "of": {"mlp": 4}}',
        '{"form": 1, "experts": {"mlp": [0]}, "of": {"mlp": 4}}',
        '{"form": 1, "experts": {}, "of": {}}',
    ],
)
def test_a_file_that_is_no_adapter_is_refused(header: str | None, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    metadata = None if header is None else {"upcycle": header}
    save_file({"mlp.experts.down_proj": torch.zeros(2, 3, 3)}, file, metadata=metadata)
    with pytest.raises(UsageError, match=r"bad\.safetensors: no adapter of `upcycle esft`"):
        ExpertAdapter.load(file)
    with pytest.raises(UsageError, match="no adapter"):
        ExpertAdapter.load(tmp_path / "none.safetensors")


# The command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_road_of_a_user(tmp_path: Path) -> None:
    model = native_moes.native("Mixtral")
    model.save_pretrained(tmp_path / "moe")
    small_models.tokenizer().save_pretrained(tmp_path / "moe")
    text = tmp_path / "law.txt"
    text.write_text("The court held that the contract was void. " * 200)
    file = tmp_path / "law.safetensors"
    made = run("esft", tmp_path / "moe", "--data", text, "--p", "0.4", "--out", file, "--json")
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert set(data["experts"]) == {layer.path for layer in routed_layers(model)}
    assert all(share >= 0.4 for share in data["shares"].values())
    assert 0 < data["of_the_model"] < 1
    again = run("esft", tmp_path / "moe", "--like", file, "--out", tmp_path / "b.safetensors")
    assert again.exit_code == 0, again.output
    ours, theirs = load_file(tmp_path / "b.safetensors"), load_file(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    refused = run("esft", tmp_path / "moe", "--out", file)
    assert refused.exit_code == 2
    assert "it exists" in refused.stderr
    prompts = ("--prompt", "The court", "--prompt", "The court", "--max-new-tokens", 4, "--json")
    plain = run("generate", tmp_path / "moe", *prompts)
    served = run("generate", tmp_path / "moe", *prompts, "--adapter", file, "--adapter", "base")
    assert served.exit_code == 0, served.output
    assert json.loads(served.stdout) == json.loads(plain.stdout), "it is not trained yet"
    many = run("generate", tmp_path / "moe", *prompts, *["--adapter", file] * 3)
    assert many.exit_code == 2
    assert "3 of them for 2 prompts" in many.stderr
