"""Whole models of transformers as ONNX files: with a cache where they generate text."""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_case import moe, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from upcycle.data.verification_inputs import Evaluation
from upcycle.errors import UnsupportedError
from upcycle.onnx.run import session
from upcycle.targets.onnx.decode import OnnxFiles
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.onnx.file_names import DECODER, ENCODER, MODEL
from upcycle.targets.traced.arguments import arguments_of
from upcycle.targets.traced.cache import cache_argument, cache_in, shape_of
from upcycle.targets.traced.parts import parts
from upcycle.verification.onnx.files import verify_onnx

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 60
# As in test_onnx_models.py: two float32 evaluations of a few layers of the same sizes.
TOLERANCE = 256 * torch.finfo(torch.float32).eps
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def llama() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    for i, block in enumerate(model.model.layers):
        block.mlp = moe("swiglu", bias=False, d_model=32, width=48, seed=i)
    return model


def gemma() -> nn.Module:
    """Layers that attend to the last three tokens, and layers that attend to all."""
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=3, layer_types=kinds))


def gpt2() -> nn.Module:
    """Positions that are learned."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    )


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0)
    )


def whisper() -> nn.Module:
    sides = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        **sides,
        max_source_positions=20,
        max_target_positions=32,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config)
    for block in (*model.model.encoder.layers, *model.model.decoder.layers):
        block.fc1, block.fc2 = moe("gelu", d_model=32, width=64), nn.Identity()
    return model


def written(
    make: Callable[[], nn.Module], example: dict[str, torch.Tensor], folder: Path
) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # the usual 0.02 would make every layer an identity
        if parameter.dim() == 2:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    stored = save(model, folder)
    for part in parts(model, arguments_of(model, example)):
        path = folder / f"{part.stem}.onnx"
        export_onnx(
            model, part.example, path=path, stored=stored, dynamic=part.axes, compute=part.compute
        )
        onnx.checker.check_model(path, full_check=True)
        names = [node.name for node in onnx.load(path, load_external_data=False).graph.node]
        assert all(names)
        assert len(set(names)) == len(names)
    return model


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory) -> tuple[nn.Module, Path]:
    """The model and its directory, for the tests that only read them."""
    folder = tmp_path_factory.mktemp("llama")
    return written(llama, {"input_ids": tokens(1, 4)}, folder), folder


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.manual_seed(length))


def decode(path: Path, ids: torch.Tensor, mask: torch.Tensor, step: int) -> torch.Tensor:
    """Logits of all positions, `step` tokens at a time, with the cache handed on."""
    runner = session(path)
    shapes = {value.name: value.shape for value in runner.get_inputs()}
    past = {
        name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    names = [value.name for value in runner.get_outputs()]
    logits = []
    for start in range(0, ids.shape[1], step):
        here = slice(start, start + step)
        feeds = {"input_ids": ids[:, here], "attention_mask": mask[:, : start + step]}
        feeds["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, here]
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
        made = dict(zip(names, runner.run(None, arrays | past), strict=True))
        past = {name: made[name.replace("past_key_values", "present")] for name in past}
        logits.append(torch.from_numpy(made["logits"]))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_one_file_reads_the_prompt_and_then_token_by_token(
    make, llama_files, tmp_path: Path
) -> None:
    if make is llama:
        model, tmp_path = llama_files
    else:
        model = written(make, {"input_ids": tokens(1, 4)}, tmp_path)
    path = tmp_path / MODEL
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0  # the first text is shorter: padding on its left
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
    kept = mask.bool()
    largest = out.logits[kept].abs().max()
    assert largest > 0.1
    for step in (1, 4, 9):
        error = (decode(path, ids, mask, step) - out.logits)[kept].abs().max()
        assert error <= TOLERANCE * largest, step
    forgetful = decode(path, ids[:, 6:], mask[:, 6:], 3)  # the past matters
    assert (forgetful - out.logits[:, 6:])[kept[:, 6:]].abs().max() > 1e-2 * largest

    inputs = {value.name: value.shape for value in session(path).get_inputs()}
    heads, width = inputs["past_key_values.1.value"][1::2]
    past, longer = ["batch", heads, "past", width], ["batch", heads, "past + sequence", width]
    names = [f"{i}.{what}" for i in (0, 1) for what in ("key", "value")]
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past + sequence"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{name}": past for name in names},
    }
    assert {value.name: value.shape for value in session(path).get_outputs()} == {
        "logits": ["batch", "sequence", VOCABULARY],
        **{f"present.{name}": longer for name in names},
    }


def test_nodes_are_named_by_their_modules(llama_files) -> None:
    graph = onnx.load(llama_files[1] / MODEL, load_external_data=False).graph
    names = {node.name for node in graph.node}
    assert "model/layers/0/self_attn/q_proj/MatMul" in names
    assert {f"model/layers/{i}/mlp/MoE" for i in (0, 1)} <= names
    assert not any(node.metadata_props for node in graph.node)
    scopes = {name.split("/")[0] for name in names if "/" in name}
    assert scopes == {"model", "lm_head"}


def test_the_printed_example_writes_the_text_that_pytorch_writes(llama_files) -> None:
    model, folder = llama_files
    words = {f"w{i}": i for i in range(VOCABULARY)}
    plain = Tokenizer(WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w2")
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)  # eos_token_id is 2
    script = Path(__file__).parents[1] / "docs" / "generate.py"
    assert len(script.read_text().splitlines()) <= 40
    prompt = "w5 w17 w30 w8"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(
        ids, do_sample=False, max_new_tokens=20, pad_token_id=2, eos_token_id=tokenizer.eos_token_id
    )
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(expected.split())) > 3
    assert runpy.run_path(str(script))["generate"](str(folder), prompt, 20) == expected


@pytest.mark.parametrize("make", [t5, whisper])
def test_encoder_and_decoder_are_two_files(make, tmp_path: Path) -> None:
    def inputs(batch: int, length: int, decoded: int) -> dict[str, torch.Tensor]:
        text = {"decoder_input_ids": tokens(batch, decoded)}
        if make is whisper:
            generator = torch.manual_seed(length)
            return {"input_features": torch.randn(batch, 8, 40, generator=generator), **text}
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, length - length // 3 :] = 0
        return {"input_ids": tokens(batch, length), "attention_mask": mask, **text}

    model = written(make, inputs(1, 4, 3), tmp_path)
    onnx_files = sorted(path.name for path in tmp_path.glob("*.onnx"))
    assert onnx_files == [DECODER, ENCODER]
    files = OnnxFiles(tmp_path)
    for given in (inputs(2, 7, 5), inputs(1, 3, 1), inputs(3, 1, 4)):
        made = files.outputs(given)
        with torch.no_grad():
            out = model(**given, use_cache=False)
        for name, array in made.items():
            reference = out[name]
            error = (torch.from_numpy(array) - reference).abs().max()
            assert error <= TOLERANCE * reference.abs().max(), name
    names = {value.name for value in session(tmp_path / DECODER).get_inputs()}
    assert {"past_key_values.1.decoder.key", "past_key_values.1.encoder.value"} <= names
    made = {value.name for value in session(tmp_path / ENCODER).get_outputs()}
    assert {"last_hidden_state", "present.1.encoder.value"} <= made


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8))


def clip() -> nn.Module:
    text = {**SIZES, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    groups = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return Wav2Vec2Model(
        Wav2Vec2Config(**SIZES, **convolutions, **groups, num_feat_extract_layers=2)
    )


def seen(batch: int, size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.manual_seed(size))}


def read_and_seen(batch: int, size: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(batch + 1, size), **seen(batch, size)}


def heard(batch: int, size: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 40 * size, generator=torch.manual_seed(size))}


@pytest.mark.parametrize(
    ("make", "inputs", "axes"),
    [
        (vit, seen, {"pixel_values": ["batch", 3, 16, 16]}),
        (
            clip,
            read_and_seen,
            {"input_ids": ["batch", "sequence"], "pixel_values": ["image_batch", 3, 16, 16]},
        ),
        (wav2vec2, heard, {"input_values": ["batch", "samples"]}),
    ],
)
def test_vision_and_audio(make, inputs, axes, tmp_path: Path) -> None:
    model = written(make, inputs(2, 5), tmp_path)
    assert {v.name: v.shape for v in session(tmp_path / MODEL).get_inputs()} == axes
    evaluation = Evaluation([inputs(batch, size) for batch, size in ((1, 2), (3, 6), (2, 4))])
    (found,) = verify_onnx(tmp_path, model, evaluation)
    assert found.error <= TOLERANCE


def test_verification_sees_a_file_of_another_model(tmp_path: Path) -> None:
    model = written(gpt2, {"input_ids": tokens(1, 4)}, tmp_path)
    evaluation = Evaluation([{"input_ids": tokens(2, 6)}])
    (found,) = verify_onnx(tmp_path, model, evaluation)
    assert found.error <= TOLERANCE
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, 32:64] *= 2  # other keys
    (found,) = verify_onnx(tmp_path, model, evaluation)
    assert found.error > 1e-3


def test_a_cache_that_a_graph_cannot_hand_on_is_refused() -> None:
    cache = DynamicCache()
    cache.layers.append(LinearAttentionLayer())
    with pytest.raises(UnsupportedError, match="layer 0 remembers a LinearAttentionLayer"):
        shape_of(cache)
    with pytest.raises(UnsupportedError, match="it returns NoneType where its cache should be"):
        shape_of(None)


REFUSED = "no key-value cache and generate slowly: {}; onnx.cache=false in the recipe"


def test_a_causal_model_that_reads_more_is_refused_unless_no_cache_is_wanted() -> None:
    model = gpt2().eval()
    example = {"input_ids": tokens(1, 4), "token_type_ids": tokens(1, 4)}
    with pytest.raises(UnsupportedError, match=REFUSED.format("it also reads token_type_ids")):
        parts(model, arguments_of(model, example))
    (part,) = parts(model, arguments_of(model, example), cache=False)
    assert list(part.example) == ["input_ids", "token_type_ids"]
    assert part.axes is None  # and none of them is of a cache


class OldNames(LlamaForCausalLM):
    """As before transformers 5.24, and as in the code that many checkpoints bring."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        past = {cache_argument(LlamaForCausalLM(self.config)): past_key_values}
        out = super().forward(input_ids, attention_mask, position_ids, **past, use_cache=use_cache)
        return SimpleNamespace(logits=out.logits, past_key_values=cache_in(out))


