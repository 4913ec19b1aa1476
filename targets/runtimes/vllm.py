"""vLLM, by its source (registry and models of 2026, after 0.28); not run.

It renormalises the weights of mixtral and granitemoe always and reads ``norm_topk_prob`` elsewhere,
as transformers does. The number of tensor-parallel ranks may not exceed that of the experts.
"""

from upcycle.ir.spec import Plan
from upcycle.targets.runtimes import conditions
from upcycle.targets.runtimes.support import Config, Support, loads, refuses

NATIVE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text", "olmoe"),
    *("granitemoe", "granitemoeshared", "ernie4_5_moe", "glm4_moe", "llama4_text"),
)
GENERIC = "through its backend for transformers models"


def judge(target: str, config: Config, plan: Plan) -> Support:
    """Whether vLLM loads it and computes the same."""
    if target == "dots1":
        return loads("in versions up to 0.23.0, which still have this architecture")
    trusted = f"{GENERIC}, with --trust-remote-code, where that knows the dense class"
    found = conditions.served(target, config, plan, NATIVE, generic=GENERIC, trusted=trusted)
    if target == "qwen2_moe" and not config.get("qkv_bias", True):
        found = refuses("qkv_bias", "it always reads biases of queries, keys and values")
    if target in ("qwen3_moe", "granitemoe", "granitemoeshared"):
        found = found or conditions.without_biases(config)
    if target in ("qwen2_moe", "granitemoe", "granitemoeshared"):
        found = found or conditions.has_own_head_dim(config)
    return found or loads()
