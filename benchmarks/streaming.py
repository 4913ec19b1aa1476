"""Peak memory of a streamed conversion, on a model several times larger than what it may use.

    python benchmarks/streaming.py [--gigabytes 4.5] [--jobs 1]

Writes a Llama checkpoint of generated bfloat16 weights, converts it piece by piece (copies, and a
split by key clustering), `--jobs` layers at a time, and prints wall time and peak memory, which is
that of anonymous memory: pages of the mapped checkpoint are the kernel's cache, which it takes back
when it needs them. A run that takes more than a fifth of the model fails.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from upcycle.targets.files.tensor_file import TensorEntry, write_tensors

D_MODEL, D_FF, VOCABULARY = 2048, 5632, 32000
RUNS = [
    ("sparse-upcycling", ("--set", "experts.count=2")),
    ("moefication", ()),
]


def write_model(folder: Path, gigabytes: float) -> float:
    """A Llama of the TinyLlama's shape with as many layers as fill `gigabytes`."""
    layer = 2 * (4 * D_MODEL**2 + 3 * D_MODEL * D_FF)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * D_MODEL) / layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, D_MODEL)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (D_MODEL, D_MODEL)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (D_FF, D_MODEL)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (D_FF, D_MODEL)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (D_MODEL, D_FF)
        shapes[f"{prefix}.input_layernorm.weight"] = (D_MODEL,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (D_MODEL,)
    shapes["model.norm.weight"] = (D_MODEL,)
    shapes["lm_head.weight"] = (VOCABULARY, D_MODEL)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    entries = [
        TensorEntry(name, shape, torch.bfloat16, lambda shape=shape: draw(shape))
        for name, shape in shapes.items()
    ]
    write_tensors(folder, entries, max_shard_size=10**9)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def anonymous(pid: int) -> int:
    """KiB of anonymous memory of a process, 0 if it is over."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.5)
    parser.add_argument("--jobs", default="1")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        dense = work / "dense"
        dense.mkdir()
        size = write_model(dense, arguments.gigabytes)
        limit = size * 1e3 / 5
        title = f"a model of {size:.2f} GB; at most {limit:.0f} MB are allowed"
        table = Table("recipe", "wall s", "peak anonymous MB", "written GB", title=title)
        for recipe, options in RUNS:
            out = work / "out"
            command = ["convert", dense, "--recipe", recipe, "--out", out, "--stream", *options]
            command += ["--target", "safetensors", "--overwrite", "--jobs", arguments.jobs]
            upcycle = Path(sys.executable).with_name("upcycle")
            start, peak = time.perf_counter(), 0
            process = subprocess.Popen(
                [upcycle, *command],
                stdout=subprocess.DEVNULL,
            )
            while process.poll() is None:
                peak = max(peak, anonymous(process.pid))
                time.sleep(0.02)
            peak_mb = peak * 1.024e-3
            if process.returncode or peak_mb > limit:
                raise SystemExit(f"{recipe}: exit {process.returncode}, peak {peak_mb:.0f} MB")
            wall = time.perf_counter() - start
            written = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e9
            table.add_row(recipe, f"{wall:.0f}", f"{peak_mb:.0f}", f"{written:.2f}")
    finally:
        shutil.rmtree(work)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
