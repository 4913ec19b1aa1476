"""What a conversion without training costs in quality, for every split recipe and part of neurons.

    pip install -e '.[cpu,samples,bench]'
    python benchmarks/quality.py [--recipes NAME ...] [--levels 75 50 25] [--model smollm2|minilm]
                                 [--out docs]

Converts SmolLM2-135M (or MiniLM) with each recipe at 75, 50 and 25 % of the FFN's neurons, all
layers, no training, and compares with the dense model on text that no calibration has seen: the
first quarter of the standard library's documentation, and every fourth of its source files.
Writes `quality-MODEL.json`, `quality-MODEL.md` and `quality-MODEL.svg`; rows that the JSON has
already are kept, so that a run can be continued. A row is one conversion in this process.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

import upcycle
from upcycle.data import default_data
from upcycle.ir.spec import Plan
from upcycle.models.named import open_model
from upcycle.passes.experts import EXPERTS
from upcycle.passes.plan.costs import costs, model_size
from upcycle.recipe.schema import Recipe
from upcycle.recipe.shipped import recipe_names

WINDOW, WINDOWS = 512, 8  # of each text


def split_recipes() -> list[str]:
    """Every shipped recipe whose experts are parts of one FFN."""
    kinds = {
        name: EXPERTS[upcycle.load_recipe(name).experts.method].kind for name in recipe_names()
    }
    return [name for name, kind in kinds.items() if kind in ("split", "subsets")]


def overrides_for(recipe: Recipe, level: float, ffns: int) -> list[str] | None:
    """Changes of a recipe so that a token meets this part of all neurons; None if it cannot."""
    experts, layers = recipe.experts, recipe.layers
    if experts.method == "token_sets":  # its own layers: those that stay dense count fully
        dense = sum(
            math.floor(n * ffns + 1e-9) if isinstance(n, float) else n
            for n in (layers.skip_first, layers.skip_last)
        )
        part = (level * ffns - dense) / (ffns - dense)
        shared = experts.shared if isinstance(experts.shared, float) else 0.0
        return [f"experts.width={part - shared:.4f}"] if part > shared else None
    everywhere = ["layers.every=1", "layers.skip_first=0", "layers.skip_last=0"]
    if EXPERTS[experts.method].kind == "subsets":  # they overlap, so one expert gets wider
        return [*everywhere, f"experts.width={level}"]
    shared = experts.shared if isinstance(experts.shared, int) else 0
    top_k = round(level * experts.count) - shared
    if top_k < 1:
        return None
    return [*everywhere, f"router.top_k={top_k}"]


def active_part(plan: Plan) -> float:
    """The part of all neurons of the model's FFNs that a token meets."""
    total = sum(ffn.d_ff for ffn in plan.located.ffns)
    converted = {spec.ffn.path: spec for spec in plan.specs}
    met = 0
    for ffn in plan.located.ffns:
        spec = converted.get(ffn.path)
        met += ffn.d_ff if spec is None else spec.shared + spec.top_k * spec.width
    return met / total


def texts() -> dict[str, str]:
    return {
        "documentation": default_data.verification_text(),
        "source code": default_data.library_source(held_out=True),
    }


def windows(tokenizer: Any, text: str) -> torch.Tensor:
    """Windows from all over the text, [WINDOWS, WINDOW]."""
    starts = [i * len(text) // WINDOWS for i in range(WINDOWS)]
    pieces = [text[start : start + 12 * WINDOW] for start in starts]
    return torch.tensor([tokenizer(p, verbose=False).input_ids[:WINDOW] for p in pieces])


@torch.no_grad()
def mean_loss(model: nn.Module, ids: torch.Tensor) -> float:
    """Mean negative log likelihood of the next token."""
    total = 0.0
    for window in ids:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), window[1:]).item()
    return total / len(ids)


def sentences() -> list[str]:
    lines = (line.strip() for line in default_data.verification_text().splitlines())
    return [line for line in lines if len(line.split()) > 6][:256]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, lines: list[str]) -> torch.Tensor:
    made = []
    for start in range(0, len(lines), 32):
        batch = tokenizer(
            lines[start : start + 32],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="pt",
        )
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        made.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(made), dim=-1)


def word_pairs() -> tuple[list[str], list[str], list[float]] | None:
    """WordSim353, which comes inside gensim (LGPL); None if that is not installed."""
    from importlib.util import find_spec

    found = find_spec("gensim")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "test" / "test_data" / "wordsim353.tsv"
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
    rows = [row for row in rows if len(row) == 3 and not row[0].startswith("#")]
    return [r[0] for r in rows], [r[1] for r in rows], [float(r[2]) for r in rows]


