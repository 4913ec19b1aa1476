"""llama.cpp computes from our GGUF files what transformers computes, and reads the same tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import torch
from llama_case import EPS, ULPS, greedy, logits_of, opened

import upcycle
from upcycle.targets.gguf.architectures import ARCHITECTURES
from upcycle.targets.runtimes import llama_cpp

pytestmark = pytest.mark.usefixtures("one_thread")

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen3_moe", {"rope_parameters": YARN}),
    "llama3": ("mixtral", {"rope_parameters": LLAMA3}),
    "linear": ("granitemoe", {"rope_parameters": LINEAR}),
    "llama3 in granite": ("granitemoeshared", {"rope_parameters": LLAMA3}),
    "own width of a head": ("granitemoe", {"head_dim": 16}),
    "weights as they are": ("glm4_moe", {"norm_topk_prob": False, "use_qk_norm": False}),
    "biases": ("olmoe", {"attention_bias": False, "tie_word_embeddings": True}),
    "untied": ("qwen2_moe", {"tie_word_embeddings": False, "qkv_bias": False}),
}
CASES = {**{kind: (kind, {}) for kind in ARCHITECTURES}, **OTHERS}


def exported(folder: Path, kind: str, tokenizer: Any = None, **changes: Any) -> Path:
    source = gguf_models.saved(kind, folder / "moe", tokenizer, **changes)
    upcycle.export(source, folder / "out", target="gguf")
    return folder / "out" / "model-f32.gguf"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(tmp_path: Path, case: str) -> None:
    kind, changes = CASES[case]
    llama = opened(exported(tmp_path, kind, **changes))
    model = gguf_models.moe(kind, **changes)
    ids = [int(i) for i in torch.randint(3, 500, (60,))]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    allowed = ULPS * EPS * np.abs(theirs).max()
    assert np.abs(logits_of(llama, ids) - theirs).max() <= allowed
    made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    new = made[0, len(ids) :].tolist()
    assert greedy(llama, ids, len(new)) == new


OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe, divided": ("olmoe", {"norm_topk_prob": True}),
    "qwen3_moe, not divided": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2_moe, divided": ("qwen2_moe", {"norm_topk_prob": True}),
    "clipped": ("olmoe", {"clip_qkv": 0.5}),
    "groups": ("glm4_moe", {"n_group": 2, "topk_group": 1}),
}
NOT_LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "dots1, fewer keys": ("dots1", {"num_key_value_heads": 2}),
    "olmoe, fewer keys": ("olmoe", {"num_key_value_heads": 2}),
    "width of a head": ("qwen2_moe", {"head_dim": 16}),
}


@pytest.mark.parametrize("case", [*OTHERWISE, *NOT_LOADED])
def test_what_is_refused_is_computed_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, changes = {**OTHERWISE, **NOT_LOADED}[case]
    monkeypatch.setitem(ARCHITECTURES, kind, replace(ARCHITECTURES[kind], conditions=()))
    monkeypatch.setattr(llama_cpp, "other_norm", lambda target, config: None)
    path = exported(tmp_path, kind, **changes)
    if case in NOT_LOADED:
        with pytest.raises(ValueError, match="Failed to load model"):
            opened(path)
        return
    ids = [int(i) for i in torch.randint(3, 500, (60,))]
    with torch.no_grad():
        theirs = gguf_models.moe(kind, **changes)(torch.tensor([ids])).logits[0].numpy()
    difference = np.abs(logits_of(opened(path), ids) - theirs).max()
    assert difference > 1000 * ULPS * EPS * np.abs(theirs).max()


@pytest.mark.parametrize("name", gguf_models.CUTS)
def test_tokens_of_bytes(tmp_path: Path, name: str) -> None:
    tokenizer = gguf_models.byte_tokenizer(*gguf_models.CUTS[name])
    llama = opened(exported(tmp_path, "mixtral", tokenizer))
    for text in (gguf_models.TEXT, "a <tool> b", "<|start|>I've 3333 of\n\n  them<|end|>"):
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)


def test_tokens_of_pieces(tmp_path: Path) -> None:
    tokenizer = gguf_models.piece_tokenizer()
    llama = opened(exported(tmp_path, "mixtral", tokenizer))
    for text in ("the thing in the an other \u00e9", " a  ther", gguf_models.TEXT):
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
