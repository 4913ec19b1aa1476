"""SGLang, by its source (the stored versions are of mixed age, 2024 to 2026); not run.

granitemoe, mixtral: the width of a head is hidden_size / num_attention_heads, and positions follow
``rope_theta`` alone. qwen2_moe: every layer is sparse.
"""

from upcycle.ir.spec import Plan
from upcycle.targets.runtimes import conditions
from upcycle.targets.runtimes.support import Config, Support, first, loads

NATIVE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text", "olmoe"),
    *("granitemoe", "granitemoeshared", "ernie4_5_moe", "glm4_moe", "dots1", "cohere2_moe"),
    *("hunyuan_v1_moe", "llama4_text"),
)
GENERIC = "with --model-impl transformers"


def judge(target: str, config: Config, plan: Plan) -> Support:
    """Whether SGLang loads it and computes the same."""
    trusted = f"{GENERIC} and --trust-remote-code"
    found = conditions.served(target, config, plan, NATIVE, generic=GENERIC, trusted=trusted)
    if target == "mixtral":
        found = first(found, conditions.has_own_head_dim(config), conditions.scaled_rope(config))
    elif target == "qwen2_moe":
        found = first(
            found, conditions.needs_every_layer(plan), conditions.has_own_head_dim(config)
        )
    elif target in ("granitemoe", "granitemoeshared"):
        found = first(
            found,
            conditions.without_biases(config),
            conditions.has_own_head_dim(config),
            conditions.scaled_rope(config),
        )
    ignores = target in ("mixtral", "qwen2_moe", "qwen3_moe")
    return found or loads(conditions.sliding(config) if ignores else None)
