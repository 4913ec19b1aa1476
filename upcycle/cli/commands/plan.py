"""``upcycle inspect`` and ``upcycle plan``: what is there, and what a recipe would do to it."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("model")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `upcycle trace` recorded of MODEL: load, balance, and who is chosen with whom.",
)
@options.inputs
@options.as_json
@options.trust
@options.log
def inspect(
    model: str, trace: Path | None, inputs: str | None, as_json: bool, trust_remote_code: bool
) -> None:
    """List the dense FFNs of MODEL, and what only looks like one.

    Of a mixture of experts: its layers, and if upcycle wrote it, the dense neurons behind them.
    """
    with collector_paused():
        from upcycle.cli import inspection, preview
        from upcycle.cli import tables_of_reports as report
        from upcycle.cli.tables_of_inspection import converted_report, moe_report
        from upcycle.models.named import open_model

        if trace is not None:
            from upcycle.cli.tables_of_routing import routing_json, routing_report

            recorded = inspection.trace_of(Path(model), trace, trust_remote_code=trust_remote_code)
            console.show(as_json, routing_json(recorded), lambda: routing_report(recorded))
            return
        directory = inspection.directory_of(Path(model))
        if inspection.is_converted(directory):
            found = inspection.inspect_converted(directory)
            console.show(as_json, found, lambda: converted_report(found))
            return
        if inspection.is_moe(Path(model)):
            found = inspection.inspect_moe(Path(model), trust_remote_code=trust_remote_code)
            console.show(as_json, found, lambda: moe_report(found))
            return
        with console.progress() as progress:  # a GGUF file of a hub is downloaded
            source = open_model(
                model, inputs=inputs, trust_remote_code=trust_remote_code, progress=progress
            )
        located = preview.inspect_model(source)
    data = report.located_json(located)
    console.show(as_json, data, lambda: report.located_report(located))


@click.command()
@click.argument("model")
@options.recipe
@options.runtimes
@options.inputs
@options.as_json
@options.trust
@options.log
def plan(
    model: str,
    recipe: str,
    overrides: tuple[str, ...],
    runtimes: tuple[str, ...],
    architecture: str | None,
    inputs: str | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Show what a recipe would do to MODEL, what it costs, and which software runs the result."""
    with collector_paused():
        from upcycle.cli import preview
        from upcycle.cli import tables_of_reports as report
        from upcycle.models.named import open_model
        from upcycle.recipe import reader as recipe_file

        loaded = recipe_file.load_recipe(recipe, overrides)
        with console.progress() as progress:
            source = open_model(
                model, inputs=inputs, trust_remote_code=trust_remote_code, progress=progress
            )
        planned, estimate, written = preview.plan_model(
            source, loaded, Path(recipe).name, runtimes=runtimes, architecture=architecture
        )
    data = report.plan_json(planned, estimate, written)
    console.show(
        as_json,
        data,
        lambda: report.plan_report(planned, estimate, written, verbose=console.is_verbose()),
    )
