"""What a native MoE architecture is to upcycle, and what it asks of a dense model.

`fit` says whether a dense model and a plan can be written in it without changing a single output,
and `build_config` writes the config; `targets.native.tensors` lists what is on disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedConfig

from upcycle.routing import WeightRule
from upcycle.spec import Plan
from upcycle.targets.native.layers import layer_index, plan_reason

# Config fields that every decoder here has and that keep their meaning.
COMMON_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
# Config fields that `build_config` writes in its own way.
WRITTEN_FIELDS = ("hidden_act", "intermediate_size", "rope_parameters")


def _nothing(config: PreTrainedConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class NativeTarget:
    """One MoE architecture.

    Attributes:
        model_type, architecture: how its config names it.
        sources: the dense model types that it can hold, and their causal-LM classes.
        fits: a dense config -> None, or why the architecture cannot hold its attention or FFN.
        weight_rules: the weight rules that its router can follow, and the config fields for each.
        field_num_experts, field_top_k, field_width: config fields of the MoE.
        field_dense_layers: config field with the layers that stay dense; None if all are sparse.
        carried: further fields of the dense config that are copied.
        checked: fields that `fits` looks at or `attention` writes.
        ignored: fields without influence on the model.
        constants: config fields with one value.
        attention: fields that need more than a copy.
        router: name of the router weight [E, D]; ``{layer}`` is the decoder layer.
        expert: name of one matrix of one expert; ``{expert}``, ``{matrix}``.
        matrices: what ``{matrix}`` is for gate [I, D], up [I, D] and down [D, I].
        runtimes: other software and how it runs the architecture, for the model card.
    """

    model_type: str
    architecture: str
    sources: Mapping[str, str]
    fits: Callable[[PreTrainedConfig], str | None]
    weight_rules: Mapping[WeightRule, Mapping[str, Any]]
    field_num_experts: str
    field_top_k: str
    field_width: str
    field_dense_layers: str | None
    carried: tuple[str, ...]
    checked: tuple[str, ...]
    ignored: tuple[str, ...]
    constants: Mapping[str, Any]
    router: str
    expert: str
    matrices: tuple[str, str, str]
    runtimes: Mapping[str, str]
    attention: Callable[[PreTrainedConfig], dict[str, Any]] = _nothing


def fit(target: NativeTarget, config: PreTrainedConfig, plan: Plan) -> str | None:
    """None if `target` holds the converted model exactly, else the reason, without a full stop.

    Args:
        target: the architecture.
        config: the dense model's config, as ``AutoConfig`` reads it.
        plan: what is converted, and to what.
    """
    return _config_reason(target, config) or plan_reason(
        plan,
        num_layers=config.num_hidden_layers,
        weight_rules=tuple(target.weight_rules),
        needs_all_layers=target.field_dense_layers is None,
    )


def choose(
    targets: Mapping[str, NativeTarget],
    config: PreTrainedConfig,
    plan: Plan,
    *,
    accepts: Callable[[NativeTarget, Mapping[str, Any]], str | None] | None = None,
    only: str | None = None,
) -> tuple[NativeTarget | None, dict[str, str]]:
    """The first target that fits, or None; and the reason of each one before it, by name.

    Args:
        targets: architectures by name, in the order in which they are tried.
        config: the dense model's config, as ``AutoConfig`` reads it.
        plan: what is converted, and to what.
        accepts: given a target that fits and the content of its ``config.json``, None or why it is
            not wanted.
        only: the one architecture that is tried.
    """
    if only is not None and only not in targets:
        known = ", ".join(targets)
        return None, {only: f"upcycle does not know this architecture; it knows {known}"}
    reasons: dict[str, str] = {}
    for name in targets if only is None else [only]:
        target = targets[name]
        reason = fit(target, config, plan)
        if reason is None and accepts is not None:
            reason = accepts(target, build_config(target, config, plan))
        if reason is None:
            return target, reasons
        reasons[name] = reason
    return None, reasons


def build_config(
    target: NativeTarget, config: PreTrainedConfig, plan: Plan, *, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The content of ``config.json``; call it only where `fit` returned None.

    `dtype` is that of the weights, where the config may not say it (a model cast in memory).

    RoPE is written in the spelling of transformers 5 (``rope_parameters``) and in the older one
    (``rope_theta``, ``rope_scaling``), because software that knows only the older one takes a
    default without a word; the same for ``dtype`` and ``torch_dtype``.
    """
    spec = plan.specs[0]
    names = (*COMMON_FIELDS, *target.carried)
    present = {field.name for field in fields(type(config))}
    written = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "hidden_act": "silu",
        **target.constants,
        **{name: getattr(config, name) for name in names if name in present},
        **target.attention(config),
        **target.weight_rules[spec.router.weights],
        target.field_num_experts: spec.num_experts,
        target.field_top_k: spec.top_k,
        target.field_width: spec.width,
        **_rope(config),
    }
    if target.field_dense_layers is not None:
        sparse = {layer_index(spec.ffn) for spec in plan.specs}
        dense = [layer for layer in range(config.num_hidden_layers) if layer not in sparse]
        written[target.field_dense_layers] = dense
    if (known := dtype or config.dtype) is not None:
        name = str(known).removeprefix("torch.")
        written |= {"dtype": name, "torch_dtype": name}
    return dict(sorted(written.items()))


def _config_reason(target: NativeTarget, config: PreTrainedConfig) -> str | None:
    if config.model_type not in target.sources:
        wanted = " and ".join(target.sources)
        return f"the dense model is {config.model_type}, and {target.model_type} holds {wanted}"
    wanted_class = target.sources[config.model_type]
    if config.architectures and wanted_class not in config.architectures:
        return f"the dense model is {config.architectures[0]}, and only {wanted_class} has a twin"
    if getattr(config, "auto_map", None):
        return "the dense model brings its own code (auto_map), which may differ from its type"
    if getattr(config, "quantization_config", None):
        return "the dense weights are quantised; dequantise the model first"
    return target.fits(config) or _rope_reason(config) or _unknown_field(target, config)


def _unknown_field(target: NativeTarget, config: PreTrainedConfig) -> str | None:
    """A field that a later transformers may have added, set to something: better refused."""
    known: Sequence[str] = (
        *COMMON_FIELDS,
        *WRITTEN_FIELDS,
        *target.carried,
        *target.checked,
        *target.ignored,
    )
    default = type(config)()
    base = {field.name for field in fields(PreTrainedConfig)}
    for field in fields(type(config)):
        if field.name in base or field.name in known:
            continue
        if getattr(config, field.name) != getattr(default, field.name):
            return f"upcycle does not know what the config field {field.name} does"
    return None


def _rope_reason(config: PreTrainedConfig) -> str | None:
    rope = config.rope_parameters or {}
    if any(isinstance(value, dict) for value in rope.values()):
        return "its layers rotate positions in different ways (rope_parameters by layer type)"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates only a part of each head (partial_rotary_factor)"
    return None


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
