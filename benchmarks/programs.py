"""Programs of `torch.export`: the architectures of the zoo converted from them, and compiled speed.

    python benchmarks/programs.py zoo [NAME ...]
    python benchmarks/programs.py compiled

`zoo` exports each architecture (all without names), splits every FFN of the module and of the
program, and writes the portable program, which a process without upcycle loads and runs; a row says
whether the FFNs and the bytes of the weights are the same, and both errors. `compiled` compiles the
dense model and the portable program of MiniLM and of a small llama with AOTInductor, and times
both in turns. Each prints a table.
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

# Loads programs, one after the other, in a process in which upcycle cannot be imported.
ALONE = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.modules["upcycle"] = None
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    path, given, out = json.loads(line)
    try:
        with torch.no_grad():
            made = torch.export.load(path).module()(**torch.load(given))
        torch.save({k: v for k, v in made.items()}, out)
        print("ok", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0][:200], flush=True)
"""


def zoo(names: list[str]) -> None:
    """One row for each architecture, and how many hold in all."""
    import zoo_facts

    torch.set_num_threads(1)
    command = [sys.executable, "-c", ALONE]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    table = Table("architecture", "FFNs", "same bytes", "error", "program alone", "seconds")
    held = 0
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, **pipes) as alone:
        for name in names or sorted(zoo_facts.ARCHITECTURES):
            start = time.perf_counter()
            cells, good = row(name, Path(folder), alone)
            held += good
            table.add_row(name, *cells, f"{time.perf_counter() - start:.0f}")
            print(name, *cells, f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    Console(width=200).print(table)
    print(f"{held} of {table.row_count}: the same FFNs and bytes, both errors at most 1e-5")


def row(name: str, folder: Path, alone: Any) -> tuple[list[str], bool]:
    """The cells of an architecture, and whether all of it holds."""
    import zoo as models
    import zoo_programs

    from upcycle.models.program_file import open_program

    try:
        found = zoo_programs.converted(name)
    except Exception as error:  # what torch or a model says is the row
        return [f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", "", "", ""], False
    count = len(found.indirect.plan.specs)
    same = not found.missing and not found.unequal
    try:
        program = found.indirect.programs(cache=False)["model"]
        path, given, out = (folder / file for file in ("p.pt2", "given.pt", "out.pt"))
        torch.export.save(program, path)
        program = open_program(path)
        inputs = [n.name for n in program.graph.nodes if n.op == "placeholder"]
        inputs = [n for n in inputs if n in program.graph_signature.user_inputs]
        _, kwargs = program.example_inputs or ((), {})
        torch.save({name: kwargs[name] for name in kwargs}, given)
        alone.stdin.write(json.dumps([str(path), str(given), str(out)]) + "\n")
        alone.stdin.flush()
        said = alone.stdout.readline().strip()
        if said != "ok":
            raise RuntimeError(said)
        first = next(iter(torch.load(out).values()))
        expected = models.run(found.model, found.inputs)
        off = float((first - expected).abs().max() / expected.abs().max())
        loaded = f"{off:.0e}"
    except Exception as error:
        return [str(count), "yes" if same else "no", f"{found.error:.0e}",
                f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"], False  # fmt: skip
    cells = [str(count), "yes" if same else "no", f"{found.error:.0e}", loaded]
    return cells, same and found.error <= 1e-5 and off <= 1e-5


def compiled() -> None:
    """Dense and converted, compiled, in turns; the minimum of many runs."""
    import small_models

    import upcycle
    from upcycle.models.named import open_model
    from upcycle.targets.traced.cache import without_cache

    hf: Any = small_models.t
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = hf.LlamaConfig(**sizes, **heads, vocab_size=4096)
    source: Any = open_model("sample:minilm")
    models = {"MiniLM": source.load(), "llama, d 512, 4 layers": hf.LlamaForCausalLM(config).eval()}
    table = Table("model", "tokens", "dense ms", "converted ms", "ratio", "eager ratio")
    for label, dense in models.items():
        changes = ["layers.skip_first=0", "experts.count=8", "router.top_k=2",
                   "verify.max_relative_error=100"]  # fmt: skip
        text = {"input_ids": torch.randint(0, 4000, (2, 64))}
        shown = [{"input_ids": torch.randint(0, 4000, (8, 64))}]
        done = upcycle.convert(dense, "moefication", text, shown, overrides=changes, verify=False)
        batch = torch.export.Dim("batch", max=64)
        length = torch.export.Dim("length", max=256)
        shapes = {"input_ids": {0: batch, 1: length}}
        with without_cache(dense), torch.no_grad():
            program = torch.export.export(dense, (), text, dynamic_shapes=shapes, strict=False)
        packages = []
        with tempfile.TemporaryDirectory() as folder:
            for i, one in enumerate((program, done.programs(cache=False)["model"])):
                path = torch._inductor.aoti_compile_and_package(
                    one, package_path=f"{folder}/{i}.pt2"
                )
                packages.append(torch._inductor.aoti_load_package(path))
            for count in (1, 16, 128, 512):
                rows = max(count // 128, 1)
                ids = {"input_ids": torch.randint(0, 4000, (rows, count // rows))}
                usual = {"use_cache": False} if "llama" in label else {}
                first, second = in_turns(*(partial(package, **ids) for package in packages))
                slow, fast = in_turns(*(partial(m, **ids, **usual) for m in (dense, done.model)))
                table.add_row(label, str(count), f"{first:.2f}", f"{second:.2f}",
                              f"{second / first:.2f}", f"{fast / slow:.2f}")  # fmt: skip
    Console(width=140).print(table)


def in_turns(*functions: Any, seconds: float = 3.0) -> list[float]:
    """The least time of each, in ms, called one after the other."""
    best = [float("inf")] * len(functions)
    with torch.no_grad():
        for function in functions:
            function()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for i, function in enumerate(functions):
                start = time.perf_counter()
                function()
                best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    what, *names = sys.argv[1:] or ["zoo"]
    if what not in ("zoo", "compiled"):
        sys.exit(__doc__)
    zoo(names) if what == "zoo" else compiled()
