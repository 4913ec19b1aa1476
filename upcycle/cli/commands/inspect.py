"""``upcycle inspect``."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("model")
@options.inputs
@options.as_json
@options.trust
@options.log
def inspect(model: str, inputs: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """List the dense FFNs of MODEL, and what only looks like one.

    Of a directory that upcycle wrote: its layers, and the dense neurons that they are made of.
    """
    with collector_paused():
        from upcycle.cli import inspection, preview
        from upcycle.cli import tables_of_reports as report
        from upcycle.cli.tables_of_inspection import converted_report
        from upcycle.models.dense import open_model

        if inspection.is_converted(Path(model)):
            found = inspection.inspect_converted(Path(model))
            console.show(as_json, found, lambda: converted_report(found))
            return
        source = open_model(model, inputs=inputs, trust_remote_code=trust_remote_code)
        located = preview.inspect_model(source)
    data = report.located_json(located)
    console.show(as_json, data, lambda: report.located_report(located))
