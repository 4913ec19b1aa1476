"""``upcycle prune`` and ``upcycle place``: fewer experts, or the same in another order."""

from pathlib import Path
from typing import Any, cast

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--keep", required=True, type=click.IntRange(min=1), help="Experts left of a layer.")
@click.option(
    "--by",
    type=click.Choice(["frequency", "mass", "norm"]),
    default="norm",
    help="What an expert matters by: tokens, their weights, or the length of what it adds.",
)
@options.data
@options.text_field
@options.out
@options.overwrite
@options.as_json
@options.trust
@options.pickle
@options.log
def prune(
    directory: Path,
    keep: int,
    by: str,
    data: tuple[str, ...],
    text_field: str,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Write DIRECTORY without the experts that matter least on some data.

    It prints how far the outputs move.

    \b
    Example: upcycle prune smollm2-drop --keep 6 --text sample.txt --out smollm2-pruned
    """
    with collector_paused():
        from upcycle.cli.tables_of_operations import rewritten_json, rewritten_report
        from upcycle.data.calibration_files import read_calibration
        from upcycle.operations.prune import By
        from upcycle.operations.prune import prune as pruned
        from upcycle.operations.rewritten import rewrite
        from upcycle.operations.trace_data import batches_of

    given = read_calibration(data, field=text_field, allow_pickle=allow_pickle) if data else None
    left: dict[str, tuple[int, ...]] = {}

    def change(model: Any) -> Any:
        found = batches_of(model, given, directory=directory, trust_remote_code=trust_remote_code)
        left.update(pruned(model, found.batches, keep, by=cast(By, by)))
        return model

    with console.progress() as progress:
        done = rewrite(
            directory,
            out,
            change,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    data_of = {**rewritten_json(done), "experts": {path: list(e) for path, e in left.items()}}
    console.show(as_json, data_of, lambda: rewritten_report(done, left))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--trace",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `upcycle trace` recorded of DIRECTORY.",
)
@click.option("--devices", required=True, type=click.IntRange(min=2), help="Devices in all.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, help="Nodes that they are in.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the starts.")
@options.out
@options.overwrite
@options.as_json
@options.trust
@options.log
def place(
    directory: Path,
    trace: Path,
    devices: int,
    nodes: int,
    seed: int,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Write DIRECTORY with its experts renumbered, so that tokens change devices seldom.

    Each device gets a block of neighbouring experts, as expert parallelism hands them out; no
    output changes. placement.json in --out has the plan.

    \b
    Example: upcycle place smollm2-drop --trace t.npz --devices 4 --out smollm2-placed
    """
    with collector_paused():
        from upcycle.cli import inspection
        from upcycle.cli.tables_of_operations import placement_report, rewritten_json
        from upcycle.operations.placement import place as placed
        from upcycle.operations.renumber import FILE, renumber, write_plan
        from upcycle.operations.rewritten import rewrite

    recorded = inspection.trace_of(directory, trace, trust_remote_code=trust_remote_code)
    found = placed(recorded, devices, nodes, seed=seed)

    def change(model: Any) -> Any:
        renumber(model, found)
        return model

    with console.progress() as progress:
        done = rewrite(
            directory,
            out,
            change,
            beside=lambda folder: write_plan(folder / FILE, recorded, found, devices, nodes),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    hops = {"placed": found.cost, "contiguous": found.contiguous, "random": found.random}
    data = {**rewritten_json(done), "hops": hops, "is_best": found.is_best}
    console.show(as_json, data, lambda: placement_report(found, done))
