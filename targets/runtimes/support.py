"""What a runtime does with a converted model, and the facts that several runtimes ask for.

A runtime is data and one pure function of three things: what the model is written as (a native
architecture, ``remote_code`` or ``module``), the ``config.json`` of that, and the plan. The facts
are read in the source of the runtime, and each file names what was read; only transformers, ONNX
Runtime and llama.cpp are run by the tests.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from upcycle.ir.spec import Plan
from upcycle.targets.native.layers import is_swiglu

Level = Literal["yes", "limits", "no"]
Config = Mapping[str, Any]
CUSTOM, PLAIN = "remote_code", "module"  # what is written where no native architecture fits


@dataclass(frozen=True)
class Support:
    """Whether a runtime loads the model and computes what it should.

    Attributes:
        level: ``no`` also where it would load and compute something else.
        why: the limits, or why not; phrases without a full stop.
        field: for a ``no``, the field of the model's configuration or of the recipe that decides.
    """

    level: Level
    why: tuple[str, ...] = ()
    field: str | None = None

    def text(self) -> str:
        """One cell of a table."""
        start = f"no, {self.field}" if self.level == "no" else "yes"
        return ": ".join([start, "; ".join(self.why)]) if self.why else start

    def to_json(self) -> dict[str, Any]:
        """Plain data; `why` is a list."""
        return asdict(self) | {"why": list(self.why)}


Judge = Callable[[str, Config, Plan], Support]


def loads(*limits: str | None) -> Support:
    """It loads, within the `limits` that are not None."""
    given = tuple(limit for limit in limits if limit)
    return Support("limits" if given else "yes", given)


def refuses(field: str, why: str) -> Support:
    """It does not, because of `field`."""
    return Support("no", (why,), field)


def lacks(target: str) -> Support | None:
    """For a server: what neither vLLM nor SGLang runs, whatever the config says."""
    if target == PLAIN:
        return refuses("MODEL", "it loads models of transformers, and this is a plain module")
    if target == "gpt_oss":
        return refuses("swiglu_alpha", "it computes with 1.702, and the experts here need 1")
    if target == "switch_transformers":
        return refuses("model_type", "it has no T5 and no Switch Transformers")
    return None


def left_dense(plan: Plan) -> list[str]:
    """The paths of the FFNs that the plan does not convert."""
    converted = {spec.ffn.path for spec in plan.specs}
    kinds = {spec.ffn.kind for spec in plan.specs}
    return [f.path for f in plan.located.ffns if f.path not in converted and f.kind in kinds]


def needs_every_layer(plan: Plan) -> Support | None:
    """For a runtime that makes every layer of the architecture a mixture of experts."""
    dense = left_dense(plan)
    if not dense:
        return None
    return refuses("layers", f"it makes every layer sparse, and {dense[0]} stays dense")


def has_own_head_dim(config: Config) -> Support | None:
    """For a runtime that computes the width of a head from two other fields."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    if head_dim * heads == width:
        return None
    return refuses(
        "head_dim", f"it takes {width} / {heads} for the width of a head, not {head_dim}"
    )


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


def without_biases(config: Config, field: str = "attention_bias") -> Support | None:
    """For a runtime whose attention has no biases in this architecture."""
    return refuses(field, "its attention has no biases") if config.get(field) else None


def other_activation(config: Config) -> Support | None:
    """For a runtime that computes SwiGLU in its native architectures, whatever the config says."""
    name = config.get("hidden_act", "silu")
    return None if name == "silu" else refuses("hidden_act", f"it computes SwiGLU, not {name}")


def only_silu(plan: Plan) -> Support | None:
    """For a runtime whose kernel for experts in custom code is SwiGLU, whatever the code says."""
    for spec in plan.specs:
        ffn = spec.ffn
        if not is_swiglu(ffn.pointwise):
            name = ffn.pointwise.name
            return refuses("hidden_act", f"its kernel for experts computes SwiGLU, not {name}")
        if ffn.has_up_bias:
            return refuses("mlp_bias", "its kernel for experts has no biases")
    return None


def first(*found: Support | None) -> Support | None:
    """The first refusal among the checks, or None."""
    return next((support for support in found if support is not None), None)
