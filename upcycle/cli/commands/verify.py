"""``upcycle verify`` and ``upcycle diff``: compare two directories."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import DIFFERENT, collector_paused


@click.command()
@click.argument("dense")
@click.argument("converted", type=click.Path(path_type=Path))
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="MODEL",
    help="Where experts come from, if that is Python code; once for each, in their order.",
)
@options.data
@options.text_field
@options.inputs
@options.as_json
@options.trust
@options.pickle
@options.log
def verify(
    dense: str,
    converted: Path,
    sources: tuple[str, ...],
    data: tuple[str, ...],
    text_field: str,
    allow_pickle: bool,
    inputs: str | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Compare CONVERTED with the DENSE model that it was made from.

    \b
    Example: upcycle verify base experts-moe --data law.txt
    """
    with collector_paused():
        from upcycle.cli import tables_of_reports as report
        from upcycle.conversion.verify_directory import verify_directory
        from upcycle.data.calibration import called_data
        from upcycle.data.calibration_files import read_calibration
        from upcycle.models.named import open_model
        from upcycle.targets.description import made_from
        from upcycle.verification.checks import raise_if_failed

    with called_data():
        given = (
            read_calibration(data, field=text_field, allow_pickle=allow_pickle) if data else None
        )
    _, found = made_from(converted)
    if found is not None and dense == found.hub:  # the commit that it was converted from
        dense = found.name
    with console.progress() as progress:
        source = open_model(
            dense, inputs=inputs, trust_remote_code=trust_remote_code, progress=progress
        )
        checked = verify_directory(
            source, converted, sources=sources, given=given, progress=progress
        )
    console.show(as_json, checked.to_json(), lambda: report.verification_report(checked))
    raise_if_failed(checked)


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
