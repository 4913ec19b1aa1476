"""The MoE architectures of transformers that llama.cpp runs, as GGUF files have them.

One entry each; every other is refused. Read: ``src/models/*.cpp`` and ``src/llama-model.cpp`` in
llama-cpp-python 0.3.36. All entries are run by ``tests/test_gguf_llama_cpp.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ExpertGatingFuncType

from upcycle.errors import UnsupportedError
from upcycle.targets.runtimes import conditions, llama_cpp
from upcycle.targets.runtimes.support import CUSTOM, Config, Support, refuses

Condition = Callable[[Config], Support | None]


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    Attributes:
        arch: its key in the package gguf.
        fields: what its graph reads beside what all of them read: the name of a method of
            GGUFWriter without ``add_``, and a field of ``config.json`` or the value itself.
        conditions: what it computes otherwise or cannot hold.
        turned: RoPE turns neighbours, where transformers turns halves: rows of queries and keys
            change places.
        partial_rope: it turns a part of each head.
        rope_factors: it reads a factor for each frequency, as Llama 3.1 needs.
        dense_lead: its first layers may be dense.
        own_output: it has an output matrix, also where that is the matrix of the embeddings.
        output_bias: attention may have a bias after its last matrix.
    """

    arch: MODEL_ARCH
    fields: Mapping[str, Any] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    turned: bool = False
    partial_rope: bool = False
    rope_factors: bool = False
    dense_lead: bool = False
    own_output: bool = False
    output_bias: bool = False

    @property
    def name(self) -> str:
        """As the file has it."""
        return MODEL_ARCH_NAMES[self.arch]


def only(name: str, *allowed: Any, why: str) -> Condition:
    """`name` has one of the `allowed` values or is not there."""

    def condition(config: Config) -> Support | None:
        return None if config.get(name, allowed[0]) in allowed else refuses(name, why)

    return condition


def needs(name: str, why: str) -> Condition:
    """`name` is not zero."""
    return lambda config: None if config.get(name) else refuses(name, why)


def _to_the_end(config: Config) -> Support | None:
    if config["moe_layer_end_index"] in (-1, config["num_hidden_layers"] - 1):
        return None
    return refuses("moe_layer_end_index", "its dense layers stand at the start")


GRANITE = {
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
}
SIGMOID = {
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": ExpertGatingFuncType.SIGMOID,
}
ONE_GROUP = only("n_group", 1, None, why="groups of experts are not written")
SHARED = needs("n_shared_experts", "it always has a shared expert")

ARCHITECTURES = {
    "mixtral": GgufArchitecture(MODEL_ARCH.LLAMA, turned=True, rope_factors=True),
    "qwen2_moe": GgufArchitecture(
        MODEL_ARCH.QWEN2MOE,
        conditions=(
            needs("shared_expert_intermediate_size", "it always has a shared expert"),
            conditions.has_own_head_dim,
        ),
        own_output=True,
    ),
    "qwen3_moe": GgufArchitecture(MODEL_ARCH.QWEN3MOE),
    "olmoe": GgufArchitecture(
        MODEL_ARCH.OLMOE,
        conditions=(
            conditions.has_own_head_dim,
            conditions.as_many_key_heads,
            only("clip_qkv", None, why="queries, keys and values are not clipped"),
        ),
        own_output=True,
    ),
    "granitemoe": GgufArchitecture(
        MODEL_ARCH.GRANITE_MOE, GRANITE, turned=True, rope_factors=True, output_bias=True
    ),
    "granitemoeshared": GgufArchitecture(
        MODEL_ARCH.GRANITE_MOE,
        {**GRANITE, "expert_shared_feed_forward_length": "shared_intermediate_size"},
        turned=True,
        rope_factors=True,
        output_bias=True,
    ),
    "dots1": GgufArchitecture(
        MODEL_ARCH.DOTS1,
        SIGMOID,
        (ONE_GROUP, SHARED, conditions.as_many_key_heads),
        dense_lead=True,
        own_output=True,
    ),
    "glm4_moe": GgufArchitecture(
        MODEL_ARCH.GLM4_MOE, SIGMOID, (ONE_GROUP,), partial_rope=True, dense_lead=True
    ),
    "solar_open": GgufArchitecture(
        MODEL_ARCH.GLM4_MOE, {**SIGMOID, "leading_dense_block_count": 0}, (ONE_GROUP,)
    ),
    "ernie4_5_moe": GgufArchitecture(
        MODEL_ARCH.ERNIE4_5_MOE,
        {
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
            "expert_shared_count": "moe_num_shared_experts",
        },
        (
            only("moe_layer_interval", 1, why="layers that are dense in turn are not written"),
            _to_the_end,
            only("use_bias", False, why="its shared expert has no biases"),
        ),
        dense_lead=True,
    ),
    "hunyuan_v1_moe": GgufArchitecture(MODEL_ARCH.HUNYUAN_MOE),
}
REFUSED = {
    "gpt_oss": "its experts have alpha 1.702 in SwiGLU, and converted ones 1; for those of OpenAI "
    "take convert_hf_to_gguf.py of llama.cpp, which keeps their 4 bits",
}
YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
READ_OF_ROPE = {
    "default": set[str](),
    "linear": {"factor"},
    "yarn": YARN,
    "llama3": {*YARN, "low_freq_factor", "high_freq_factor"},
}


def architecture_of(model: Any) -> GgufArchitecture:
    """The entry for a model of transformers.

    Raises:
        UnsupportedError: there is none, or llama.cpp computes something else; the message says why.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    entry = ARCHITECTURES.get(kind)
    if entry is None:
        raise UnsupportedError(f"gguf: llama.cpp does not run {kind}: {_why_not(model, kind)}")
    fields: Config = config.to_dict() if config is not None else {}
    found = conditions.other_activation(fields) or llama_cpp.other_norm(kind, fields)
    for condition in (lambda c: _rope(entry, c), *entry.conditions):
        found = found or condition(fields)
    if found is not None:
        raise UnsupportedError(
            f"gguf: llama.cpp has no such {kind}: {found.field}: {'; '.join(found.why)}"
        )
    return entry


def _why_not(model: Any, kind: str) -> str:
    if hasattr(model, "config") and not type(model).__module__.startswith("transformers."):
        return (
            f"{llama_cpp.ABSENT[CUSTOM]}; `target=native` makes an architecture "
            "of transformers of it, if one computes the same"
        )
    why = REFUSED.get(kind) or llama_cpp.ABSENT.get(kind, "upcycle has no entry for it")
    return f"{why}; those written are {', '.join(ARCHITECTURES)}"


def _rope(entry: GgufArchitecture, config: Config) -> Support | None:
    given = config.get("rope_parameters") or {}
    kind = given.get("rope_type", "default")
    if kind not in READ_OF_ROPE or (kind == "llama3" and not entry.rope_factors):
        return refuses("rope_parameters", f"it does not scale positions by {kind}")
    read = READ_OF_ROPE[kind] | {"rope_type", "rope_theta", "partial_rotary_factor", "truncate"}
    others = sorted(name for name, value in given.items() if value is not None and name not in read)
    if others:
        return refuses("rope_parameters", f"{', '.join(others)} of {kind} would be ignored")
    if not given.get("truncate", True):
        return refuses("rope_parameters", "it rounds the bounds of yarn, as with truncate")
    if given.get("partial_rotary_factor", 1.0) != 1.0 and not entry.partial_rope:
        return refuses("rope_parameters", "it turns whole heads")
    return None
