"""A dense model written in a native architecture and read back, and what it should compute."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import native_models
import numerics
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import ExpertWeights, MoEWeights, read_ffn
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.transform.transform import transform
from upcycle.targets.files.tensor_file import write_tensors
from upcycle.targets.native import NATIVE
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.choose import build_config, choose, variants
from upcycle.targets.native.tensors import entries

COPIES = {"method": "copy", "count": 4}
SLICES = {"method": "contiguous", "count": 4}
SHARED = {"method": "contiguous", "count": 4, "shared": 1}
ZEROS = {"method": "zero_routed", "count": 4}


def plan_of(name: str, experts: dict[str, Any], router: dict[str, Any], target: str) -> Plan:
    defaults = {} if "method" in router else {"method": "normal", "std": 0.3}
    if name == "t5":
        router = {**router, "top_k": 1 if router["top_k"] == 2 else router["top_k"]}
    recipe = numerics.make_recipe(experts, defaults | router)
    plan = make_plan(native_models.located(name), recipe, recipe_name="test")
    return replace(plan, architecture=target)


def refusal(
    target: NativeTarget, config: PreTrainedConfig, plan: Plan, *, asked: bool = False
) -> str | None:
    """Why `target` does not hold the converted model exactly, or None if it does in some way."""
    found = variants(target, config, plan, asked=asked)
    return found if isinstance(found, str) else None


def converted(spec: MoESpec, name: str) -> MoEWeights:
    tensors = dict(native_models.dense_model(name).named_parameters())
    return transform(read_ffn(spec.ffn, tensors), spec)


def distinct(spec: MoESpec) -> MoEWeights:
    """Experts and router at random."""
    draw = spec.generator("distinct")
    arity, d, e, i = len(spec.ffn.expansions), spec.ffn.d_model, spec.num_experts, spec.width

    def made(count: int, width: int) -> ExpertWeights:
        return ExpertWeights(
            up_EGD=torch.randn(count, arity * width, d, generator=draw) * 0.3,
            up_bias_EG=None,
            down_EOI=torch.randn(count, d, width, generator=draw) * 0.3,
            neuron_EI=torch.zeros(count, width, dtype=torch.int64),
        )

    router = {"weight": torch.randn(e, d, generator=draw)}
    if spec.router.bias:
        router["bias"] = torch.randn(e, generator=draw)
    if spec.router.balance:
        router["selection_bias"] = torch.randn(e, generator=draw)
    shared = made(1, spec.shared) if spec.shared else None
    return MoEWeights(made(e, i), router, None, shared)


ACTIVATIONS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu_pytorch_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": lambda z: z * (z > 0),
}


class Reference(nn.Module):
    """A MoE layer, token by token in float64."""

    def __init__(self, spec: MoESpec, activation: str) -> None:
        super().__init__()
        self.weights, self.spec = distinct(spec), spec
        self.activation = ACTIVATIONS[activation]

    def expert(self, weights: ExpertWeights, e: int, x_D: torch.Tensor) -> torch.Tensor:
        z = (weights.up_EGD[e].double() @ x_D).chunk(len(self.spec.ffn.expansions))
        hidden = self.activation(z[0]) * (z[1] if len(z) == 2 else 1)
        return weights.down_EOI[e].double() @ hidden

    def token(self, x_D: torch.Tensor) -> torch.Tensor:
        router, spec = self.weights.router, self.spec
        logits_E = router["weight"].double() @ x_D
        if "bias" in router:
            logits_E = logits_E + router["bias"].double()
        p_E = torch.exp(logits_E - logits_E.max())
        p_E = p_E / p_E.sum()
        order_E = p_E + router["selection_bias"].double() if "selection_bias" in router else p_E
        chosen = sorted(range(len(p_E)), key=lambda e: -order_E[e].item())[: spec.top_k]
        total = sum(p_E[e] for e in chosen)
        out = torch.zeros_like(x_D)
        for e in chosen:
            rule = {"renormalised": p_E[e] / total, "softmax": p_E[e], "one": 1.0, "gain": 1.0}
            rule["renorm_detach"] = rule["renormalised"]
            weight = rule[spec.router.weights] * spec.scale
            out = out + weight * self.expert(self.weights.experts, e, x_D)
        if self.weights.shared is not None:
            out = out + self.expert(self.weights.shared, 0, x_D)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.token(x_D) for x_D in x.reshape(-1, x.shape[-1])]).reshape(x.shape)


def reference(name: str, plan: Plan) -> nn.Module:
    model = copy.deepcopy(native_models.dense_model(name)).double()
    activation = NATIVE[str(plan.architecture)].sources[model.config.model_type].activation
    for spec in plan.specs:
        model.set_submodule(spec.ffn.path, Reference(spec, activation))
    return model


def target_of(name: str, plan: Plan, **fields: Any) -> NativeTarget:
    """The target of the plan whose config has the given `fields`."""

    def accepts(_: NativeTarget, config: dict[str, Any]) -> str | None:
        wrong = [key for key, value in fields.items() if config.get(key) != value]
        return f"other {wrong}" if wrong else None

    config = copy.deepcopy(native_models.dense_model(name).config)
    target, reasons = choose(NATIVE, config, plan, accepts=accepts, only=plan.architecture)
    assert target is not None, reasons
    return target


def write(
    directory: Path, name: str, plan: Plan, target: NativeTarget, *, random: bool = False
) -> nn.Module:
    """Write the converted model and load it as transformers does, every tensor accounted for."""
    dense = native_models.dense_model(name)
    dense.save_pretrained(directory / "dense")
    tensors = read_tensors(directory / "dense")
    out = directory / "moe"
    out.mkdir()
    config = build_config(target, dense.config, plan)
    (out / "config.json").write_text(json.dumps(config))
    weights = distinct if random else lambda spec: converted(spec, name)
    write_tensors(out, entries(target, tensors, plan, weights, dense.config))
    auto = getattr(transformers, target.auto_class)
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == target.architecture
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, name: str) -> torch.Tensor:
    return model(**native_models.inputs(name)).logits


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, over the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()
