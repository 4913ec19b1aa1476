"""The tables and the plot of a benchmark."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from upcycle.cli.tables import add_rows, new_table
from upcycle.errors import UsageError
from upcycle.util.wording import short, size

LEGEND = (
    "times are medians (quartiles); a time ratio is converted / dense in the same round, so below "
    "1 the converted model is faster; the floor is what the machine's best rates allow, as a part "
    "of the time, above 100% if caches help"
)
MODELS = ("dense", "converted")
_UNITS = (("s", 1), ("ms", 1e3), ("us", 1e6))
METRICS = {
    "AMU": ("memory use", "part of the memory"),
    "PCU": ("processor use", "part of the processors"),
    "AL": ("latency", "seconds of a request"),
    "TT": ("throughput", "tokens per second"),
    "AEC": ("power", "watts"),
    "MCR": ("compression", "times the quality kept"),
    "energy": ("energy", "joules"),
}


def bench_report(found: Mapping[str, Any]) -> list[RenderableType]:
    """Tables of sizes, layers, whole models and the metrics of EfficientLLM."""
    machine = found["machine"]
    parts: list[RenderableType] = [
        f"{found['model']} with {found['recipe']}, {found['engine']}, {machine['dtype']}, "
        f"{machine['threads']} threads; this machine at its best: {machine['flops'] / 1e9:.0f} "
        f"GFLOP/s, {machine['bandwidth'] / 1e9:.1f} GB/s",
        "",
        _sizes(found),
    ]
    if found["layers"]:
        layers = new_table(
            "layer", "tokens", "dense", "converted", "time ratio", "floors", "experts visited"
        )
        add_rows(layers, [_layer(row) for row in found["layers"]])
        parts += ["", layers]
    whole = new_table("whole model", "tokens", "dense", "converted", "time ratio", "floors")
    add_rows(whole, _whole(found))
    six = new_table("EfficientLLM", "metric", "dense", "converted", "unit")
    for name, (metric, unit) in METRICS.items():
        values = (found["six"][model][name] for model in MODELS)
        shown = ("not measured" if value is None else f"{value:.4g}" for value in values)
        six.add_row(name, metric, *shown, unit)
    training = found.get("training") or {}
    if "per_parameter" in training:
        names = {"dense": "dense", "converted": "converted", "active": "converted, by active ones"}
        rates = training["per_parameter"]
        said = ", ".join(f"{names[name]} {rate:.3g}" for name, rate in rates.items())
        six.caption = f"training, tokens per second and parameter: {said}"
    return [*parts, "", whole, "", six, "", LEGEND, "", conclusion(found)]


def conclusion(found: Mapping[str, Any]) -> str:
    """What was measured, in one sentence."""
    last = found["reading"][-1]
    unit = found.get("unit", "tokens")
    what = "one batch" if last["tokens"] is None else f"{last['tokens']} {unit}"
    clauses = [f"Reading {what} it {_speed(last)}"]
    if found["writing"]:
        clauses.append(f"writing it {_speed(found['writing'])}")
    if found.get("training"):
        clauses.append(f"training it {_speed(found['training'])}")
    factor = found["disk"]["converted"] / found["disk"]["dense"]
    return f"{'; '.join(clauses)}; on disk it takes {factor:.2f} times the bytes."


def _speed(row: Mapping[str, Any]) -> str:
    low, middle, high = (row["ratio"][key] for key in ("low", "median", "high"))
    if low <= 1 <= high:
        return (
            f"is as fast as the dense model, within the spread of the rounds ({low:.2f} to "
            f"{high:.2f} of its time)"
        )
    if middle < 1:
        return f"is {1 / middle:.2f} times as fast as the dense model"
    return f"is slower: it takes {middle:.2f} times as long as the dense model"


def _sizes(found: Mapping[str, Any]) -> RenderableType:
    costs, memory = found["costs"], found["memory"]
    table = new_table("size", "dense", "converted")
    before, after = costs["parameters_before"], costs["parameters_after"]
    table.add_row("parameters", short(before), short(after))
    table.add_row("active parameters", short(before), short(costs["active_parameters"]))
    flops = (f"{short(costs[key])}FLOP" for key in ("flops_before", "flops_after"))
    table.add_row("a token in the converted FFNs", *flops)
    table.add_row("weights in memory", *(size(int(memory[model])) for model in MODELS))
    table.add_row("bytes on disk", *(size(int(found["disk"][model])) for model in MODELS))
    return table


def _layer(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["path"], str(row["tokens"]), *_times(row), str(row["visited_experts"])


def _whole(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in found["reading"]:
        unit = f" {found['unit']}" if "unit" in found else ""
        count = "one batch" if row["tokens"] is None else f"{row['tokens']}{unit}"
        yield "reads", count, *_times(row)
    if found["writing"]:
        yield "writes", "1", *_times(found["writing"])
    if found.get("training"):
        row = found["training"]
        yield "trains", str(row["tokens"] or "one batch"), *_times(row)


def _times(row: Mapping[str, Any]) -> Iterator[str]:
    for model in MODELS:
        times = row[model]
        unit, factor = next(u for u in _UNITS if times["median"] * u[1] >= 1 or u[0] == "us")
        low, middle, high = (_digits(times[key] * factor) for key in ("low", "median", "high"))
        yield f"{middle} {unit} ({low} to {high})"
    low, middle, high = (f"{row['ratio'][key]:.2f}" for key in ("low", "median", "high"))
    yield f"{middle} ({low} to {high})"
    floors = [row[m]["floor"] and row[m]["floor"] / row[m]["median"] for m in MODELS]
    yield ", ".join("-" if part is None else f"{part:.0%}" for part in floors)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def check_plot(file: Path) -> None:
    """Raise UsageError if `plot` could not draw into `file`."""
    if file.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {file}: name a .png or .svg file")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Draw the speed-up over dense by the number of tokens; `file` as `check_plot` allows it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    lines: dict[str, list[Any]] = {"whole model, reads": found["reading"]}
    if found["writing"]:
        lines["whole model, writes"] = [found["writing"]]
    for row in found["layers"]:
        lines.setdefault(row["path"], []).append(row)
    for name, rows in lines.items():
        tokens = [row["tokens"] or 1 for row in rows]  # one batch stands at 1
        axes.plot(tokens, [1 / row["ratio"]["median"] for row in rows], marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed-up over dense")
    axes.set_title(f"{found['model']} with {found['recipe']}, {found['engine']}")
    axes.legend(fontsize="small")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(file, bbox_inches="tight")
    pyplot.close(figure)
