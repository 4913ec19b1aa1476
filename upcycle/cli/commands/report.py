"""``upcycle report``: the report of a conversion as a page."""

import webbrowser
from pathlib import Path
from typing import Any

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write the page.  [default: report.html in DIRECTORY]",
)
@click.option("--open", "is_opened", is_flag=True, help="Show it in a browser.")
@options.as_json
@options.trust
@options.log
def report(
    directory: Path, out: Path | None, is_opened: bool, as_json: bool, trust_remote_code: bool
) -> None:
    """Write report.html of the converted model in DIRECTORY, with what was measured since.

    Without report.json, as after training, `prune` or `place`, the page tells what the files tell.

    With --json: print report.json as this version reads it, or without one what `upcycle inspect`
    prints, and write a page with --out alone.
    """
    with collector_paused():
        from upcycle.cli import inspection
        from upcycle.page.mixture import read_mixture
        from upcycle.page.page import page_file, read_contents, write_page
        from upcycle.targets.description import is_described

    contents: Any
    data: dict[str, Any]
    if not is_described(directory) and inspection.is_moe(directory):
        data = inspection.inspect_moe(directory, trust_remote_code=trust_remote_code)
        contents = read_mixture(directory, data)
    else:
        contents = read_contents(directory)
        data = contents.report.to_json()
    if as_json:
        console.print_json(data)
    if out is not None or is_opened or not as_json:
        file = write_page(contents, out or page_file(directory))
        if not as_json:
            console.print_result(f"written to {file}")
        if is_opened and not webbrowser.open(file.resolve().as_uri()):
            console.log.warning("%s: no browser was found here; open the file in one", file)
