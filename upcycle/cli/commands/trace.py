"""``upcycle trace``: which experts the tokens of some data visit."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@options.data
@options.text_field
@click.option("--tokens", type=click.IntRange(min=1), default=16384, help="Tokens in all, at most.")
@click.option("--length", type=click.IntRange(min=1), default=512, help="Tokens of a sequence.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The trace, an .npz file; as trace.npz in DIRECTORY `upcycle report` shows it.",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@options.as_json
@options.trust
@options.pickle
@options.log
def trace(
    directory: Path,
    data: tuple[str, ...],
    text_field: str,
    tokens: int,
    length: int,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Record which experts the tokens of some data visit in the MoE layers of DIRECTORY.

    DIRECTORY holds a converted model or a native mixture of experts of transformers.

    \b
    Example: upcycle trace minilm-moe --text law.txt --text code.txt --out minilm-trace.npz
    """
    with collector_paused():
        from upcycle.cli.mixture import check_mixture
        from upcycle.cli.new_file import check_new_file
        from upcycle.cli.tables_of_routing import routing_json, routing_report
        from upcycle.data.calibration_files import read_calibration
        from upcycle.operations.trace_data import named_classes, traced
        from upcycle.targets.load import load

    check_new_file(out, overwrite=overwrite)
    check_mixture(directory)
    given = read_calibration(data, field=text_field, allow_pickle=allow_pickle) if data else None
    model = load(directory, trust_remote_code=trust_remote_code)
    with console.progress() as progress:
        found = traced(
            model,
            named_classes(given, data),
            directory=directory,
            tokens=tokens,
            length=length,
            trust_remote_code=trust_remote_code,
            done=lambda at, of: progress("tracing", at, of),
        )
    found.save(out)
    console.show(as_json, routing_json(found), lambda: routing_report(found))
