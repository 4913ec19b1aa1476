"""What was found, planned and verified, as tables for people and as plain data for programs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from upcycle.cli.tables import add_rows, new_table
from upcycle.ir.ffn import FFN, Located
from upcycle.ir.measured import Check, Costs, Distance, LayerDistance, OnnxFacts
from upcycle.ir.report import Report, plain
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.verdict import Verdict, likeness, verdict
from upcycle.targets.destination import Destination, grouped
from upcycle.util.wording import count, short, size

if TYPE_CHECKING:
    from upcycle.conversion.exports.task import Exported

MAX_LAYERS = 12  # in the table of a verification: the worst ones
MAX_UNREAD = 4  # names of tensors


def located_json(located: Located) -> dict[str, Any]:
    """Plain data for ``upcycle inspect --json``."""
    return {
        "ffns": [ffn.to_json() for ffn in located.ffns],
        "misses": [miss.to_json() for miss in located.misses],
    }


def located_report(located: Located) -> list[RenderableType]:
    """The FFNs of a model, and the places that only look like one."""
    ffns = new_table("FFN", "kind", "shape", "activation", "placement")
    rows = [
        (f.path or "(root)", f.kind, _shape(f), f.pointwise.name, f.placement) for f in located.ffns
    ]
    add_rows(ffns, rows)
    return [ffns, f"{count(located.ffns, 'dense FFN')} found", *_misses(located)]


def plan_json(plan: Plan, costs: Costs, written: Destination) -> dict[str, Any]:
    """Plain data for ``upcycle plan --json``."""
    converted = {spec.ffn.path for spec in plan.specs}
    return {
        "recipe": plan.recipe_name,
        "promise": plan.promise if plan.specs else None,
        "layers": [_spec_json(spec) for spec in plan.specs],
        "dense": [ffn.path for ffn in plan.located.ffns if ffn.path not in converted],
        "misses": located_json(plan.located)["misses"],
        "costs": costs.to_json(),
        "verdict": plain(_expected(plan, costs)) if plan.specs else None,
        "checkpoint": written.to_json(),
    }


def plan_report(
    plan: Plan, costs: Costs, written: Destination, *, verbose: bool = False
) -> list[RenderableType]:
    """What each FFN becomes, what that costs, and which software runs the result."""
    layers = new_table("FFN", "shape", "becomes", "promise")
    becomes = {
        s.ffn.path: (f"{s.num_experts} experts of {s.width}, a token visits {s.top_k}", s.promise)
        for s in plan.specs
    }
    dense = ("stays dense", "")
    ffns = plan.located.ffns
    add_rows(layers, [(f.path, _shape(f), *becomes.get(f.path, dense)) for f in ffns])
    of = f"{len(plan.specs)} of {count(ffns, 'dense FFN')}"
    parts: list[RenderableType] = [layers, f"{plan.recipe_name} converts {of}"]
    if plan.specs:
        parts += ["", costs_table(costs), "", *runtimes_report(written, verbose=verbose)]
    parts += _misses(plan.located)
    return [*parts, "", *verdict_lines(_expected(plan, costs))] if plan.specs else parts


def _expected(plan: Plan, costs: Costs) -> Verdict:
    return verdict(plan.promise, costs, None, dtype="float32", recipe=plan.recipe_name)


def runtimes_report(written: Destination, *, verbose: bool) -> list[RenderableType]:
    """The form of the checkpoint, with `verbose` why not another, and the matrix of runtimes."""
    table = new_table("runtime", "runs it")
    for name, support in written.runtimes.items():
        table.add_row(name, support.text())
    parts: list[RenderableType] = [f"written as {written.text()}"]
    if verbose:
        parts += [f"not as {names}: {reason}" for names, reason in grouped(written.near).items()]
    elif written.near:
        parts.append("`upcycle plan -v` says why it is no other architecture")
    return [*parts, table]


def costs_table(costs: Costs) -> Table:
    """The size of the model before and after."""
    before, after = costs.parameters_before, costs.parameters_after
    table = new_table("costs", "dense", "converted", "factor")
    for name, old, new, text in (
        ("parameters", before, after, short),
        ("active parameters", before, costs.active_parameters, short),
        ("FLOPs per token, converted FFNs", costs.flops_before, costs.flops_after, short),
        ("bytes on disk", costs.bytes_before, costs.bytes_on_disk, size),
    ):
        table.add_row(name, text(old), text(new), f"{new / old:.2f}" if old else "")
    if costs.compensation_parameters:
        share = costs.compensation_flops / costs.flops_after
        what = f"{short(costs.compensation_parameters)} parameters"
        table.add_row("of these for compensation", "", what, f"{share:.2f} of the FLOPs")
    table.add_row("peak memory", "", size(costs.peak_bytes), "")
    return table


def verification_report(report: Report) -> list[RenderableType]:
    """The checks of a verification, each with its error and what was allowed."""
    parts = checks_report(report.checks) if report.checks else []
    if rows := [*_distances(report)]:
        what = "compared with the dense model"
        distances = new_table(what, "relative error", "cosine min", "mean")
        add_rows(distances, rows)
        parts += ["", distances]
        parts.append(_measured_on(report))
        if others := (report.layers or ())[MAX_LAYERS:]:
            parts.append(f"{count(others, 'layer')} with smaller errors in report.json")
    if report.end_to_end and report.end_to_end.language_model:
        metrics = new_table("language model", "")
        for name, value in plain(report.end_to_end.language_model).items():
            metrics.add_row(name.replace("_", " "), f"{value:.6g}")
        parts += ["", metrics]
    parts += onnx_lines(report.onnx)
    failed = sum(not check.passed for check in report.checks)
    found = f"{failed} failed" if failed else "all within what the recipe allows"
    if report.checks:
        parts.append(f"{count(report.checks, 'check')}: {found}")
    return parts if failed else [*parts, "", *verdict_lines(report.verdict)]


def _measured_on(report: Report) -> str:
    """What the figures of the layers and of the whole model are of."""
    drawn = sorted({row.inputs for row in report.layers or () if row.inputs})
    layers = "on the tokens that it gets there"
    if drawn:
        layers = f"by itself, on {', '.join(drawn)}"
    whole = f"measured on {report.end_to_end.inputs}" if report.end_to_end else "measured"
    return whole if not report.layers else f"{whole}; each layer {layers}"


def onnx_lines(facts: OnnxFacts | None) -> list[RenderableType]:
    """What an ONNX file that is not in float32 lost against the model that it was made from."""
    if facts is None:
        return []
    if facts.outputs is None:
        return ["", f"the ONNX file: {facts.not_run}"] if facts.not_run else []
    lines: list[RenderableType] = [
        "",
        f"the ONNX file against the model in float32: off by {facts.relative:.1e} of the largest",
        f"  {likeness(facts.outputs, 'the float model', digits=3)}",
    ]
    if facts.matrices is not None:
        rounded, experts = facts.matrices, len(facts.layers or ())
        lines.append(
            f"  Rounded to 8 bits beside the experts of {count(range(experts), 'layer')}: "
            f"{rounded.count} matrices, from {size(rounded.bytes_before)} to "
            f"{size(rounded.bytes_after)}."
        )
    return lines


def checks_report(checks: Sequence[Check]) -> list[RenderableType]:
    """A table of checks, and what to know of those that followed choices of experts."""
    table = new_table("check", "error", "allowed", "")
    for check in checks:
        passed = "ok" if check.passed else "FAILED"
        table.add_row(check.what, f"{check.error:.2e}", f"{check.allowed:.2e}", passed)
    followed = [
        f"{check.what}: {check.elsewhere} of {check.tokens} choices of experts fell otherwise; "
        "outputs were compared with the same choices"
        for check in checks
        if check.elsewhere is not None
    ]
    return [table, *followed]


def export_report(done: "Exported", out: str, sizes: dict[str, int]) -> list[RenderableType]:
    """What ``upcycle export`` wrote to `out` (bytes by file name), and how it was verified."""
    parts: list[RenderableType] = checks_report(done.checks) if done.checks else ["not verified"]
    if done.rounded is not None:
        line = f"with the rounded weights outputs are {done.rounded.rms:.2e} (rms) from the model's"
        if (same := done.rounded.top1_agreement) is not None:
            line += f", and the likeliest token is the same at {same:.1%} of the places"
        parts.append(line)
    return [*parts, *onnx_lines(done.onnx), "", _files(sizes), f"written to {out} ({done.form})"]


def _files(sizes: dict[str, int]) -> Table:
    files = new_table("file", "size")
    for name, number in sizes.items():
        files.add_row(name, size(number))
    return files


def verdict_lines(found: Verdict) -> list[RenderableType]:
    """What the result is good for."""
    return [f"verdict: {found.headline}", *(f"  {line}" for line in found.lines)]


def _distances(report: Report) -> Iterator[tuple[str, ...]]:
    layers: Sequence[LayerDistance] = report.layers or ()
    if len(layers) > MAX_LAYERS:
        layers = sorted(layers, key=lambda row: -row.relative)[:MAX_LAYERS]
    outputs = report.end_to_end.outputs if report.end_to_end else {}
    named: list[tuple[str, Distance]] = [(row.path, row) for row in layers]
    for name, found in [*named, *outputs.items(), *(report.sources or {}).items()]:
        cosines = (f"{cosine:.6f}" for cosine in (found.min_cosine, found.mean_cosine))
        yield (name, f"{found.relative:.2e}", *cosines)


def conversion_report(report: Report, out: str, sizes: dict[str, int]) -> list[RenderableType]:
    """What a conversion wrote to `out` (bytes by file name), and how it was verified."""
    verified = ["not verified", *verdict_lines(report.verdict)]
    if report.checks:
        verified = verification_report(report)
    return [
        *_calibrated(report),
        *_unread(report),
        _files(sizes),
        f"written to {out}",
        "",
        *verified,
    ]


def _unread(report: Report) -> list[RenderableType]:
    if not report.unread:
        return []
    first, more = report.unread[:MAX_UNREAD], len(report.unread) - MAX_UNREAD
    names = ", ".join(first) + (f" and {more} more" if more > 0 else "")
    return ["", f"left out, as nothing in the model reads them: {names}"]


def _calibrated(report: Report) -> list[RenderableType]:
    """The calibration data, and how its tokens use the experts."""
    if report.calibration is None:
        return []
    figures = ("tokens", "per expert", "dead experts", "entropy", "captured mass")
    table = new_table("calibrated", *figures)
    add_rows(table, [usage.cells() for usage in report.calibration.layers])
    return [table, f"counted on the calibration data: {report.calibration.data}", ""]


def _misses(located: Located) -> list[RenderableType]:
    table = new_table("no FFN", "because", "at")
    add_rows(table, [(m.path, m.reason, m.source or m.node) for m in located.misses])
    return ["", table] if located.misses else []


def _shape(ffn: FFN) -> str:
    gates = f"{len(ffn.expansions)} x " if len(ffn.expansions) > 1 else ""
    return f"{ffn.d_model} -> {gates}{ffn.d_ff} -> {ffn.d_out}"


def _spec_json(spec: MoESpec) -> dict[str, Any]:
    names = ("num_experts", "width", "top_k", "scale", "promise", "seed")
    return {
        "path": spec.ffn.path,
        "method": spec.experts.method,
        "router": spec.router.method,
        **{name: getattr(spec, name) for name in names},
    }