class NewNames(OldNames):
    """As since transformers 5.24."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        out = super().forward(input_ids, attention_mask, position_ids, cache, use_cache)
        return SimpleNamespace(logits=out.logits, cache=out.past_key_values)


class OtherNames(OldNames):
    """As some day."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        memory: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, memory, use_cache)


def small_llama(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


@pytest.mark.parametrize("kind", [OldNames, NewNames])
def test_a_cache_is_found_under_both_of_its_names(kind: type[nn.Module], tmp_path: Path) -> None:
    model = small_llama(kind)
    (part,) = parts(model, arguments_of(model, {"input_ids": tokens(1, 4)}))
    export_onnx(
        model,
        part.example,
        path=tmp_path / MODEL,
        stored={},
        dynamic=part.axes,
        compute=part.compute,
    )
    files = OnnxFiles(tmp_path)
    assert files.has_cache
    given = {"input_ids": tokens(2, 5)}
    with torch.no_grad():
        reference = model(**given).logits
    error = (torch.from_numpy(files.outputs(given)["logits"]) - reference).abs().max()
    assert error <= TOLERANCE * reference.abs().max()


def test_a_cache_under_another_name_is_refused() -> None:
    model = small_llama(OtherNames)
    with pytest.raises(
        UnsupportedError, match=REFUSED.format("its forward has no argument for a cache")
    ):
        parts(model, arguments_of(model, {"input_ids": tokens(1, 4)}))
