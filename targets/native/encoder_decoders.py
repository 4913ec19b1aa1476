"""MoE architectures with an encoder: Switch Transformers holds T5 v1.0, NLLB-MoE nothing.

Router of Switch: the best expert alone, times its probability, in float32. Its experts have a
capacity, which is set beyond reach. Every layer is sparse. Read in transformers 5.23
(``models/switch_transformers``, ``models/nllb_moe``).
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import DenseArchitecture, NativeTarget, RouterRule, Stacks


def _layers(config: PreTrainedConfig) -> list[str]:
    encoder = [f"encoder.block.{i}.layer.1" for i in range(config.num_layers)]
    return encoder + [f"decoder.block.{i}.layer.2" for i in range(config.num_decoder_layers)]


def _fits(config: PreTrainedConfig) -> str | None:
    if config.feed_forward_proj != "relu":
        return f"feed_forward_proj is {config.feed_forward_proj}, and its experts have no gate"
    if not getattr(config, "scale_decoder_outputs", True):
        return "its outputs are not scaled, which belongs to T5 v1.1"
    return None


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_sparse_encoder_layers": config.num_layers,
        "num_sparse_decoder_layers": config.num_decoder_layers,
        "dense_act_fn": "relu",
    }


T5 = DenseArchitecture(
    "T5ForConditionalGeneration",
    absent=("is_decoder",),
    fits=_fits,
    common=(
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("d_kv", "d_model", "dropout_rate", "initializer_factor", "is_encoder_decoder"),
        *("layer_norm_epsilon", "num_decoder_layers", "num_heads", "num_layers"),
        *("relative_attention_max_distance", "relative_attention_num_buckets"),
        *("tie_word_embeddings", "use_cache", "vocab_size"),
    ),
    checked=("feed_forward_proj", "d_ff"),
    ignored=("classifier_dropout",),
    fields=_fields,
    activation="relu",
    layers=_layers,
    mlp="DenseReluDense",
    roles=("wi", "wo"),
    dropout=True,
)

SWITCH_TRANSFORMERS = NativeTarget(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    sources={"t5": T5},
    forms=(RouterRule("softmax", renormalise=False, hot=True),),
    width="d_ff",
    constants={
        "expert_capacity": 2**31 - 1,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "router_jitter_noise": 0.0,
    },
    router="{layer}.mlp.router.classifier.weight",
    experts=Stacks("{layer}.mlp.experts.expert_{expert}.{matrix}.weight", ("wi", "wo")),
    most_chosen=1,
    grouped=False,
    auto_class="AutoModelForSeq2SeqLM",
)
NLLB_MOE = NativeTarget(
    model_type="nllb_moe",
    architecture="NllbMoeForConditionalGeneration",
    sources={"m2m_100": DenseArchitecture("M2M100ForConditionalGeneration")},
    refused="transformers 5.23 runs only its first two experts, whichever the router chooses",
)
