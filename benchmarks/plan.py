"""`upcycle plan` on configurations without weights: wall time and peak memory, imports included.

    python benchmarks/plan.py

Writes a config.json and an index of the size of Llama-3-70B and of a 405B model into a temporary
directory and plans them. Goal: 5 s and 700 MB for 70B on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SHAPES = {
    "Llama-3-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "Llama-3.1-405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_hidden_layers": 126,
    },
}


def main() -> None:
    table = Table("model", "wall s", "CPU s", "peak MiB")
    upcycle = Path(sys.executable).with_name("upcycle")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "config.json")
            config.write_text(json.dumps(LLAMA | shape))
            index = {"metadata": {"total_size": 0}, "weight_map": {}}
            Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
            start = time.perf_counter()
            process = subprocess.Popen(
                [upcycle, "plan", folder, "--recipe", "sparse-upcycling"],
                stdout=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                raise SystemExit(f"planning {name} failed")
            wall, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
        table.add_row(name, f"{wall:.1f}", f"{cpu:.1f}", f"{usage.ru_maxrss / 1024:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
