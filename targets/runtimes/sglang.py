"""SGLang, by its source (the stored versions are of mixed age, 2024 to 2026); not run.

granitemoe, mixtral: the width of a head is hidden_size / num_attention_heads, and positions follow
``rope_theta`` alone. qwen2_moe: every layer is sparse.
"""

from upcycle.ir.spec import Plan
from upcycle.targets.runtimes import conditions
from upcycle.targets.runtimes.support import Config, Support, loads

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
    if target == "qwen2_moe":
        found = found or conditions.needs_every_layer(plan)
    if target in ("granitemoe", "granitemoeshared"):
        found = found or conditions.without_biases(config)
    if target in ("mixtral", "qwen2_moe", "granitemoe", "granitemoeshared"):
        found = found or conditions.has_own_head_dim(config)
    if target in ("mixtral", "granitemoe", "granitemoeshared"):
        found = found or conditions.scaled_rope(config)
    ignores = target in ("mixtral", "qwen2_moe", "qwen3_moe")
    return found or loads(conditions.sliding(config) if ignores else None)
