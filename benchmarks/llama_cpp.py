"""GGUF files of `upcycle export` in llama.cpp against the models in PyTorch.

    pip install llama-cpp-python
    python benchmarks/llama_cpp.py [--models FOLDER]

Random Mixtral and Qwen3-MoE models of two layers and SmolLM2-135M upcycled to 4 experts, which all
have the tokenizer of SmolLM2, in every type of weights. A row says how far the logits of a text
are, and whether tokens and greedy text are the same.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle
from upcycle.models import samples

TYPES = ("f32", "f16", "bf16", "q8_0")
PROMPT = "The capital of France is"
TEXT = "Once upon a time there were 33 bears.\n\n  They'd never seen a café; we've seen 1,024."
SMALL = ("mixtral", "qwen3_moe")
NEW = 32
F32 = 0  # of the key-value cache


def small(kind: str, folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 16}
    if kind == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **shape, **experts
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, help="where models are kept; else they are deleted")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.models or Path(temporary)
        tokenizer = AutoTokenizer.from_pretrained(samples.path("sample:smollm2"))
        made = {f"random {kind}": small(kind, folder / kind, tokenizer) for kind in SMALL}
        made["SmolLM2, 4 experts"] = folder / "smollm2"
        if not made["SmolLM2, 4 experts"].exists():
            result = upcycle.convert(
                "sample:smollm2", "sparse-upcycling", overrides=["experts.count=4"], verify=False
            )
            result.save(made["SmolLM2, 4 experts"], runtimes=["llama.cpp"])
            tokenizer.save_pretrained(made["SmolLM2, 4 experts"])
        show(made, folder)


def show(made: dict[str, Path], folder: Path) -> None:
    heads = ("model", "type", "MB", "largest |logit difference|", "of", "rms", "top-1 the same")
    table = Table(*heads, "tokens", f"greedy, {NEW} tokens", "tokens/s")
    for name, source in made.items():
        expected = in_torch(source)
        for kind in TYPES:
            out = folder / f"{source.name}-{kind}"
            options = {"gguf_type": kind, "overwrite": True, "verify": False}
            upcycle.export(source, out, target="gguf", **options)
            table.add_row(name, kind, *compared(out / f"model-{kind}.gguf", *expected))
    Console(width=160).print(table)


def in_torch(source: Path) -> tuple[Any, ...]:
    """Tokens of the text and their logits, tokens of the prompt and those after it, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer.encode(TEXT)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
        text = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
    return tokens, logits, ids[0].tolist(), text.tolist()


def compared(
    file: Path, tokens: list[int], theirs: Any, prompt: list[int], text: list[int]
) -> tuple[str, ...]:
    """One row: the file in llama.cpp against what the model computes in torch."""
    llama = llama_cpp.Llama(
        str(file), n_ctx=256, logits_all=True, verbose=False, type_k=F32, type_v=F32
    )
    same_tokens = llama.tokenize(TEXT.encode(), special=True) == tokens
    llama.eval(tokens)
    ours = np.array(llama.scores[: len(tokens)])
    error = ours - theirs
    llama.reset()
    llama.eval(prompt)
    start, made = time.perf_counter(), list[int]()
    while len(made) < len(text):
        made.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(made[-1:])
    speed = len(made) / (time.perf_counter() - start)
    equal = next((i for i, (a, b) in enumerate(zip(made, text, strict=True)) if a != b), None)
    return (
        f"{file.stat().st_size / 1e6:.1f}",
        f"{np.abs(error).max():.1e}",
        f"{np.abs(theirs).max():.1f}",
        f"{np.sqrt((error**2).sum() / (theirs**2).sum()):.1e}",
        f"{(ours.argmax(-1) == theirs.argmax(-1)).mean():.0%}",
        "same" if same_tokens else "OTHER",
        "same" if equal is None else f"from token {equal} on another",
        f"{speed:.0f}",
    )


if __name__ == "__main__":
    main()
