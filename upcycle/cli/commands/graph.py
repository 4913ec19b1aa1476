"""``upcycle graph``: what a model does, as a picture."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("model")
@click.option(
    "--around", metavar="LAYER", help="Show the operations in this layer, and those next to it."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write it: .svg, .html, .dot or .graphml.",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@options.inputs
@options.as_json
@options.trust
@options.log
def graph(
    model: str,
    around: str | None,
    out: Path | None,
    overwrite: bool,
    inputs: str | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Draw MODEL, dense or converted: its modules, its FFNs, its MoE layers, and what is no FFN.

    A module without an FFN is one box, and what repeats is there once. With --json: print the
    graph, and write a file with --out alone.
    """
    with collector_paused():
        import networkx as nx

        from upcycle.cli.pictured import pictured
        from upcycle.drawing.graph import graph_of
        from upcycle.drawing.write import check_form, write_graph
        from upcycle.errors import UsageError

        if out is None and not as_json:
            raise click.UsageError("--out is missing; give a file, or --json")
        if out is not None:
            check_form(out)
            if out.exists() and not overwrite:
                raise UsageError(f"{out}: it exists; give another --out, or --overwrite")
        with console.progress() as progress:  # a GGUF file of a hub is downloaded
            found = pictured(
                model, inputs=inputs, trust_remote_code=trust_remote_code, progress=progress
            )
        made = graph_of(found.program, found.located, around, moe=found.moe, title=found.title)
    if out is not None:
        write_graph(made, out)
    if as_json:
        console.print_json(nx.node_link_data(made, edges="edges"))
    else:
        boxes, operations = made.number_of_nodes(), made.graph["operations"]
        console.print_result(f"{boxes} boxes for {operations} operations, written to {out}")
