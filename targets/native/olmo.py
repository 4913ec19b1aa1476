"""The MoE siblings of OLMo: FlexOlmo holds OLMo 2, OLMoE does not.

Router: softmax, top-k, weights divided by their sum if ``norm_topk_prob``. Attention with norms of
queries and keys over their full width. FlexOlmo has its norms after attention and FFN, as OLMo 2;
OLMoE has them before. Read in transformers 5.23 (``models/flex_olmo``, ``models/olmoe``).
"""

from upcycle.targets.native.architecture import (
    NORM_TOPK_PROB,
    DenseArchitecture,
    NativeTarget,
)

OLMO2 = DenseArchitecture("Olmo2ForCausalLM", carried=("attention_bias",))

FLEX_OLMO = NativeTarget(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    sources={"olmo2": OLMO2},
    forms=NORM_TOPK_PROB,
    width="intermediate_size",
    constants={"output_router_logits": False},
)
OLMOE = NativeTarget(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    sources={"olmo2": OLMO2},
    refused="its norms stand before attention and FFN, and those of olmo2 after them",
)
