"""MoE architectures that other software knows, for dense models that fit them exactly.

A checkpoint in such an architecture needs no code of ours. One file per architecture or family,
each a `NativeTarget`: data, and the questions that data cannot answer (does this config fit?).
"""

from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.cohere2_moe import COHERE2_MOE
from upcycle.targets.native.encoder_decoders import NLLB_MOE, SWITCH_TRANSFORMERS
from upcycle.targets.native.ernie4_5_moe import ERNIE4_5_MOE
from upcycle.targets.native.glm4_moe import DOTS1, GLM4_MOE, SOLAR_OPEN
from upcycle.targets.native.gpt_oss import GPT_OSS
from upcycle.targets.native.granitemoe import GRANITEMOE, GRANITEMOE_SWA, GRANITEMOESHARED
from upcycle.targets.native.hunyuan_v1_moe import HUNYUAN_V1_MOE
from upcycle.targets.native.llama4_text import LLAMA4_TEXT
from upcycle.targets.native.mixtral import MIXTRAL
from upcycle.targets.native.olmo import FLEX_OLMO, OLMOE
from upcycle.targets.native.qwen_moe import QWEN2_MOE, QWEN3_5_MOE, QWEN3_MOE

# In the order in which they are tried: what the most software loads comes first.
NATIVE: dict[str, NativeTarget] = {
    target.model_type: target
    for target in (
        *(MIXTRAL, QWEN3_MOE, GRANITEMOE, GRANITEMOESHARED, QWEN2_MOE, QWEN3_5_MOE),
        *(ERNIE4_5_MOE, GLM4_MOE, COHERE2_MOE, HUNYUAN_V1_MOE, DOTS1, SOLAR_OPEN),
        *(FLEX_OLMO, OLMOE, GRANITEMOE_SWA, LLAMA4_TEXT, SWITCH_TRANSFORMERS, NLLB_MOE, GPT_OSS),
    )
}
