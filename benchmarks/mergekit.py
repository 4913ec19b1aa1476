"""Copies of a 1.1B Llama into 4 experts: `upcycle convert`, mergekit-moe and a plain copy, in turn.

    python benchmarks/mergekit.py [--mergekit DIR/bin/mergekit-moe] [--rounds 3]

Writes a bfloat16 checkpoint of generated weights in the shape of TinyLlama, which takes 2.2 GB, and
each result 6.8 GB. Prints medians over the rounds: wall and CPU seconds and peak resident memory,
mapped files included, and the wall time relative to that of the plain copy in the same round. All
read from the page cache. At the end the experts of both are compared, bit by bit. mergekit wants an
environment of its own: `pip install mergekit==0.1.5`. Its LGPL code is run, not imported.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from conversion import measure
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.targets.files.tensor_file import TensorEntry, write_tensors

D, F, VOCABULARY, LAYERS, KV, EXPERTS = 2048, 5632, 32000, 22, 256, 4
PLAIN = "cp -r of what it wrote"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def write_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, D)}
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        for name, rows in (("q", D), ("k", KV), ("v", KV), ("o", D)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (rows, D)
        shapes[f"{block}.mlp.gate_proj.weight"] = shapes[f"{block}.mlp.up_proj.weight"] = (F, D)
        shapes[f"{block}.mlp.down_proj.weight"] = (D, F)
        for name in ("input", "post_attention"):
            shapes[f"{block}.{name}_layernorm.weight"] = (D,)
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (VOCABULARY, D)}
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    entries = [
        TensorEntry(name, shape, torch.bfloat16, lambda shape=shape: draw(shape))
        for name, shape in shapes.items()
    ]
    write_tensors(folder, entries)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def mergekit_recipe(dense: Path) -> str:
    """YAML; JSON is YAML, too."""
    experts = [{"source_model": str(dense)}] * EXPERTS
    settings = {"gate_mode": "random", "architecture": "mixtral", "dtype": "bfloat16"}
    recipe = {"base_model": str(dense), **settings, "experts_per_token": 2, "experts": experts}
    return json.dumps(recipe)


def different_experts(ours: Path, theirs: Path) -> int:
    """Matrices of experts whose bits differ; mergekit stacks those of a layer, as [E, ...]."""
    mine, its = read_tensors(ours), read_tensors(theirs)
    wrong = 0
    for i in range(LAYERS):
        stacked = f"model.layers.{i}.mlp.experts"
        gate_EFD, up_EFD = its[f"{stacked}.gate_up_proj"].chunk(2, dim=1)
        for word, their in (("w1", gate_EFD), ("w3", up_EFD), ("w2", its[f"{stacked}.down_proj"])):
            for e in range(EXPERTS):
                name = f"model.layers.{i}.block_sparse_moe.experts.{e}.{word}.weight"
                wrong += not torch.equal(mine[name].view(torch.int16), their[e].view(torch.int16))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, default=shutil.which("mergekit-moe"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    dense, ours, theirs = work / "dense", work / "ours", work / "theirs"
    convert = [str(Path(sys.executable).with_name("upcycle")), "convert", str(dense)]
    convert += ["--recipe", "sparse-upcycling", "--set", f"experts.count={EXPERTS}"]
    convert += ["--target", "safetensors", "--stream", "--out", str(ours)]
    runs = {
        "upcycle convert --stream --no-verify": ([*convert, "--no-verify"], ours),
        PLAIN: (["cp", "-r", str(ours), str(work / "copy")], work / "copy"),
    }
    if arguments.mergekit:
        command = [str(arguments.mergekit), str(work / "recipe.yaml"), str(theirs)]
        runs["mergekit-moe"] = (command, theirs)
    runs["upcycle convert --stream"] = (convert, ours)
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    table = Table("command", "wall s", "of a copy", "CPU s", "peak MiB", title="medians")
    try:
        # Elsewhere: the peak of a command counts from that of the process that starts it.
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(dense,))
        writer.start()
        writer.join()
        (work / "recipe.yaml").write_text(mergekit_recipe(dense))
        for _ in range(arguments.rounds):
            for name, (command, out) in runs.items():
                shutil.rmtree(out, ignore_errors=True)
                read = ours if name == PLAIN else dense
                subprocess.run(["cat", *read.glob("*.safetensors")], stdout=subprocess.DEVNULL)
                figures[name].append(measure(command))
                print(name, *(f"{figure:.1f}" for figure in figures[name][-1]), file=sys.stderr)
                shutil.rmtree(work / "copy", ignore_errors=True)
        for name, found in figures.items():
            wall, cpu, peak = (statistics.median(column) for column in zip(*found, strict=True))
            rounds = zip(found, figures[PLAIN], strict=True)
            ratio = statistics.median(its[0] / plain[0] for its, plain in rounds)
            table.add_row(name, f"{wall:.1f}", f"{ratio:.2f}", f"{cpu:.1f}", f"{peak:.0f}")
        if theirs.exists():
            matrices = 3 * LAYERS * EXPERTS
            table.caption = f"{different_experts(ours, theirs)} of {matrices} matrices differ"
    finally:
        shutil.rmtree(work)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
