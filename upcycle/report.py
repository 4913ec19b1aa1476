"""What was found, planned and verified, as tables for people and as plain data for programs.

A conversion report is the dict that `upcycle.compiler` makes: `checks` of `upcycle.verification`,
`layers` with the distance of each, `end_to_end` with that of each output and, for a language model,
of its predictions.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from upcycle.costs import Costs
from upcycle.ffn import FFN, Located
from upcycle.spec import MoESpec, Plan
from upcycle.usage import calibration_rows

MAX_LAYERS = 12  # in the table of a verification: the worst ones


def located_json(located: Located) -> dict[str, Any]:
    """Plain data for ``upcycle inspect --json``."""
    return {
        "ffns": [ffn.to_json() for ffn in located.ffns],
        "misses": [miss.to_json() for miss in located.misses],
    }


def located_report(located: Located) -> list[RenderableType]:
    """The FFNs of a model, and the places that only look like one."""
    ffns = _table("FFN", "kind", "shape", "activation", "placement")
    rows = [(f.path, f.kind, _shape(f), f.pointwise.name, f.placement) for f in located.ffns]
    _add_rows(ffns, rows)
    parts: list[RenderableType] = [ffns, f"{_count(located.ffns, 'dense FFN')} found"]
    if located.misses:
        parts += ["", _misses(located)]
    return parts


def plan_json(plan: Plan, costs: Costs) -> dict[str, Any]:
    """Plain data for ``upcycle plan --json``."""
    converted = {spec.ffn.path for spec in plan.specs}
    return {
        "recipe": plan.recipe_name,
        "promise": plan.promise if plan.specs else None,
        "layers": [_spec_json(spec) for spec in plan.specs],
        "dense": [ffn.path for ffn in plan.located.ffns if ffn.path not in converted],
        "misses": located_json(plan.located)["misses"],
        "costs": costs.to_json(),
    }


def plan_report(plan: Plan, costs: Costs) -> list[RenderableType]:
    """What each FFN becomes, and what that costs."""
    layers = _table("FFN", "shape", "becomes", "promise")
    specs = {spec.ffn.path: spec for spec in plan.specs}
    rows = []
    for ffn in plan.located.ffns:
        spec = specs.get(ffn.path)
        fate = (_experts(spec), spec.promise) if spec else ("stays dense", "")
        rows.append((ffn.path, _shape(ffn), *fate))
    _add_rows(layers, rows)
    of = f"{len(plan.specs)} of {_count(plan.located.ffns, 'dense FFN')}"
    parts: list[RenderableType] = [layers, f"{plan.recipe_name} converts {of}"]
    if plan.specs:
        parts += ["", costs_table(costs)]
    if plan.located.misses:
        parts += ["", _misses(plan.located)]
    return parts


def costs_table(costs: Costs) -> Table:
    """The size of the model before and after."""
    before, after = costs.parameters_before, costs.parameters_after
    table = _table("costs", "dense", "converted", "factor")
    for name, old, new, text in (
        ("parameters", before, after, short),
        ("parameters that a token meets", before, costs.active_parameters, short),
        ("FLOPs per token, converted FFNs", costs.flops_before, costs.flops_after, short),
        ("bytes on disk", costs.bytes_before, costs.bytes_on_disk, _bytes),
    ):
        table.add_row(name, text(old), text(new), f"{new / old:.2f}" if old else "")
    if costs.compensation_parameters:
        share = costs.compensation_flops / costs.flops_after
        what = f"{short(costs.compensation_parameters)} parameters"
        table.add_row("of these for compensation", "", what, f"{share:.2f} of the FLOPs")
    table.add_row("peak memory", "", _bytes(costs.peak_bytes), "")
    return table


def verification_report(report: dict[str, Any]) -> list[RenderableType]:
    """The checks of a verification, each with its error and what was allowed."""
    checks = report["checks"]
    table = _table("check", "error", "allowed", "")
    for check in checks:
        verdict = "ok" if check["passed"] else "FAILED"
        table.add_row(check["what"], f"{check['error']:.2e}", f"{check['allowed']:.2e}", verdict)
    parts: list[RenderableType] = [table]
    if rows := [*_distances(report)]:
        distances = _table("compared with the dense model", "relative error", "cosine min", "mean")
        _add_rows(distances, rows)
        parts += ["", distances]
        if (hidden := len(report.get("layers", ())) - MAX_LAYERS) > 0:
            parts.append(f"{_count(range(hidden), 'layer')} with smaller errors in report.json")
    if language := report.get("end_to_end", {}).get("language_model"):
        metrics = _table("language model", "")
        for name, value in language.items():
            metrics.add_row(name.replace("_", " "), f"{value:.6g}")
        parts += ["", metrics]
    failed = sum(not check["passed"] for check in checks)
    verdict = f"{failed} failed" if failed else "all passed"
    return [*parts, f"{_count(checks, 'check')}: {verdict}"]


def _distances(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    layers = report.get("layers", [])
    if len(layers) > MAX_LAYERS:
        layers = sorted(layers, key=lambda row: -row["relative"])[:MAX_LAYERS]
    named = [(row["path"], row) for row in layers]
    named += [*report.get("end_to_end", {}).get("outputs", {}).items()]
    named += [*report.get("sources", {}).items()]
    for name, found in named:
        cosines = (f"{found[key]:.6f}" for key in ("min_cosine", "mean_cosine"))
        yield (name, f"{found['relative']:.2e}", *cosines)


def conversion_report(
    report: dict[str, Any], out: str, sizes: dict[str, int]
) -> list[RenderableType]:
    """What a conversion wrote to `out` (bytes by file name), and how it was verified."""
    files = _table("file", "size")
    for name, size in sizes.items():
        files.add_row(name, _bytes(size))
    verified = verification_report(report) if report["checks"] else ["not verified"]
    return [*_calibrated(report), *verified, "", files, f"written to {out}"]


def _calibrated(report: dict[str, Any]) -> list[RenderableType]:
    """What the methods were shown, and how its tokens use the experts."""
    if "calibration" not in report:
        return []
    table = _table("calibrated", "tokens", "per expert", "dead experts", "entropy", "captured mass")
    _add_rows(table, calibration_rows(report["calibration"]))
    return [table, f"on {report['calibration']['data']}", ""]


def fold(paths: Sequence[str]) -> str:
    """``layers.0.mlp`` to ``layers.11.mlp`` as ``layers.{0..11}.mlp``; ``{0..10..2}`` in steps."""
    parts = [path.split(".") for path in paths]
    varying = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if not varying:
        return paths[0]
    numbers = [int(part[varying[0]]) for part in parts]
    step = numbers[1] - numbers[0]
    text = f"{numbers[0]}..{numbers[-1]}" + (f"..{step}" if step != 1 else "")
    parts[0][varying[0]] = f"{{{text}}}"
    return ".".join(parts[0])


def short(number: int) -> str:
    """``134515008`` as ``134.5M``."""
    value, unit = float(number), ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.95 or unit == "P":
            break
        value /= 1000
    return f"{value:.1f}{unit}" if unit else str(number)


def _bytes(number: int) -> str:
    text = short(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _misses(located: Located) -> Table:
    table = _table("no FFN", "because", "at")
    _add_rows(table, [(m.path, m.reason, m.source or m.node) for m in located.misses])
    return table


def _add_rows(table: Table, rows: Iterable[tuple[str, ...]]) -> None:
    """Add `rows`; neighbours that differ only in one number of their path become one row."""
    for _, group in groupby(rows, key=lambda row: (re.sub(r"\d+", "#", row[0]), *row[1:])):
        run: list[tuple[str, ...]] = []
        for row in group:
            if run and not _continues([r[0] for r in run], row[0]):
                table.add_row(fold([r[0] for r in run]), *run[0][1:])
                run = []
            run.append(row)
        table.add_row(fold([r[0] for r in run]), *run[0][1:])


def _continues(paths: list[str], path: str) -> bool:
    """Whether `path` follows `paths`: one number grows, always the same and by the same step."""
    chain = [p.split(".") for p in (*paths[-2:], path)]
    steps = []
    for a, b in pairwise(chain):
        changed = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        if len(changed) != 1 or not (a[changed[0]].isdigit() and b[changed[0]].isdigit()):
            return False
        steps.append((changed[0], int(b[changed[0]]) - int(a[changed[0]])))
    return len(set(steps)) == 1


def _shape(ffn: FFN) -> str:
    gates = f"{len(ffn.expansions)} x " if len(ffn.expansions) > 1 else ""
    return f"{ffn.d_model} -> {gates}{ffn.d_ff} -> {ffn.d_out}"


def _experts(spec: MoESpec) -> str:
    return f"{spec.num_experts} experts of {spec.width}, a token visits {spec.top_k}"


def _spec_json(spec: MoESpec) -> dict[str, Any]:
    return {
        "path": spec.ffn.path,
        "method": spec.experts.method,
        "router": spec.router.method,
        "num_experts": spec.num_experts,
        "width": spec.width,
        "top_k": spec.top_k,
        "scale": spec.scale,
        "promise": spec.promise,
        "seed": spec.seed,
    }
