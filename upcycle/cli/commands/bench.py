"""``upcycle bench``."""

from pathlib import Path
from typing import Any

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


def _numbers(ctx: click.Context, param: click.Parameter, given: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in given.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{given}: give numbers above 0 with commas between, as 1,16,256")
    return numbers


@click.command()
@click.argument("converted", type=click.Path(path_type=Path))
@click.option("--against", metavar="DENSE", help="The dense model.  [default: as converted]")
@click.option(
    "--engine", type=click.Choice(["torch", "onnx"]), default="torch", help="What runs both models."
)
@click.option(
    "--tokens",
    metavar="N,...",
    callback=_numbers,
    default="1,16,256,2048",
    help="How many tokens at a time.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=0),
    default=1,
    help="How many of the converted layers to measure by themselves; 0 is all.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the engine.  [default: torch's own number]"
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=2.0,
    help="Time for each figure; five rounds at least.",
)
@click.option("--training", is_flag=True, help="Measure a training step, too, in torch.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the speed-up into a .png or .svg file.",
)
@options.inputs
@options.as_json
@options.trust
@options.log
def bench(
    converted: Path,
    against: str | None,
    plot: Path | None,
    inputs: str | None,
    as_json: bool,
    trust_remote_code: bool,
    **wanted: Any,
) -> None:
    """Measure CONVERTED beside the dense model: time, memory, and the floor of this machine."""
    with collector_paused():
        from upcycle.bench import run
        from upcycle.bench.files import bench_files
        from upcycle.cli import tables_of_bench as tables
        from upcycle.errors import UsageError
        from upcycle.models.dense import Source
        from upcycle.models.named import open_model
        from upcycle.targets.description import made_from
        from upcycle.util.untrusted import names_code

    model, source_of = made_from(converted)
    found_at = source_of.name if source_of else model or ""
    is_safe = source_of is not None or found_at.startswith("sample:")
    if against is None and (not is_safe or names_code(found_at)):  # what a file names is not run
        why = "it has no report.json"
        if found_at:
            why = f"it was made from {found_at}, and does not say where that is"
        raise UsageError(f"{converted}: {why}; name the dense model with --against")
    if plot is not None:
        tables.check_plot(plot)
    name = against or found_at
    trusted = trust_remote_code and against is not None  # nor is the code of what a file names
    with console.progress() as progress:
        source = open_model(name, inputs=inputs, trust_remote_code=trusted, progress=progress)
    with console.progress() as progress:
        if isinstance(source, Source):
            found = run.bench(converted, source, run.Wanted(**wanted), progress)
        else:
            found = bench_files(converted, source, run.Wanted(**wanted), progress)
    if plot is not None:
        tables.plot(found, plot)
    console.show(as_json, found, lambda: tables.bench_report(found))
