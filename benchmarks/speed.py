"""What a conversion without training gains in speed, against what it costs in quality.

    pip install -e '.[cpu,bench]'
    OMP_WAIT_POLICY=passive python benchmarks/speed.py [--recipes NAME ...] [--levels 50 25]
                                                       [--seconds 10] [--out docs]

Converts SmolLM2-135M with each recipe at 50 and 25 % of the FFN's neurons, in all layers, and
measures it beside the dense model with `upcycle.bench`: reading 512 tokens, and writing one after
the other with a cache, in torch and in ONNX Runtime. The perplexities are those of
`quality-smollm2.json`, which benchmarks/quality.py writes. Writes `speed-smollm2.json`, `.md` and
`.svg`; rows that the JSON has already are kept, so that a run can be continued.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quality import overrides_for

import upcycle
from upcycle.bench.run import Wanted, bench
from upcycle.models.dense import Source
from upcycle.models.named import open_model

PROMPT = 512
ENGINES = {"torch": "PyTorch", "onnx": "ONNX Runtime"}
PHASES = {"reading": f"reads {PROMPT} tokens", "writing": "writes a token"}


def rows(arguments: argparse.Namespace, kept: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each recipe, level and engine; those of `kept` are given again."""
    known = {(row["recipe"], row["level"], row["engine"]): row for row in kept}
    quality = json.loads((arguments.out / "quality-smollm2.json").read_text())
    perplexity = {(row["recipe"], row["level"]): row["both"] for row in quality}
    source = open_model("sample:smollm2")
    assert isinstance(source, Source)
    for name in arguments.recipes or dict.fromkeys(name for name, _ in perplexity):
        for level in arguments.levels:
            if (name, level) not in perplexity:
                continue
            missing = [engine for engine in ENGINES if (name, level, engine) not in known]
            with TemporaryDirectory() as folder:
                out = Path(folder) / "moe"
                if missing:
                    converted(source, name, level, out)
                for engine in ENGINES:
                    if engine not in missing:
                        yield known[name, level, engine]
                        continue
                    wanted = Wanted([PROMPT], seconds=arguments.seconds, engine=engine)
                    found = bench(out, source, wanted)
                    yield {
                        "recipe": name,
                        "level": level,
                        "engine": engine,
                        "perplexity": perplexity[name, level],
                        "active": found["costs"]["active_parameters"]
                        / found["costs"]["parameters_before"],
                        "layer": found["layers"][0] if found["layers"] else None,
                        "reading": found["reading"][0],
                        "writing": found["writing"],
                        "machine": found["machine"],
                    }


def converted(source: Source, name: str, level: int, out: Path) -> None:
    """Convert the model into `out`."""
    model = source.load().eval()
    located = upcycle.locate(model)
    ffns = sum(ffn.kind == "ffn" for ffn in located.ffns)
    changes = overrides_for(upcycle.load_recipe(name), level / 100, ffns)
    made = upcycle.convert(
        model, name, overrides=changes, source=source, located=located, verify=False
    )
    made.save(out, targets=("safetensors", "onnx"), verify=False)


def table(found: list[dict[str, Any]]) -> str:
    """Speed-ups with the quartiles of the rounds, and how near to the floor both models are."""
    head = ["recipe", "level", "perplexity over dense", "engine", *PHASES.values(), "of the floor"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in found:
        cells = [row["recipe"], f"{row['level']} %", f"{row['perplexity']:.2f}"]
        cells.append(ENGINES[row["engine"]])
        for phase in PHASES:
            ratio = row[phase]["ratio"]
            low, middle, high = (1 / ratio[key] for key in ("high", "median", "low"))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        sparse = (row[phase]["converted"] for phase in PHASES)
        cells.append(", ".join(f"{times['floor'] / times['median']:.0%}" for times in sparse))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Speed-up against perplexity, one panel for each engine and phase."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, squeeze=False)
    for line, (engine, runtime) in zip(panels, ENGINES.items(), strict=True):
        for axes, (phase, words) in zip(line, PHASES.items(), strict=True):
            for name in dict.fromkeys(row["recipe"] for row in found):
                some = sorted(
                    (row["perplexity"], 1 / row[phase]["ratio"]["median"])
                    for row in found
                    if (row["recipe"], row["engine"]) == (name, engine)
                )
                if some:
                    axes.plot(*zip(*some, strict=True), marker="o", label=name)
            axes.axhline(1, color="grey", linewidth=1)
            axes.set(xscale="log", title=f"{runtime}, {words}", ylabel="speed-up over dense")
            axes.grid(visible=True, alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("perplexity over dense")
    panels[0][0].legend(fontsize="small")
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--levels", nargs="*", type=int, default=[50, 25])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    file = arguments.out / "speed-smollm2.json"
    kept = json.loads(file.read_text()) if file.exists() else []
    found: list[dict[str, Any]] = []
    for row in rows(arguments, kept):
        found.append(row)
        done = {(r["recipe"], r["level"], r["engine"]) for r in found}
        others = [r for r in kept if (r["recipe"], r["level"], r["engine"]) not in done]
        file.write_text(json.dumps(found + others, indent=1) + "\n")
        print(table([row]).splitlines()[-1], flush=True)
    every = json.loads(file.read_text())
    file.with_suffix(".md").write_text(table(every), "utf-8")
    plot(every, file.with_suffix(".svg"))
    print(table(every), file=sys.stderr)


if __name__ == "__main__":
    main()
