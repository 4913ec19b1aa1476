"""Text models of transformers: encoders, decoders, and encoders with decoders."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn
from zoo import ENCODER_DECODER, GROUPED, SIZES, T5, T5_START, TOKENS, Case, D, H

from upcycle.capture.capture import ExampleInputs

LAYERS = 3
STACK = {**SIZES, **TOKENS, "num_hidden_layers": LAYERS}


def tiny(cls: str, **options: Any) -> Callable[[], nn.Module]:
    """Makes a model of a transformers class, which is imported then."""

    def build() -> nn.Module:
        made = getattr(hf, cls)
        return made(made.config_class(**options))

    return build


def _encoder(cls: str, activation: str = "gelu", ffns: int = LAYERS, **options: Any) -> Case:
    return Case(tiny(cls, **{**STACK, **options}), ffns, "siblings", activation)


def _decoder(cls: str, activation: str = "swiglu", ffns: int = LAYERS, **options: Any) -> Case:
    options = {**STACK, **GROUPED, **options}
    return Case(tiny(cls, **options), ffns, "module", activation, generates=True)


def _sparse(cls: str, misses: int, **options: Any) -> Case:
    """A mixture of experts already."""
    options = {**STACK, **GROUPED, "moe_intermediate_size": 16, "num_experts_per_tok": 2, **options}
    return Case(tiny(cls, **options), 0, "", "", misses=misses)


def _pair(
    cls: str, activation: str = "gelu", placement: str = "inline", ffns: int = 4, **options: Any
) -> Case:
    return Case(tiny(cls, **{**TOKENS, **options}), ffns, placement, activation)


def _boxes(length: int = 7) -> Callable[[], ExampleInputs]:
    return lambda: {
        "input_ids": torch.zeros(2, length, dtype=torch.long),
        "bbox": torch.zeros(2, length, 4, dtype=torch.long),
    }


def with_changes(case: Case, **changes: Any) -> Case:
    """The case with other attributes."""
    return Case(**{**vars(case), **changes})


BART = {**ENCODER_DECODER, "num_hidden_layers": 2}
GPT = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, **TOKENS}
T5ISH = {**T5, **T5_START, "num_decoder_layers": 2}

ENCODERS: dict[str, Case] = {
    "bert_generation": _encoder("BertGenerationEncoder"),
    "bigbird": _encoder("BigBirdModel", "gelu_tanh", attention_type="original_full"),
    "bros": _encoder("BrosModel", hidden_size=64, intermediate_size=128),
    "camembert": _encoder("CamembertModel"),
    "convbert": _encoder("ConvBertModel", embedding_size=D),
    "data2vec_text": _encoder("Data2VecTextModel"),
    "deberta": _encoder("DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": _encoder("DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "electra": _encoder("ElectraModel", embedding_size=16),
    "ernie": _encoder("ErnieModel"),
    "esm": _encoder("EsmModel", mask_token_id=3),
    "eurobert": with_changes(_encoder("EuroBertModel", "swiglu", **GROUPED), placement="module"),
    "fnet": _encoder("FNetModel", "gelu_tanh"),
    "flaubert": Case(
        tiny("FlaubertModel", n_words=99, emb_dim=D, n_layers=LAYERS, n_heads=4, pad_index=0),
        LAYERS, "module", "gelu",
    ),
    "funnel": Case(
        tiny("FunnelModel", **TOKENS, block_sizes=[2, 2], num_decoder_layers=1, d_model=D,
             n_head=4, d_head=8, d_inner=H),
        5, "inline", "gelu_tanh",
    ),
    "layoutlm": _encoder("LayoutLMModel"),
    "layoutlmv3": _encoder("LayoutLMv3Model", coordinate_size=5, shape_size=6, visual_embed=False),
    "lilt": with_changes(
        _encoder("LiltModel", ffns=2 * LAYERS, hidden_size=48, channel_shrink_ratio=2),
        example=_boxes(),
    ),
    "longformer": _encoder("LongformerModel", attention_window=4),
    "luke": _encoder("LukeModel", entity_vocab_size=9),
    "markuplm": with_changes(  # one more embeds the path in the document
        _encoder("MarkupLMModel", "gelu, relu", LAYERS + 1, max_depth=5, xpath_unit_hidden_size=4),
        placement="inline, siblings",
    ),
    "megatron_bert": _encoder("MegatronBertModel"),
    "modernbert": Case(
        tiny("ModernBertModel", **STACK, cls_token_id=1, sep_token_id=2), LAYERS, "module", "geglu"
    ),
    "mpnet": _encoder("MPNetModel"),
    "mobilebert": _encoder(
        "MobileBertModel", "relu", 4 * LAYERS, embedding_size=16, intra_bottleneck_size=16,
        true_hidden_size=16,
    ),
    "nystromformer": _encoder(
        "NystromformerModel", "gelu_tanh", num_landmarks=7, segment_means_seq_len=7
    ),
    "reformer": Case(
        tiny("ReformerModel", **TOKENS, hidden_size=D, feed_forward_size=H,
             num_attention_heads=4, attention_head_size=8, attn_layers=["local", "local"],
             axial_pos_embds=False, local_attn_chunk_length=8),
        2, "siblings", "relu",
    ),
    "rembert": _encoder("RemBertModel", input_embedding_size=16),
    "roc_bert": _encoder("RoCBertModel"),
    "roformer": _encoder("RoFormerModel"),
    "splinter": _encoder("SplinterModel"),
    "squeezebert": _encoder(
        "SqueezeBertModel", embedding_size=D,
        **dict.fromkeys(["intermediate_groups", "output_groups", "post_attention_groups"], 1),
    ),
    "xlm": Case(
        tiny("XLMModel", n_words=99, emb_dim=D, n_layers=LAYERS, n_heads=4, pad_index=0),
        LAYERS, "module", "gelu",
    ),
    "xlm_roberta": _encoder("XLMRobertaForMaskedLM"),
    "xlm_roberta_xl": _encoder("XLMRobertaXLModel"),
    "xlnet": Case(
        tiny("XLNetModel", **TOKENS, d_model=D, n_layer=LAYERS, n_head=4, d_inner=H),
        LAYERS, "inline", "gelu",
    ),
    "xmod": _encoder("XmodModel", languages=["en_XX"], default_language="en_XX"),
    # The adapter of the language that the example has no token of is told of, in each layer.
    "xmod_two_languages": with_changes(
        _encoder("XmodModel", languages=["en_XX", "de_DE"], default_language="en_XX"),
        misses=LAYERS,
    ),
}  # fmt: skip

DECODERS: dict[str, Case] = {
    "apertus": _sparse("ApertusForCausalLM", LAYERS),
    "arcee": _decoder("ArceeForCausalLM", "relu2"),
    "bamba": _decoder(
        "BambaForCausalLM", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8,
        mamba_d_state=8, mamba_chunk_size=8,
    ),
    "biogpt": with_changes(_decoder("BioGptForCausalLM", "gelu"), placement="inline"),
    "bitnet": _sparse("BitNetForCausalLM", LAYERS),
    "codegen": _decoder("CodeGenForCausalLM", "gelu_tanh", **GPT, rotary_dim=4, n_inner=H),
    "cohere": _decoder("CohereForCausalLM"),
    "cohere2": _decoder("Cohere2ForCausalLM"),
    "ctrl": _decoder("CTRLLMHeadModel", "relu", **GPT, dff=H),
    "diffllama": _decoder("DiffLlamaForCausalLM"),
    "ernie4_5": _decoder("Ernie4_5ForCausalLM", head_dim=8),
    "exaone4": _decoder("Exaone4ForCausalLM"),
    "falcon_h1": with_changes(  # a factor after the contraction
        _decoder(
            "FalconH1ForCausalLM", mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8,
            mamba_d_state=8, mamba_chunk_size=8, head_dim=8,
        ),
        placement="inline",
    ),
    "falcon_new": _decoder(
        "FalconForCausalLM", "gelu", new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon_sequential": _decoder(
        "FalconForCausalLM", "gelu", parallel_attn=False, bias=True, alibi=True
    ),
    "gemma": _decoder("GemmaForCausalLM", "geglu_tanh", head_dim=8),
    "gemma2": _decoder("Gemma2ForCausalLM", "geglu_tanh", head_dim=8),
    "glm": _decoder("GlmForCausalLM", head_dim=8),
    "glm4": _decoder("Glm4ForCausalLM", head_dim=8),
    "gpt_bigcode": _decoder("GPTBigCodeForCausalLM", "gelu_tanh", **GPT),
    "gpt_neo": Case(
        tiny("GPTNeoForCausalLM", **SIZES, **TOKENS, num_layers=4, num_heads=4,
             attention_types=[[["global", "local"], 2]]),
        4, "module", "gelu_tanh", generates=True,
    ),
    "gpt_neox_japanese": _decoder("GPTNeoXJapaneseForCausalLM", "gelu"),
    "granite": _decoder("GraniteForCausalLM"),
    "helium": _decoder("HeliumForCausalLM", head_dim=8),
    "hunyuan": _decoder("HunYuanDenseV1ForCausalLM", head_dim=8),
    "lfm2": _decoder(
        "Lfm2ForCausalLM", full_attn_idxs=[1], layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    ),
    "mamba": _sparse("MambaForCausalLM", 0, state_size=8),
    "mamba2": _sparse(
        "Mamba2ForCausalLM", 0, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
    ),
    "mpt": with_changes(  # its MLP adds the residual
        _decoder("MptForCausalLM", "gelu", d_model=D, n_heads=4, n_layers=3, expansion_ratio=2),
        placement="inline",
    ),
    "nemotron": _decoder("NemotronForCausalLM", "relu2"),
    "olmo": _decoder("OlmoForCausalLM"),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "olmo3": _decoder("Olmo3ForCausalLM"),
    "openai_gpt": _decoder("OpenAIGPTLMHeadModel", "gelu_tanh", **GPT),
    "persimmon": _decoder("PersimmonForCausalLM", "relu2"),
    "phi": _decoder("PhiForCausalLM", "gelu_tanh"),
    "qwen2": _decoder("Qwen2ForCausalLM"),
    "recurrent_gemma": _decoder("RecurrentGemmaForCausalLM", "geglu_tanh", lru_width=D),
    "rwkv": with_changes(
        _decoder("RwkvForCausalLM", "relu2", attention_hidden_size=D, rescale_every=0),
        placement="inline",
    ),
    "seed_oss": _decoder("SeedOssForCausalLM", head_dim=8),
    "smollm3": _decoder("SmolLM3ForCausalLM"),
    "stablelm": _decoder("StableLmForCausalLM"),
    "starcoder2": _decoder("Starcoder2ForCausalLM", "gelu_tanh"),
    "xglm": with_changes(
        _decoder("XGLMForCausalLM", "gelu", d_model=D, ffn_dim=H, num_layers=3, attention_heads=4),
        placement="inline",
    ),
}  # fmt: skip

SPARSE: dict[str, Case] = {
    "gpt_oss": _sparse("GptOssForCausalLM", LAYERS, num_local_experts=4, head_dim=8),
    "mixtral": _sparse("MixtralForCausalLM", LAYERS, num_local_experts=4),
    "olmoe": _sparse("OlmoeForCausalLM", LAYERS, num_experts=4),
    "qwen3_moe": _sparse("Qwen3MoeForCausalLM", LAYERS, num_experts=4, head_dim=8),
}

PAIRS: dict[str, Case] = {
    "bigbird_pegasus": _pair(
        "BigBirdPegasusModel", "gelu_tanh", **BART, attention_type="original_full"
    ),
    "blenderbot": _pair("BlenderbotModel", **BART),
    "blenderbot_small": _pair("BlenderbotSmallModel", **BART),
    "led": _pair("LEDModel", **BART, attention_window=4),
    "longt5": _pair("LongT5Model", "relu", "module", **T5ISH, local_radius=3),
    "m2m100": _pair("M2M100Model", "relu", **BART),
    "marian": _pair("MarianModel", **BART),
    "mbart": _pair("MBartModel", **BART),
    "mt5": _pair("MT5Model", "geglu_tanh", "module", **T5ISH),
    "mvp": _pair("MvpModel", **BART),
    "pegasus": _pair("PegasusModel", **BART),
    "pegasus_x": _pair("PegasusXModel", **BART, num_global_tokens=2, block_size=4),
    "plbart": _pair("PLBartModel", **BART),
    "prophetnet": _pair(
        "ProphetNetModel", "gelu", "module", hidden_size=D, encoder_ffn_dim=H, decoder_ffn_dim=H,
        num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, ngram=2,
    ),
    "umt5": _pair("UMT5Model", "geglu_tanh", "module", **T5ISH),
}  # fmt: skip

TEXT: dict[str, Case] = {**ENCODERS, **DECODERS, **SPARSE, **PAIRS}
