"""Native targets: written, reloaded by transformers alone, and compared with the dense model.

The reference for distinct experts is written out here in float64 and shares no code with upcycle.
"""

import copy
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_case import refusal
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from upcycle.errors import UsageError
from upcycle.ir.ffn import FFN, Located, Projection
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import ExpertWeights, MoEWeights, gather_experts, read_ffn
from upcycle.layers.config import WeightRule
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.pointwise import Pointwise
from upcycle.recipe import schema as recipe
from upcycle.targets.files.stored import Stored
from upcycle.targets.files.tensor_file import write_tensors
from upcycle.targets.native import NATIVE
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.choose import build_config, choose, variants
from upcycle.targets.native.layers import is_swiglu, layer_of
from upcycle.targets.native.tensors import entries

SWIGLU = Pointwise(2, (("silu", ("z0",), {}), ("mul", ("t0", "z1"), {})), "swiglu")

# A sum of n products errs by at most n eps of its largest term. On the way to a logit each of the 3
# layers sums 32 products four times for attention, 32 for gate and up and 48 for down, and the head
# 32: 656 in all. Roundings partly cancel (30 to 80 were seen); a wrong expert makes over 1e4.
ULPS = 3 * (4 * 32 + 32 + 48) + 32
EPS = torch.finfo(torch.float32).eps

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # with the default 0.02 a wrong FFN would hardly show
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3-rope": lambda: LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3_ROPE)),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5, head_dim=12),
    "mistral-tied": lambda: MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "qwen3-bias": lambda: Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
    "qwen3-sliding": lambda: Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
}
TARGET_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


def dense_model(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and biases at zero, which hides mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(count: int = 24) -> torch.Tensor:
    return torch.randint(1, 97, (2, count), generator=torch.Generator().manual_seed(1))


def ffn_of(layer: int, d_model: int = 32, d_ff: int = 48) -> FFN:
    def projection(name: str, rows: int) -> Projection:
        module = f"model.layers.{layer}.mlp.{name}"
        return Projection(module, f"{module}.weight", None, False, (0, rows, 1))

    return FFN(
        path=f"model.layers.{layer}.mlp",
        kind="ffn",
        placement="module",
        expansions=(projection("gate_proj", d_ff), projection("up_proj", d_ff)),
        contraction=projection("down_proj", d_model),
        pointwise=SWIGLU,
        d_model=d_model,
        d_ff=d_ff,
        d_out=d_model,
    )


def plan_of(
    layers: range | tuple[int, ...] = range(3),
    *,
    num_experts: int = 4,
    width: int = 48,
    top_k: int = 2,
    weights: WeightRule = "renormalised",
) -> Plan:
    experts = recipe.Experts(method="copy", count=num_experts)
    router = recipe.Router(method="normal", top_k=top_k, weights=weights)
    specs = tuple(
        MoESpec(
            ffn=ffn_of(layer),
            experts=experts,
            router=router,
            compensate=recipe.Compensate(),
            shared=0,
            num_experts=num_experts,
            width=width,
            top_k=top_k,
            scale=1.0,
            promise="exact",
            seed=layer,
        )
        for layer in layers
    )
    located = Located(ffns=tuple(spec.ffn for spec in specs))
    return Plan(located, specs, recipe.Recipe(experts=experts, router=router), "test")


def changed(plan: Plan, **changes: Any) -> Plan:
    """The plan with another last spec."""
    return replace(plan, specs=(*plan.specs[:-1], replace(plan.specs[-1], **changes)))


def with_router(plan: Plan, **changes: Any) -> Plan:
    def other(spec: MoESpec) -> MoESpec:
        return replace(spec, router=spec.router.model_copy(update=changes))

    return replace(plan, specs=tuple(map(other, plan.specs)))


def with_ffn(plan: Plan, **changes: Any) -> Plan:
    return changed(plan, ffn=replace(plan.specs[-1].ffn, **changes))


def copies(spec: MoESpec, tensors: Mapping[str, torch.Tensor]) -> MoEWeights:
    dense = read_ffn(spec.ffn, tensors)
    neuron_EI = torch.arange(spec.ffn.d_ff).expand(spec.num_experts, -1)
    router_ED = torch.randn(spec.num_experts, spec.ffn.d_model, generator=spec.generator("router"))
    return MoEWeights(gather_experts(dense, neuron_EI), {"weight": router_ED}, None)


def distinct(spec: MoESpec) -> MoEWeights:
    draw = spec.generator("experts")
    e, i, d = spec.num_experts, spec.width, spec.ffn.d_model
    experts = ExpertWeights(
        up_EGD=torch.randn(e, 2 * i, d, generator=draw) * 0.3,
        up_bias_EG=None,
        down_EOI=torch.randn(e, d, i, generator=draw) * 0.3,
        neuron_EI=torch.zeros(e, i, dtype=torch.int64),
    )
    return MoEWeights(experts, {"weight": torch.randn(e, d, generator=draw)}, None)


class Reference(nn.Module):
    """A MoE layer, token by token in float64."""

    def __init__(self, weights: MoEWeights, top_k: int, renormalise: bool) -> None:
        super().__init__()
        self.router_ED = weights.router["weight"].double()
        self.up_EGD = weights.experts.up_EGD.double()
        self.down_EOI = weights.experts.down_EOI.double()
        self.top_k, self.renormalise = top_k, renormalise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for where in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
            x_D = x[tuple(where)]
            p_E = torch.exp(self.router_ED @ x_D)
            p_E = p_E / p_E.sum()
            chosen = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())[: self.top_k]
            total = sum(p_E[e] for e in chosen) if self.renormalise else torch.tensor(1.0)
            for e in chosen:
                gate_I, up_I = (self.up_EGD[e] @ x_D).chunk(2)
                hidden_I = gate_I / (1 + torch.exp(-gate_I)) * up_I
                out[tuple(where)] += p_E[e] / total * (self.down_EOI[e] @ hidden_I)
        return out