class LanguageModel:
    """How SmolLM2 is judged: perplexity over that of the dense model."""

    columns = ("documentation", "source code", "both")

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.ids = {name: windows(tokenizer, text) for name, text in texts().items()}
        self.dense = {name: mean_loss(model, ids) for name, ids in self.ids.items()}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        gaps = {n: mean_loss(model, ids) - self.dense[n] for n, ids in self.ids.items()}
        gaps["both"] = sum(gaps.values()) / len(gaps)
        return {name: math.exp(gap) for name, gap in gaps.items()}


class SentenceModel:
    """How MiniLM is judged: cosine to the dense embeddings, and a labelled similarity task."""

    columns = ("mean cosine", "least cosine", "WordSim353")

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.tokenizer, self.lines, self.pairs = tokenizer, sentences(), word_pairs()
        self.dense = embed(model, tokenizer, self.lines)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        cosine = (embed(model, self.tokenizer, self.lines) * self.dense).sum(-1)
        judged = {"mean cosine": float(cosine.mean()), "least cosine": float(cosine.min())}
        if self.pairs is not None:
            from scipy.stats import spearmanr

            left, right, human = self.pairs
            ours = (embed(model, self.tokenizer, left) * embed(model, self.tokenizer, right)).sum(
                -1
            )
            judged["WordSim353"] = float(spearmanr(ours.numpy(), human).statistic)
        return judged


def rows(arguments: argparse.Namespace, kept: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each recipe and level; those of `kept` are given again."""
    known = {(row["recipe"], row["level"]): row for row in kept}
    source = open_model(f"sample:{arguments.model}")
    model = source.load().eval()
    tokenizer = AutoTokenizer.from_pretrained(source.directory, local_files_only=True)
    judge = (LanguageModel if arguments.model == "smollm2" else SentenceModel)(model, tokenizer)
    located = upcycle.locate(model)
    ffns = sum(ffn.kind == "ffn" for ffn in located.ffns)
    yield {"recipe": "dense", "level": 100, "active": 1.0, "flops": 1.0, **judge(model)}
    for name in arguments.recipes or split_recipes():
        for level in arguments.levels:
            if (name, level) in known:
                yield known[name, level]
                continue
            changes = overrides_for(upcycle.load_recipe(name), level / 100, ffns)
            if changes is None:
                continue
            start = time.perf_counter()
            made = upcycle.convert(
                model,
                name,
                overrides=changes,
                source=source,
                located=located,
                verify=False,
            )
            seconds = time.perf_counter() - start
            found = costs(made.plan, *model_size(model))
            rest = sum(2 * ffn.num_parameters for ffn in located.ffns if ffn.kind == "ffn")
            after = rest - found.flops_before + found.flops_after
            yield {
                "recipe": name,
                "level": level,
                "active": active_part(made.plan),
                "flops": after / rest,
                "seconds": seconds,
                **judge(made.model.eval()),
            }
            del made


def table(found: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    columns = tuple(name for name in columns if name in found[0])
    head = ["recipe", "level", "active neurons", "FFN FLOPs", "conversion", *columns]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in found:
        cells = [row["recipe"], f"{row['level']} %", f"{row['active']:.1%}", f"{row['flops']:.1%}"]
        cells.append(f"{row['seconds']:.0f} s" if "seconds" in row else "")
        cells += [f"{row[name]:.3f}" if row[name] < 100 else f"{row[name]:.0f}" for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], what: str, file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row["recipe"] for row in found if row["recipe"] != "dense"):
        some = sorted((r["flops"], r[what]) for r in found if r["recipe"] == name)
        axes.plot(*zip(*some, strict=True), marker="o", label=name)
    axes.set_xlabel("FLOPs of the FFNs per token, over dense")
    axes.set_ylabel(f"perplexity over dense ({what})" if what == "both" else what)
    axes.set_yscale("log" if what == "both" else "linear")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["smollm2", "minilm"], default="smollm2")
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--levels", nargs="*", type=int, default=[75, 50, 25])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    file = arguments.out / f"quality-{arguments.model}.json"
    kept = json.loads(file.read_text()) if file.exists() else []
    found: list[dict[str, Any]] = []
    for row in rows(arguments, kept):
        found.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        done = {(r["recipe"], r["level"]) for r in found}
        every = found + [r for r in kept if (r["recipe"], r["level"]) not in done]
        file.write_text(json.dumps(every, indent=1) + "\n")
    columns = (LanguageModel if arguments.model == "smollm2" else SentenceModel).columns
    text = table(every, columns)
    file.with_suffix(".md").write_text(text, "utf-8")
    plot(every, "both" if arguments.model == "smollm2" else "mean cosine", file.with_suffix(".svg"))
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
