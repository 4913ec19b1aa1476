"""What fits which MoE architecture without changing a single output, and its ``config.json``."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from upcycle.ir.spec import Plan
from upcycle.targets.native.architecture import DenseArchitecture, NativeTarget
from upcycle.targets.native.fold_router import CONDITIONS, TEMPERED, Fold, fold, fold_of
from upcycle.targets.native.layers import plan_reason, sparse_layers


def variants(
    target: NativeTarget, config: PreTrainedConfig, plan: Plan, *, asked: bool
) -> list[NativeTarget] | str:
    """The ways in which `target` holds the converted model exactly, or why there is none.

    `config` is the dense model's, as ``AutoConfig`` reads it. If the user `asked` for the target,
    what holds only now (copies), or only almost (a tempered router), will do; see
    `targets.native.fold_router`.

    Returns:
        The target with one form and one source, once for each way, the best first; or the reason.
    """
    if reason := _config_reason(target, config):
        return reason
    source = target.sources[config.model_type]
    dtype = getattr(torch, str(config.dtype or torch.float32).removeprefix("torch."))
    layers = source.layers(config)
    if reason := plan_reason(target, source, layers, plan, itemsize=dtype.itemsize):
        return reason
    found, reasons = [], []
    for form in target.forms:
        narrowed = replace(target, forms=(form,), sources={config.model_type: source})
        made = folds(narrowed, plan)
        if isinstance(made, str):
            reasons.append(made)
        elif made[0].is_exact or asked:
            found.append((made[0], narrowed))
        else:
            why = TEMPERED if made[0].tempered else CONDITIONS[made[0].needs]
            reasons.append(f"{why}; ask for it with `architecture={target.model_type}`")
    found.sort(key=lambda pair: (pair[0].tempered, bool(pair[0].needs)))
    targets = [narrowed for _, narrowed in found]
    if asked and target.may_untie and getattr(config, "tie_word_embeddings", False):
        targets += [replace(narrowed, untied=True) for narrowed in targets]
    return targets or reasons[0]


def folds(target: NativeTarget, plan: Plan) -> list[Fold] | str:
    """What is done to each layer for the first form of `target`, or why that is not enough."""
    made: list[Fold] = []
    for spec in plan.specs:
        one = fold(target, spec)
        if isinstance(one, str):
            return f"{spec.ffn.path}: {one}"
        if made and one.config != made[0].config:
            return f"{spec.ffn.path}: its router differs from that of {plan.specs[0].ffn.path}"
        made.append(one)
    return made


def choose(
    targets: Mapping[str, NativeTarget],
    config: PreTrainedConfig,
    plan: Plan,
    *,
    accepts: Callable[[NativeTarget, Mapping[str, Any]], str | None] | None = None,
    only: str | None = None,
) -> tuple[NativeTarget | None, dict[str, str]]:
    """The first target that fits, or None; and the reason of each one before it, by name.

    The target has one form and one source. If the plan requires runtimes, or with `only`, the one
    that is tried, it may be one that `variants` returns on request. `accepts` says of a target that
    fits, and of its ``config.json``, why it is not wanted, or None.
    """
    reasons: dict[str, str] = {}
    for asked in (False, True) if plan.runtimes or only is not None else (False,):
        for name in targets if only is None else [only]:
            found = variants(targets[name], config, plan, asked=asked)
            if isinstance(found, str):
                reasons[name] = found
                continue
            for target in found:
                reason = accepts and accepts(target, build_config(target, config, plan))
                if reason is None:
                    reasons.pop(name, None)
                    return target, reasons
                reasons[name] = reason
    return None, reasons


def build_config(
    target: NativeTarget, config: PreTrainedConfig, plan: Plan, *, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The content of ``config.json`` for one of `variants`.

    `dtype` is that of the weights, where the config may not say it (a model cast in memory).

    RoPE is written in the spelling of transformers 5 (``rope_parameters``) and in the older one
    (``rope_theta``, ``rope_scaling``), because software that knows only the older one silently
    takes a default; the same for ``dtype`` and ``torch_dtype``.
    """
    source, spec = target.sources[config.model_type], plan.specs[0]
    present = vars(config)
    dense = target.dense(sparse_layers(source, source.layers(config), plan))
    assert not isinstance(dense, str)
    written = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "hidden_act": source.activation,
        **target.constants,
        **{name: present[name] for name in (*source.common, *source.carried) if name in present},
        **source.fields(config),
        **fold_of(target, spec).config,
        target.num_experts: spec.num_experts,
        target.top_k: spec.top_k,
        target.width: spec.width,
        **_shared(target, plan),
        **dense,
        **_rope(config),
    }
    if target.untied:
        written["tie_word_embeddings"] = False
    if (stored_as := dtype or config.dtype) is not None:
        name = str(stored_as).removeprefix("torch.")
        written |= {"dtype": name, "torch_dtype": name}
    return dict(sorted(written.items()))


def _shared(target: NativeTarget, plan: Plan) -> dict[str, int]:
    shared, spec = target.shared, plan.specs[0]
    if shared is None:
        return {}
    size = shared.size(spec)
    if shared.width is not None:
        return {shared.width: size}
    return {} if shared.count is None else {shared.count: size // spec.width}


def _config_reason(target: NativeTarget, config: PreTrainedConfig) -> str | None:
    if target.refused:
        return f"upcycle writes nothing as {target.model_type}: {target.refused}"
    if config.model_type not in target.sources:
        sources = " and ".join(target.sources)
        return f"the dense model is {config.model_type}, and {target.model_type} holds {sources}"
    source = target.sources[config.model_type]
    twin = source.architecture
    if config.architectures and twin not in config.architectures:
        return f"the dense model is {config.architectures[0]}, and only {twin} has a twin"
    if getattr(config, "auto_map", None):
        return "the dense model brings its own code (auto_map), which may differ from its type"
    if getattr(config, "quantization_config", None):
        return "the dense weights are quantised; dequantise the model first"
    for name in source.absent:
        if value := getattr(config, name, None):
            return f"{name} is {json.dumps(value)}, and {target.model_type} has no such thing"
    reason = source.fits(config) or _rope_reason(source, config)
    return reason or _unknown_field(source, config)


def _unknown_field(source: DenseArchitecture, config: PreTrainedConfig) -> str | None:
    """A field that a later transformers may have added, set to something: better refused."""
    known = {"hidden_act", "intermediate_size", "rope_parameters"}  # `build_config` writes them
    known |= {field.name for field in fields(PreTrainedConfig)}
    known.update(source.common, source.carried, source.absent, source.checked, source.ignored)
    default = type(config)()
    for field in fields(type(config)):
        if field.name not in known and getattr(config, field.name) != getattr(default, field.name):
            return f"upcycle does not know what the config field {field.name} does"
    return None


def _rope_reason(source: DenseArchitecture, config: PreTrainedConfig) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        return "its layers rotate positions in different ways (rope_parameters by layer type)"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not source.partial_rope:
        return "it rotates only a part of each head (partial_rotary_factor)"
    return None


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if not rope:
        return {}
    scaling = dict(rope)
    written = {"rope_parameters": rope, "rope_theta": scaling.pop("rope_theta")}
    return written | {"rope_scaling": None if rope["rope_type"] == "default" else scaling}
