"""``upcycle env``: what a bug report needs."""

import click

from upcycle.cli import console
from upcycle.cli.commands import options


@click.command()
@options.as_json
@options.log
def env(as_json: bool) -> None:
    """Print the versions and the machine, for a bug report."""
    from upcycle.cli.environment import environment
    from upcycle.cli.tables import new_table

    found = environment()
    table = new_table("", "")
    for name, value in found.items():
        table.add_row(name, str(value))
    console.show(as_json, found, lambda: [table])
