"""``upcycle diff``."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import DIFFERENT


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@options.as_json
@options.pickle
@options.log
@click.pass_context
def diff(ctx: click.Context, a: Path, b: Path, as_json: bool, allow_pickle: bool) -> None:
    """Compare the model directories A and B: configuration and tensors.

    The exit code is 0 if they are equal and 3 if they differ.
    """
    from upcycle.cli.difference import difference
    from upcycle.cli.tables_of_inspection import difference_report

    found = difference(a, b, allow_pickle=allow_pickle)
    console.show(as_json, found, lambda: difference_report(found))
    if not found["equal"]:
        ctx.exit(DIFFERENT)
