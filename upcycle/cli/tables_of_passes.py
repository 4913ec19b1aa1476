"""The passes of a conversion as a table, and what each of them made as text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from torch import fx, nn

from upcycle.capture.recorder import Program, op_name
from upcycle.cli import console
from upcycle.cli.tables import new_table
from upcycle.cli.tables_of_reports import located_report
from upcycle.conversion.make import Made
from upcycle.conversion.passes import PASSES
from upcycle.ir.report import Report
from upcycle.ir.spec import Plan


def passes_json() -> list[dict[str, str]]:
    """The passes as data."""
    return [
        {"name": p.name, "takes": p.takes, "gives": p.gives, "does": p.does, "where": p.where}
        for p in PASSES
    ]


def passes_report() -> list[RenderableType]:
    """The passes as a table."""
    table = new_table("pass", "takes", "gives", "how")
    for one in PASSES:
        table.add_row(one.name, one.takes, one.gives, one.does)
    return [table]


def shown_after(names: Sequence[str]) -> Mapping[str, Callable[[Any], None]]:
    """What prints the results of these passes."""

    def printer(name: str) -> Callable[[Any], None]:
        def show(made: Any) -> None:
            console.print_result(f"after {name}", *_SHOWN[name](made), "")

        return show

    return {name: printer(name) for name in names}


def _program(program: Program) -> list[RenderableType]:
    """A line for each node: its name, what it calls, its shape, and where it comes from."""
    table = new_table("node", "operation", "shape", "module", "source")
    for node in program.graph.nodes:
        shape = " x ".join(map(str, node.meta.get("shape", ())))
        kind = op_name(node.target) if node.op == "call_function" else node.op
        place = str(node.meta.get("parameter") or node.meta.get("path", ""))
        table.add_row(node.name, kind, shape, place, str(node.meta.get("source", "")))
    return [table]


def _plan(plan: Plan) -> list[RenderableType]:
    table = new_table("FFN", "layer", "experts", "top_k", "router")
    for spec in plan.specs:
        experts = f"{spec.num_experts} of {spec.width}" + (f" + {spec.shared}" * bool(spec.shared))
        table.add_row(spec.ffn.path, spec.ffn.place, experts, str(spec.top_k), spec.router.method)
    return [table]


def _made(made: Made) -> list[RenderableType]:
    if made.calibration is None:
        return [*_plan(made.plan), "made one after the other while they are written"]
    table = new_table("FFN", "tokens", "load", "without any", "entropy", "captured mass")
    for usage in made.calibration.layers:
        table.add_row(*map(str, usage.cells()))
    return [table]


def _converted(converted: tuple[nn.Module, Plan]) -> list[RenderableType]:
    model, _ = converted
    return [str(model.graph) if isinstance(model, fx.GraphModule) else str(model)]


def _files(directory: Path) -> list[RenderableType]:
    table = new_table("file", "bytes")
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        table.add_row(str(path.relative_to(directory)), str(path.stat().st_size))
    return [table]


def _report(report: Report) -> list[RenderableType]:
    table = new_table("check", "error", "allowed")
    for check in report.checks:
        table.add_row(check.what, f"{check.error:.2e}", f"{check.allowed:.2e}")
    return [table]


_SHOWN: Mapping[str, Callable[[Any], list[RenderableType]]] = {
    "capture": _program,
    "locate": lambda located: list(located_report(located)),
    "plan": _plan,
    "transform": _made,
    "rewrite": _converted,
    "lower": _files,
    "verify": _report,
}
