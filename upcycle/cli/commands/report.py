"""``upcycle report``: the report of a conversion as a page."""

import webbrowser
from pathlib import Path

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
@options.log
def report(directory: Path, out: Path | None, is_opened: bool, as_json: bool) -> None:
    """Write report.html of the converted model in DIRECTORY, with what was measured since.

    With --json: print report.json as this version reads it, and write a page with --out alone.
    """
    with collector_paused():
        from upcycle.page.page import page_file, read_contents, write_page

    contents = read_contents(directory)
    if as_json:
        console.print_json(contents.report.to_json())
    if out is not None or is_opened or not as_json:
        file = write_page(contents, out or page_file(directory))
        if not as_json:
            console.print_result(f"written to {file}")
        if is_opened and not webbrowser.open(file.resolve().as_uri()):
            console.log.warning("%s: no browser was found here; open the file in one", file)
