"""``upcycle verify``."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("dense")
@click.argument("converted", type=click.Path(path_type=Path, exists=True, file_okay=False))
@options.inputs
@options.as_json
@options.trust
@options.log
def verify(
    dense: str, converted: Path, inputs: str | None, as_json: bool, trust_remote_code: bool
) -> None:
    """Compare CONVERTED with the DENSE model that it was made from."""
    with collector_paused():
        from upcycle.cli import tables_of_reports as report
        from upcycle.conversion import named_models as driver
        from upcycle.models.dense import open_model
        from upcycle.verification.whole_model import raise_if_failed

    source = open_model(dense, inputs=inputs, trust_remote_code=trust_remote_code)
    checked = driver.verify_paths(source, converted)
    if as_json:
        console.print_json(checked)
    else:
        console.print_result(*report.verification_report(checked))
    raise_if_failed(checked)
