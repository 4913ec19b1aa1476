"""Conditions that several runtimes have: None, or why a model does not meet one."""

from collections.abc import Collection

from upcycle.ir.spec import Plan
from upcycle.targets.native.layers import is_swiglu
from upcycle.targets.runtimes.support import CUSTOM, PLAIN, Config, Support, loads, refuses


def served(
    target: str, config: Config, plan: Plan, native: Collection[str], *, generic: str, trusted: str
) -> Support | None:
    """What vLLM and SGLang have in common; None if the architecture is `native` and may run.

    `generic` says how one runs any other architecture of transformers, `trusted` custom code.
    """
    if target == PLAIN:
        return refuses("MODEL", "it loads models of transformers, and this is a plain module")
    if target == "gpt_oss":
        return refuses("swiglu_alpha", "it computes with 1.702, and the experts here need 1")
    if target == "switch_transformers":
        return refuses("model_type", "it has no T5 and no Switch Transformers")
    if target == CUSTOM:
        return only_silu(plan) or loads(trusted)
    return other_activation(config) if target in native else loads(generic)


def needs_every_layer(plan: Plan) -> Support | None:
    """For a runtime that makes every layer of the architecture a mixture of experts."""
    converted = {spec.ffn.path for spec in plan.specs}
    kinds = {spec.ffn.kind for spec in plan.specs}
    for ffn in plan.located.ffns:
        if ffn.path not in converted and ffn.kind in kinds:
            return refuses("layers", f"it makes every layer sparse, and {ffn.path} stays dense")
    return None


def has_own_head_dim(config: Config) -> Support | None:
    """For a runtime that computes the width of a head from two other fields."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    if head_dim * heads == width:
        return None
    why = f"it takes {width} / {heads} for the width of a head, not {head_dim}"
    return refuses("head_dim", why)


def as_many_key_heads(config: Config) -> Support | None:
    """For a runtime that has no grouped queries in this architecture."""
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    if heads == keys:
        return None
    return refuses("num_key_value_heads", f"it wants as many as there are heads, {heads}")


def sliding(config: Config) -> str | None:
    """The limit of a runtime that attends to everything in spite of a sliding window."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    return f"it ignores `sliding_window`: right for texts of up to {window} tokens"


def scaled_rope(config: Config) -> Support | None:
    """For a runtime that reads ``rope_theta`` and nothing else about positions."""
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type == "default":
        return None
    return refuses("rope_parameters", f"it does not scale positions, and {rope_type} does")


def without_biases(config: Config) -> Support | None:
    """For a runtime whose attention has no biases in this architecture."""
    has_biases = config.get("attention_bias")
    return refuses("attention_bias", "its attention has no biases") if has_biases else None


def other_activation(config: Config) -> Support | None:
    """For a runtime that computes SwiGLU in its native architectures, whatever the config says."""
    name = config.get("hidden_act", "silu")
    return None if name == "silu" else refuses("hidden_act", f"it computes SwiGLU, not {name}")


def only_silu(plan: Plan) -> Support | None:
    """For a runtime whose kernel for experts in custom code is SwiGLU, whatever the code says."""
    for ffn in (spec.ffn for spec in plan.specs):
        if not is_swiglu(ffn.pointwise):
            name = ffn.pointwise.name
            return refuses("hidden_act", f"its kernel for experts computes SwiGLU, not {name}")
        if ffn.has_up_bias:
            return refuses("mlp_bias", "its kernel for experts has no biases")
    return None
