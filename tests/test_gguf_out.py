"""GGUF files of MoE models: tensors, metadata, tokenizers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import pytest
import small_models
import torch
from command_line import run
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import upcycle
from upcycle.errors import UnsupportedError, UsageError, VerificationError
from upcycle.ir.rounding import ROUNDING
from upcycle.targets.gguf.architectures import ARCHITECTURES
from upcycle.targets.gguf.metadata import context_length
from upcycle.targets.gguf.write import prepared
from upcycle.verification.checks import MISNAMED, STEPS, UNEQUAL, raise_if_any_failed
from upcycle.verification.gguf import verify_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

EACH = {"attn_norm": 1, "attn_q": 1, "attn_k": 1, "attn_v": 1, "attn_output": 1}
EXPERTS = {"ffn_gate_inp": 1, "ffn_gate_exps": 1, "ffn_up_exps": 1, "ffn_down_exps": 1}
SHARED = {"ffn_gate_shexp": 1, "ffn_up_shexp": 1, "ffn_down_shexp": 1}
NORMS = {"attn_q_norm": 1, "attn_k_norm": 1}


def written(folder: Path, kind: str, gguf_type: Any = None, **changes: Any) -> Any:
    """The reader of the file of a small model, and what was found."""
    source = gguf_models.saved(kind, folder / "moe", **changes)
    done = upcycle.export(source, folder / "out", target="gguf", gguf_type=gguf_type)
    assert [path.suffix for path in (folder / "out").iterdir()] == [".gguf"]
    (path,) = (folder / "out").iterdir()
    return gguf.GGUFReader(path), done


def field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def tensors(reader: Any) -> dict[str, torch.Tensor]:
    return {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype("f4")).reshape(
            [int(n) for n in t.shape[::-1]]
        )
        for t in reader.tensors
    }


def refusal(kind: str, folder: Path, tokenizer: Any = None, **changes: Any) -> str:
    source = gguf_models.saved(kind, folder / "moe", tokenizer, **changes)
    with pytest.raises(UnsupportedError) as caught:
        upcycle.export(source, folder / "out", target="gguf")
    assert not (folder / "out").exists()
    assert str(caught.value).startswith("gguf: ")
    return str(caught.value)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_written_with_each_of_its_tensors(tmp_path: Path, kind: str) -> None:
    reader, done = written(tmp_path, kind)
    assert done.form == "gguf, f32"
    assert {check.what for check in done.checks} == {MISNAMED, UNEQUAL}
    arch = field(reader, "general.architecture")
    assert arch == ARCHITECTURES[kind].name
    model = gguf_models.moe(kind)
    tied = 0 if "output.weight" not in tensors(reader) else model.lm_head.weight.numel()
    tied = tied if model.config.tie_word_embeddings else 0
    numbers = sum(p.numel() for p in model.parameters())
    numbers += sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    assert sum(t.numel() for t in tensors(reader).values()) == numbers + tied
    assert field(reader, f"{arch}.expert_count") == 4
    assert field(reader, f"{arch}.expert_used_count") == 2
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[ARCHITECTURES[kind].arch]}
    for name in tensors(reader):
        bare = name.rpartition(".")[0]
        assert bare in known or ".".join(["blk", "{bid}", bare.split(".")[-1]]) in known


def test_names_of_a_layer(tmp_path: Path) -> None:
    reader, _ = written(tmp_path, "glm4_moe")
    names = {name for name in tensors(reader) if name.startswith("blk.1.")}
    parts = {**EACH, **EXPERTS, **SHARED, **NORMS, "post_attention_norm": 1}
    expected = {f"blk.1.{part}.weight" for part in parts} | {"blk.1.exp_probs_b.bias"}
    assert names == expected | {f"blk.1.attn_{part}.bias" for part in "qkv"}
    assert "blk.0.ffn_gate.weight" in tensors(reader)  # the first layer is dense
    assert field(reader, "glm4moe.leading_dense_block_count") == 1
    assert field(reader, "glm4moe.rope.dimension_count") == 8  # half of a head
    assert field(reader, "glm4moe.expert_weights_scale") == 1.5
    assert field(reader, "glm4moe.expert_shared_count") == 2


def test_queries_and_keys_of_a_llama_are_turned_from_halves_to_neighbours(tmp_path: Path) -> None:
    reader, _ = written(tmp_path, "mixtral")
    found, model = tensors(reader), gguf_models.moe("mixtral")
    attention = model.model.layers[1].self_attn
    for weight, name, heads in ((attention.q_proj, "attn_q", 4), (attention.k_proj, "attn_k", 2)):
        rows = [8 * h + half * 4 + i for h in range(heads) for i in range(4) for half in (0, 1)]
        assert torch.equal(found[f"blk.1.{name}.weight"], weight.weight[rows])
    assert torch.equal(found["blk.1.attn_v.weight"], attention.v_proj.weight)
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"], experts.gate_up_proj[:, :64])
    assert torch.equal(found["blk.1.ffn_up_exps.weight"], experts.gate_up_proj[:, 64:])
    assert torch.equal(found["blk.1.ffn_down_exps.weight"], experts.down_proj)
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)


def test_other_architectures_keep_their_rows(tmp_path: Path) -> None:
    reader, _ = written(tmp_path, "qwen3_moe")
    attention = gguf_models.moe("qwen3_moe").model.layers[1].self_attn
    assert torch.equal(tensors(reader)["blk.1.attn_q.weight"], attention.q_proj.weight)
    assert field(reader, "qwen3moe.attention.key_length") == 16
    assert field(reader, "qwen3moe.expert_feed_forward_length") == 32


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types_of_weights(tmp_path: Path, kind: str) -> None:
    reader, done = written(tmp_path, "mixtral", kind)
    types = {t.name: t.tensor_type for t in reader.tensors}
    wanted = Type[kind.upper()]
    assert types["blk.0.ffn_gate_exps.weight"] == types["token_embd.weight"] == wanted
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == Type.F32
    assert field(reader, "general.file_type") == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    assert done.rounded is not None
    assert (STEPS in {check.what for check in done.checks}) == (kind == "q8_0")
    weight = gguf_models.moe("mixtral").model.layers[0].mlp.experts.down_proj
    found = tensors(reader)["blk.0.ffn_down_exps.weight"]
    if kind == "q8_0":
        step = weight.reshape(-1, 32).abs().amax(-1, keepdim=True) / 127
        error = (found - weight).reshape(-1, 32).abs()
        assert (error <= step * (0.5 + 127 * 2**-11)).all()
    else:
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
        assert torch.equal(found, weight.to(dtype).float())


def test_the_type_of_the_model_is_the_default_and_is_exact(tmp_path: Path) -> None:
    gguf_models.moe("qwen3_moe").bfloat16().save_pretrained(tmp_path / "moe")
    gguf_models.byte_tokenizer().save_pretrained(tmp_path / "moe")
    done = upcycle.export(tmp_path / "moe", tmp_path / "out", target="gguf")
    assert done.form == "gguf, bf16"
    assert done.rounded is None
    assert (tmp_path / "out" / "model-bf16.gguf").is_file()


def test_rows_that_blocks_do_not_divide_stay_wider(tmp_path: Path) -> None:
    reader, _ = written(tmp_path, "qwen2_moe", "q8_0")  # experts of 16 neurons
    types = {t.name: t.tensor_type for t in reader.tensors}
    assert types["blk.0.ffn_down_exps.weight"] == Type.F16
    assert types["blk.0.ffn_up_exps.weight"] == Type.Q8_0


def test_a_weight_out_of_range_of_float16_is_refused(tmp_path: Path) -> None:
    model = gguf_models.moe("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = 1e5
    model.save_pretrained(tmp_path / "moe")
    gguf_models.byte_tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(UnsupportedError, match="take bf16 or f32"):
        upcycle.export(tmp_path / "moe", tmp_path / "out", target="gguf", gguf_type="f16")
    upcycle.export(tmp_path / "moe", tmp_path / "out", target="gguf", gguf_type="bf16")


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.0.ffn_up_exps.weight"])
def test_a_file_with_a_changed_weight_does_not_pass(tmp_path: Path, kind: Any, name: str) -> None:
    reader, _ = written(tmp_path, "mixtral", kind)
    offset = next(int(t.data_offset) for t in reader.tensors if t.name == name)
    path = tmp_path / "out" / f"model-{kind}.gguf"
    content = prepared(gguf_models.loaded(tmp_path / "moe"))
    raise_if_any_failed(verify_gguf(path, content))
    data = bytearray(path.read_bytes())
    data[offset + 3] ^= 0x41
    path.write_bytes(data)
    failed = [check.what for check in verify_gguf(path, content) if not check.passed]
    assert failed == [UNEQUAL if kind == "f32" else STEPS]


def test_a_file_that_lacks_a_tensor_does_not_pass(tmp_path: Path) -> None:
    written(tmp_path, "mixtral")
    content = prepared(gguf_models.loaded(tmp_path / "moe"))
    content.extra["output_b.weight"] = torch.zeros(3)
    with pytest.raises(VerificationError, match="missing or that the model does not have"):
        raise_if_any_failed(verify_gguf(tmp_path / "out" / "model-f32.gguf", content))


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_file_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    written(tmp_path, kind)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    read: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model-f32.gguf", config=config, dtype=torch.float32
    )
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        ours, theirs = gguf_models.moe(kind)(ids).logits, read.eval()(ids).logits
    # the same float32 weights in the same class: sums in another order
    assert (ours - theirs).abs().max() <= ROUNDING[torch.float32] * ours.abs().max()


def test_embeddings_are_repeated_where_an_output_matrix_is_read(tmp_path: Path) -> None:
    reader, _ = written(tmp_path, "qwen2_moe")
    found = tensors(reader)
    assert torch.equal(found["output.weight"], found["token_embd.weight"])
    reader, _ = written(tmp_path / "b", "granitemoe")
    assert "output.weight" not in tensors(reader)


def test_granite_has_its_factors(tmp_path: Path) -> None:
    reader, _ = written(tmp_path, "granitemoe")
    named = ("embedding_scale", "residual_scale", "logit_scale", "attention.scale")
    assert [field(reader, f"granitemoe.{name}") for name in named] == [3.0, 0.5, 2.0, 0.25]


LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


def test_scaled_positions(tmp_path: Path) -> None:
    reader, done = written(tmp_path, "mixtral", rope_parameters=LLAMA3)
    factors = tensors(reader)["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(4) / 4)
    scaled = gguf_models.moe("mixtral", rope_parameters=LLAMA3).model.rotary_emb.inv_freq
    # a power, a division and the rounding of the stored factor, each good to an ulp or two
    assert ((plain / factors - scaled).abs() <= 8 * torch.finfo(torch.float32).eps * scaled).all()
    assert done.rounded is None
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 32
    reader, _ = written(tmp_path / "b", "qwen3_moe", rope_parameters=yarn)
    assert field(reader, "qwen3moe.rope.scaling.type") == "yarn"
    assert field(reader, "qwen3moe.rope.scaling.original_context_length") == 32


def test_the_context_is_as_long_as_a_window(tmp_path: Path) -> None:
    reader, _ = written(tmp_path, "mixtral", sliding_window=24)
    assert field(reader, "llama.context_length") == 24
    config = AutoConfig.for_model("dots1", max_position_embeddings=64, sliding_window=8)
    assert context_length(config) == 64  # no layer slides


REFUSED = {
    "norm": ("olmoe", {"norm_topk_prob": True}, "graph has weights `softmax`"),
    "no norm": ("qwen3_moe", {"norm_topk_prob": False}, "graph has weights `renormalised`"),
    "activation": ("mixtral", {"hidden_act": "gelu"}, "it computes SwiGLU, not gelu"),
    "llama3": ("qwen3_moe", {"rope_parameters": LLAMA3}, "scale positions by llama3"),
    "fewer keys": ("dots1", {"num_key_value_heads": 2}, "as many as there are heads, 4"),
    "head_dim": ("qwen2_moe", {"head_dim": 16}, "head_dim"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "not clipped"),
    "no shared": ("dots1", {"n_shared_experts": 0}, "always has a shared expert"),
    "groups": ("glm4_moe", {"n_group": 2, "topk_group": 1}, "groups of experts"),
    "bias": ("qwen3_moe", {"attention_bias": True}, "no place for model.layers.0.self_attn.o_proj"),
    "dense": ("qwen2_moe", {"mlp_only_layers": [1]}, "layer 1 is dense"),
    "dense first": ("qwen3_moe", {"mlp_only_layers": [0]}, "layer 0 is dense"),
    "the end": (
        "ernie4_5_moe",
        {"moe_layer_start_index": 0, "moe_layer_end_index": 0},
        "dense layers stand at the start",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    kind, changes, reason = REFUSED[case]
    assert reason in refusal(kind, tmp_path, **changes)


def test_unknown_architectures_are_refused_with_those_that_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("flex_olmo", **{**gguf_models.BASE, "num_experts": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    gguf_models.byte_tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(UnsupportedError, match=r"flex_olmo: it has no such architecture.*mixtral"):
        upcycle.export(tmp_path / "moe", tmp_path / "out", target="gguf")


def test_layers_of_upcycle_are_refused_and_dense_models_too(tmp_path: Path) -> None:
    run("convert", "sample:bert-tiny", "--recipe", "sparse-upcycling", "--out", tmp_path / "moe")
    with pytest.raises(
        UnsupportedError, match=r"runs no code that comes with a model; `target=native`"
    ):
        upcycle.export(tmp_path / "moe", tmp_path / "out", target="gguf")
    small_models.saved("llama", tmp_path / "dense")
    with pytest.raises(UsageError, match="convert a dense model"):
        upcycle.export(tmp_path / "dense", tmp_path / "out", target="gguf")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    gguf_models.moe("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.raises(UnsupportedError, match="has no tokenizer"):
        upcycle.export(tmp_path / "moe", tmp_path / "out", target="gguf")


@pytest.mark.parametrize("name", gguf_models.CUTS)
def test_the_cut_into_words_has_llama_cpps_name(tmp_path: Path, name: str) -> None:
    tokenizer = gguf_models.byte_tokenizer(*gguf_models.CUTS[name])
    tokenizer.chat_template = "{{ messages }}"
    reader, _ = written_with(tokenizer, tmp_path)
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == name
    assert field(reader, "tokenizer.chat_template") == "{{ messages }}"
    tokens, kinds = (field(reader, f"tokenizer.ggml.{n}") for n in ("tokens", "token_type"))
    assert len(tokens) == len(kinds) == gguf_models.WORDS
    assert tokens[:2] == ["<|end|>", "<|start|>"]
    assert kinds[:2] == [gguf.TokenType.CONTROL] * 2
    last = tokenizer.convert_tokens_to_ids("<tool>")
    assert (tokens[last], kinds[last]) == ("<tool>", gguf.TokenType.USER_DEFINED)
    assert (tokens[-1], kinds[-1]) == ("[PAD639]", gguf.TokenType.UNUSED)
    assert field(reader, "tokenizer.ggml.eos_token_id") == 0
    assert field(reader, "tokenizer.ggml.bos_token_id") == 1
    assert not field(reader, "tokenizer.ggml.add_bos_token")
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]


def written_with(tokenizer: Any, folder: Path) -> Any:
    source = gguf_models.saved("mixtral", folder / "moe", tokenizer)
    done = upcycle.export(source, folder / "out", target="gguf")
    return gguf.GGUFReader(folder / "out" / "model-f32.gguf"), done


def test_pieces_have_scores_in_the_order_of_their_merges(tmp_path: Path) -> None:
    reader, _ = written_with(gguf_models.piece_tokenizer(), tmp_path)
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_space_prefix")
    tokens = field(reader, "tokenizer.ggml.tokens")
    scores = dict(zip(tokens, field(reader, "tokenizer.ggml.scores"), strict=True))
    assert scores["th"] > scores["he"] > scores["the"] > scores["an"] > scores["z"]
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert kinds[0] == gguf.TokenType.UNKNOWN
    assert kinds[tokens.index("<0x41>")] == gguf.TokenType.BYTE


def without_end() -> Any:
    fast = gguf_models.byte_tokenizer()
    fast.eos_token = None
    return fast


def word_pieces() -> Any:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="a")


def larger() -> Any:
    fast = gguf_models.byte_tokenizer()
    fast.add_tokens([f"<{i}>" for i in range(400)])
    return fast


TOKENIZERS = {
    "kind": (word_pieces, "this is WordPiece"),
    "cut": (
        lambda: gguf_models.byte_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Punctuation()])),
        "no pre-tokenizer of llama.cpp is known here.*Punctuation.*smollm",
    ),
    "whole words": (lambda: gguf_models.byte_tokenizer(gguf_models.GPT2, True), "no pre-token"),
    "order": (lambda: gguf_models.piece_tokenizer(wrong=True), "merges 'the' in an order"),
    "end": (without_end, "no token for the end of a text"),
    "size": (larger, "embeddings for 640; is it the tokenizer of this model"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path: Path, case: str) -> None:
    make, reason = TOKENIZERS[case]
    with pytest.raises(UnsupportedError, match=reason):
        written_with(make(), tmp_path)


def test_the_command_from_a_dense_model_to_llama_cpp(tmp_path: Path) -> None:
    small_models.saved("llama", tmp_path / "dense")
    gguf_models.byte_tokenizer().save_pretrained(tmp_path / "dense")
    model = small_models.llama(vocab_size=gguf_models.WORDS)
    model.save_pretrained(tmp_path / "dense")
    options = ("--recipe", "sparse-upcycling", "--set", "experts.count=4")
    run("convert", tmp_path / "dense", *options, "--target", "safetensors", "--out", tmp_path / "m")
    to = ("--target", "gguf", "--gguf-type", "q8_0", "--json")
    report = json.loads(run("export", tmp_path / "m", *to, "--out", tmp_path / "g").stdout)
    assert report["form"] == "gguf, q8_0"
    assert [*report["files"]] == ["model-q8_0.gguf"]
    assert report["rounded"]["relative"] > 0
    text = run("export", tmp_path / "m", *to[:-1], "--out", tmp_path / "h").stdout
    assert "likeliest token is the same" in " ".join(text.split())
    wrong = run("export", tmp_path / "m", "--gguf-type", "q2_k", "--out", tmp_path / "i", code=2)
    assert "q8_0" in wrong.stderr
    other = run("export", tmp_path / "m", "--gguf-type", "f16", "--out", tmp_path / "i", code=2)
    assert "--gguf-type f16: it is for --target gguf" in other.stderr
