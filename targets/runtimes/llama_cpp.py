"""llama.cpp, by the converter and the graphs that llama-cpp-python 0.3.36 contains.

Whether the weights of the chosen experts are divided by their sum is fixed in the graph of most
architectures, whatever ``norm_topk_prob`` says. Each of them makes every layer sparse but those
with a count of leading dense layers. qwen2moe computes the gate of its shared expert as
silu(x) / x, so that a gate of zero is NaN (our writer never makes one); its shared expert and an
output matrix of its own are not optional. granitemoe and qwen2moe derive the width of a head.
glm4_moe and solar_open need tokens that only their own tokenizers have. Read: ``conversion/*.py``,
``src/models/*.cpp``. Run by the tests: mixtral, qwen2_moe, qwen3_moe.
"""

from upcycle.ir.spec import Plan
from upcycle.targets.runtimes import conditions
from upcycle.targets.runtimes.support import CUSTOM, PLAIN, Config, Support, loads, refuses

# Whether its graph divides the weights of the chosen experts by their sum.
GRANITE = ("granitemoe", "granitemoeshared", "granitemoe_swa")
RENORMALISES = {
    **dict.fromkeys(("mixtral", "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text"), True),
    **dict.fromkeys((*GRANITE, "ernie4_5_moe"), True),
    **dict.fromkeys(("qwen2_moe", "olmoe"), False),
}
READS_NORM = ("cohere2_moe", "dots1")  # from the file
READS_WINDOWS = ("cohere2_moe", "granitemoe_swa")
ABSENT = {
    **dict.fromkeys(("flex_olmo", "switch_transformers"), "it has no such architecture"),
    "llama4_text": "its converter reads only the multimodal Llama4ForConditionalGeneration",
    "hunyuan_v1_moe": "its converter reads other fields than transformers writes",
    "glm4_moe": "its converter wants the tokens of GLM's own tokenizer",
    "solar_open": "its converter wants the tokens of Solar's own tokenizer",
    "gpt_oss": "it computes SwiGLU with alpha 1.702, and the experts here need 1",
    **dict.fromkeys((CUSTOM, PLAIN), "it runs no code that comes with a model"),
}
MOST_EXPERTS = 1024
SENTENCEPIECE = "its converter reads the words from tokenizer.model, and no tokenizer.json will do"


def judge(target: str, config: Config, plan: Plan) -> Support:
    """Whether its converter reads it and its graph computes the same."""
    if target in ABSENT:
        return refuses("MODEL" if target == PLAIN else "model_type", ABSENT[target])
    if target not in RENORMALISES and target not in READS_NORM:
        return refuses("model_type", "upcycle does not know whether it has this architecture")
    refusal = (
        conditions.other_activation(config)
        or other_norm(target, config)
        or _experts(plan)
        or _special(target, config)
    )
    if target not in READS_NORM:  # those have leading dense layers
        refusal = refusal or conditions.needs_every_layer(plan)
    return refusal or loads(
        conditions.sliding(config) if target not in READS_WINDOWS else None,
        _quantised(plan),
        SENTENCEPIECE if target == "ernie4_5_moe" else None,
    )


def other_norm(target: str, config: Config) -> Support | None:
    """Its graph normalises the weights of the chosen experts, and `config` does not, or back."""
    fixed = RENORMALISES.get(target)
    if fixed is None or config.get("norm_topk_prob", fixed) == fixed:
        return None
    wanted = "renormalised" if fixed else "softmax"
    return refuses("router.weights", f"its graph has weights `{wanted}` for this architecture")


def _experts(plan: Plan) -> Support | None:
    most = max(spec.num_experts for spec in plan.specs)
    if most <= MOST_EXPERTS:
        return None
    return refuses("experts.count", f"it has at most {MOST_EXPERTS} experts, and here are {most}")


def _special(target: str, config: Config) -> Support | None:
    if target == "qwen2_moe":
        if not config.get("shared_expert_intermediate_size"):
            return refuses("experts.shared", "its qwen2moe always has a shared expert")
        if config.get("tie_word_embeddings"):
            return refuses("tie_word_embeddings", "its qwen2moe has an output matrix of its own")
        return conditions.has_own_head_dim(config)
    if target in GRANITE:
        return conditions.has_own_head_dim(config)
    if target == "dots1":
        if config.get("scoring_func") != "sigmoid":
            return refuses("scoring_func", "without it its converter writes no rule for the scores")
        return conditions.as_many_key_heads(config)
    if target == "ernie4_5_moe" and (count := config.get("moe_num_shared_experts", 0)):
        derived = config["intermediate_size"] // config["num_key_value_heads"]
        if count * config["moe_intermediate_size"] != derived:
            return refuses("experts.shared", f"its converter derives a shared width of {derived}")
    joins = config.get("shared_expert_combination_strategy", "average")
    if target == "cohere2_moe" and config.get("num_shared_experts") and joins != "average":
        return refuses("experts.shared", "it averages shared and routed experts")
    return None


def _quantised(plan: Plan) -> str | None:
    widths = {spec.width for spec in plan.specs} | {spec.ffn.d_model for spec in plan.specs}
    if all(width % 256 == 0 for width in widths):
        return None
    if all(width % 32 == 0 for width in widths):
        return "k-quants want widths that are multiples of 256; Q8_0 and the like hold it"
    return "its quantised types want widths that are multiples of 32; F16 and F32 hold it"