def write(
    directory: Path,
    dense: nn.Module,
    plan: Plan,
    moe_weights: Callable[[MoESpec], MoEWeights] | None = None,
    **options: Any,
) -> dict[str, Stored]:
    """Save the dense model, convert the files, and return where the tensors lie."""
    dense.save_pretrained(directory / "dense")
    tensors = read_tensors(directory / "dense")
    config = AutoConfig.from_pretrained(directory / "dense")
    found = variants(NATIVE[TARGET_OF[config.model_type]], config, plan, asked=False)
    assert not isinstance(found, str), found
    target = found[0]
    moe_weights = moe_weights or (lambda spec: copies(spec, tensors))
    out = directory / "moe"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(build_config(target, config, plan)))
    written = entries(target, tensors, plan, moe_weights, config)
    return write_tensors(out, written, **options)


def reload(directory: Path) -> nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(directory / "moe", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in eps of float32 of the largest expected value."""
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.abs().max() / EPS).item()


def with_reference(dense: nn.Module, plan: Plan, *, renormalise: bool = True) -> nn.Module:
    reference = copy.deepcopy(dense).double()
    for spec in plan.specs:
        layer = int(spec.ffn.path.split(".")[2])
        reference.model.layers[layer].mlp = Reference(distinct(spec), spec.top_k, renormalise)
    return reference


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_equal_the_dense_model(name: str, tmp_path: Path) -> None:
    dense = dense_model(CONFIGS[name]())
    write(tmp_path, dense, plan_of())
    moe = reload(tmp_path)
    expected = logits(dense)
    torch.testing.assert_close(
        logits(moe), expected, rtol=0, atol=ULPS * EPS * expected.abs().max().item()
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    prompt = tokens(8)
    assert torch.equal(moe.generate(prompt, **options), dense.generate(prompt, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_distinct_experts_equal_the_reference(name: str, tmp_path: Path) -> None:
    dense, plan = dense_model(CONFIGS[name]()), plan_of(width=40, top_k=3)
    write(tmp_path, dense, plan, distinct)
    expected = logits(with_reference(dense, plan))
    assert error(logits(reload(tmp_path)), expected) < ULPS
    assert error(logits(dense), expected) > 1e4  # the experts matter


@pytest.mark.parametrize("weights", ["renormalised", "softmax"])
def test_qwen3_moe_with_dense_layers(weights: WeightRule, tmp_path: Path) -> None:
    dense, plan = dense_model(CONFIGS["qwen3"]()), plan_of((1,), weights=weights)
    write(tmp_path, dense, plan, distinct)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["mlp_only_layers"] == [0, 2]
    expected = logits(with_reference(dense, plan, renormalise=weights == "renormalised"))
    other = logits(with_reference(dense, plan, renormalise=weights != "renormalised"))
    actual = logits(reload(tmp_path))
    assert error(actual, expected) < ULPS
    assert error(actual, other) > 1e3


def test_swapped_gate_and_up_are_caught(tmp_path: Path) -> None:
    """The check can fail: SwiGLU with its two halves exchanged is another function."""
    dense, plan = dense_model(CONFIGS["llama"]()), plan_of(top_k=4)

    def swapped(spec: MoESpec) -> MoEWeights:
        weights = distinct(spec)
        experts = weights.experts
        up_EGD = torch.cat(experts.up_EGD.chunk(2, dim=1)[::-1], dim=1)
        return replace(weights, experts=replace(experts, up_EGD=up_EGD))

    write(tmp_path, dense, plan, swapped)
    assert error(logits(reload(tmp_path)), logits(with_reference(dense, plan))) > 1e4


def test_one_wrong_expert_is_caught(tmp_path: Path) -> None:
    dense, plan = dense_model(CONFIGS["llama"]()), plan_of()

    def wrong(spec: MoESpec) -> MoEWeights:
        weights = distinct(spec)
        weights.experts.down_EOI[3] *= 1.001
        return weights

    write(tmp_path, dense, plan, wrong)
    assert error(logits(reload(tmp_path)), logits(with_reference(dense, plan))) > 2 * ULPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_its_dtype_and_its_error(dtype: torch.dtype, tmp_path: Path) -> None:
    """Copies are no further from the float32 model than twice the dense model in that dtype."""
    exact = dense_model(CONFIGS["llama3-rope"]())
    dense = copy.deepcopy(exact).to(dtype)
    write(tmp_path, dense, plan_of())
    moe = reload(tmp_path)
    assert {p.dtype for p in moe.parameters()} == {dtype}
    expected = logits(exact)
    assert error(logits(moe), expected) < 2 * error(logits(dense), expected)


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen3"])
@pytest.mark.parametrize("dropped", ["new", "old"])
def test_each_spelling_of_rope_is_enough(name: str, dropped: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    config.rope_parameters["rope_theta"] = 77.0
    write(tmp_path, dense_model(config), plan_of())
    expected = logits(reload(tmp_path))
    path = tmp_path / "moe" / "config.json"
    content = json.loads(path.read_text())
    for key in {"new": ["rope_parameters", "dtype"], "old": ["rope_theta", "rope_scaling"]}[
        dropped
    ]:
        del content[key]
    path.write_text(json.dumps(content))
    assert torch.equal(logits(reload(tmp_path)), expected)


def test_config_keeps_what_changes_the_model(tmp_path: Path) -> None:
    plan = plan_of()
    config = CONFIGS["mistral"]()
    written = build_config(NATIVE["mixtral"], config, plan)
    assert written["architectures"] == ["MixtralForCausalLM"]
    kept = ("sliding_window", "head_dim", "rms_norm_eps", "tie_word_embeddings", "vocab_size")
    assert {name: written[name] for name in kept} == {name: getattr(config, name) for name in kept}
    sizes = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    assert [written[name] for name in sizes] == [4, 2, 48]
    llama = CONFIGS["llama"]()
    llama.sliding_window = 3  # Llama does not read it, Mixtral would
    assert build_config(NATIVE["mixtral"], llama, plan)["sliding_window"] is None
    half = build_config(NATIVE["mixtral"], llama, plan, dtype=torch.bfloat16)
    assert (half["dtype"], half["torch_dtype"]) == ("bfloat16", "bfloat16")
    qwen3 = build_config(NATIVE["qwen3_moe"], CONFIGS["qwen3-sliding"](), plan)
    assert (qwen3["use_sliding_window"], qwen3["sliding_window"]) == (True, 5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_stacks_are_contiguous(name: str, tmp_path: Path) -> None:
    plan = plan_of()
    stored = write(tmp_path, dense_model(CONFIGS[name]()), plan, distinct, max_shard_size=30_000)
    prefix, words = {
        "llama": ("model.layers.1.block_sparse_moe.experts.", ("w1", "w3", "w2")),
        "qwen3": ("model.layers.1.mlp.experts.", ("gate_proj", "up_proj", "down_proj")),
    }[name]
    experts = distinct(plan.specs[1]).experts
    gate_EID, up_EID = experts.up_EGD.chunk(2, dim=1)
    for word, expected in zip(words, (gate_EID, up_EID, experts.down_EOI), strict=True):
        place = stored[f"{prefix}{word}.weight"]
        data = (tmp_path / "moe" / place.file).read_bytes()[place.offset :]
        actual = torch.frombuffer(bytearray(data[: expected.nbytes]), dtype=place.dtype)
        assert torch.equal(actual.reshape(place.shape), expected)
    assert len({place.file for place in stored.values()}) > 2
    reload(tmp_path)


def test_each_layer_is_made_once_and_only_one_is_kept(tmp_path: Path) -> None:
    made: list[int] = []
    alive: list[Any] = []

    def counted(spec: MoESpec) -> MoEWeights:
        assert all(reference() is None for reference in alive)
        weights = distinct(spec)
        made.append(spec.seed)
        alive.append(weakref.ref(weights.experts.up_EGD))
        return weights

    write(tmp_path, dense_model(CONFIGS["llama"]()), plan_of(), counted)
    assert sorted(made) == [0, 1, 2]


def test_old_buffers_are_dropped_and_missing_tensors_named() -> None:
    tensors = dict(dense_model(CONFIGS["llama"]()).state_dict())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    target, _ = choose(NATIVE, llama(), plan_of())
    assert target is not None
    names = [e.name for e in entries(target, tensors, plan_of(), distinct, llama())]
    assert not any("inv_freq" in name for name in names)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(UsageError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        list(entries(target, tensors, plan_of(), distinct, llama()))


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**SIZES, **changes})


def marked(config: PreTrainedConfig, **attributes: Any) -> PreTrainedConfig:
    for name, value in attributes.items():
        setattr(config, name, value)
    return config


GELU = Pointwise(2, (("gelu", ("z0",), {}), ("mul", ("t0", "z1"), {})), "geglu")
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
BIASED = replace(ffn_of(2).contraction, bias="model.layers.2.mlp.down_proj.bias")
MIXED = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
ELSEWHERE = tuple(replace(p, weight=f"other.{p.weight}") for p in ffn_of(2).expansions)

CONFIG_REFUSALS: dict[str, tuple[str, PreTrainedConfig, str]] = {
    "attention-bias": ("mixtral", llama(attention_bias=True), "attention_bias is true"),
    "mlp-bias": ("mixtral", llama(mlp_bias=True), "mlp_bias is true"),
    "partial-rotary": ("mixtral", llama(rope_parameters=PARTIAL), "partial_rotary_factor"),
    "other-type": ("mixtral", CONFIGS["qwen3"](), "the dense model is qwen3"),
    "classifier": (
        "mixtral",
        llama(architectures=["LlamaForSequenceClassification"]),
        "only LlamaForCausalLM has a twin",
    ),
    "own-code": ("mixtral", marked(llama(), auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "quantised": ("mixtral", marked(llama(), quantization_config={"bits": 4}), "quantised"),
    "mixed-windows": ("qwen3_moe", MIXED, "some layers attend through a sliding window"),
}
PLAN_REFUSALS: dict[str, tuple[str, Plan, str]] = {
    "nothing": ("mixtral", plan_of(()), "converts nothing"),
    "dense-layer": ("mixtral", plan_of((0, 2)), "leaves these dense: 1"),
    "weight-one": ("mixtral", plan_of(weights="one"), "the weight one, only almost"),
    "softmax": ("mixtral", plan_of(weights="softmax"), "it does `renormalised`"),
    "detached": ("qwen3_moe", plan_of(weights="renorm_detach"), "another gradient"),
    "router-bias": ("qwen3_moe", with_router(plan_of(), bias=True), "router has no bias"),
    "tied": ("mixtral", with_router(plan_of(), tied=True), "cannot be tied"),
    "width": ("mixtral", changed(plan_of(), width=24), "width is 24, and 48"),
    "experts": ("qwen3_moe", changed(plan_of(), num_experts=8), "num_experts is 8, and 4"),
    "top-k": ("mixtral", changed(plan_of(), top_k=1), "top_k is 1, and 2"),
    "geglu": ("mixtral", with_ffn(plan_of(), pointwise=GELU), "the activation here is geglu"),
    "bias": ("mixtral", with_ffn(plan_of(), contraction=BIASED), "experts have no biases"),
    "elsewhere": ("mixtral", with_ffn(plan_of(), expansions=ELSEWHERE), "not the `mlp`"),
    "dropout": ("mixtral", with_ffn(plan_of(), output_dropout=0.1), "no dropout"),
}


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_a_config_that_does_not_fit_is_refused_with_the_reason(case: str) -> None:
    target, config, reason = CONFIG_REFUSALS[case]
    assert reason in str(refusal(NATIVE[target], config, plan_of()))


@pytest.mark.parametrize("case", PLAN_REFUSALS)
def test_a_plan_that_does_not_fit_is_refused_with_the_reason(case: str) -> None:
    target, plan, reason = PLAN_REFUSALS[case]
    config = CONFIGS["qwen3" if target == "qwen3_moe" else "llama"]()
    assert reason in str(refusal(NATIVE[target], config, plan))


def test_an_unknown_config_field_is_refused() -> None:
    source = replace(NATIVE["mixtral"].sources["llama"], ignored=())
    target = replace(NATIVE["mixtral"], sources={"llama": source})
    assert refusal(target, llama(), plan_of()) is None
    assert "pretraining_tp" in str(refusal(target, llama(pretraining_tp=2), plan_of()))


def test_choose_gives_the_first_that_fits_and_the_reasons_of_the_others() -> None:
    target, reasons = choose(NATIVE, CONFIGS["qwen3"](), plan_of())
    assert target is not None
    assert target.model_type == "qwen3_moe"
    assert len(target.forms) == 1
    assert list(reasons) == ["mixtral"]
    nothing, reasons = choose(NATIVE, llama(mlp_bias=True), plan_of())
    assert nothing is None
    assert list(reasons) == list(NATIVE)


def test_choose_asks_whether_a_target_is_wanted_and_can_be_held_to_one() -> None:
    def few_experts(target: NativeTarget, config: Mapping[str, Any]) -> str | None:
        return f"{config['num_local_experts']} experts" if target.model_type == "mixtral" else None

    target, reasons = choose(NATIVE, llama(), plan_of(), accepts=few_experts)
    assert reasons["mixtral"] == "4 experts"
    target, reasons = choose(NATIVE, llama(), plan_of(), only="mixtral")
    assert (target is not None, reasons) == (True, {})
    target, reasons = choose(NATIVE, llama(), plan_of(), only="qwen3_moe")
    assert (target, list(reasons)) == (None, ["qwen3_moe"])


def test_swiglu_is_known_by_its_values() -> None:
    spelled_out = Pointwise(
        2, (("sigmoid", ("z0",), {}), ("mul", ("z0", "t0"), {}), ("mul", ("t1", "z1"), {}))
    )
    other_order = Pointwise(2, (("silu", ("z1",), {}), ("mul", ("t0", "z0"), {})), "swiglu")
    assert is_swiglu(SWIGLU)
    assert is_swiglu(spelled_out)
    assert not is_swiglu(other_order)
    assert not is_swiglu(Pointwise(1, (("silu", ("z0",), {}),), "silu"))


def test_the_layer_comes_from_the_names_of_the_weights() -> None:
    ffn, source = ffn_of(11), NATIVE["mixtral"].sources["llama"]
    assert layer_of(ffn, source) == "model.layers.11"
    assert layer_of(replace(ffn, expansions=ffn.expansions[::-1]), source) is None
    assert layer_of(replace(ffn, contraction=ffn_of(12).contraction), source) is None
