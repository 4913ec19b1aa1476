"""``upcycle passes``."""

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@options.as_json
@options.log
def passes(as_json: bool) -> None:
    """List the passes of a conversion, in their order.

    `upcycle convert --print-after PASS` prints what one made, `--stop-after PASS` ends there.
    """
    with collector_paused():
        from upcycle.cli.tables_of_passes import passes_json, passes_report

    console.show(as_json, passes_json(), passes_report)
