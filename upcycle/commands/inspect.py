"""``upcycle inspect``."""

import click

from upcycle import console
from upcycle.commands import options
from upcycle.program import collector_paused


@click.command()
@click.argument("model")
@options.inputs
@options.as_json
@options.trust
@options.log
def inspect(model: str, inputs: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """List the dense FFNs of MODEL, and what only looks like one."""
    with collector_paused():
        from upcycle import preview, report
        from upcycle.source import open_model

        source = open_model(model, inputs=inputs, trust_remote_code=trust_remote_code)
        located = preview.inspect_model(source)
    if as_json:
        console.print_json(report.located_json(located))
    else:
        console.print_result(*report.located_report(located))
