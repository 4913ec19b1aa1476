"""``upcycle prune``, ``place`` and ``quantise``: write a directory that is there in another way."""

from pathlib import Path
from typing import Any, cast

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused

_out = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory for the result."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")


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
@_out
@_overwrite
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
@_out
@_overwrite
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


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--bits", required=True, type=click.Choice([8, 4]), help="Of a weight.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    default=0.9,
    help="A group is halved as long as its range shrinks to less than this; 0: one for each row.",
)
@click.option(
    "--min-group",
    type=click.Choice([16, 32, 64, 128, 256]),
    default=64,
    help="Weights of the smallest group.",
)
@_out
@_overwrite
@options.as_json
@options.trust
@options.log
def quantise(
    directory: Path,
    bits: int,
    alpha: float,
    min_group: int,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Write DIRECTORY with 8 or 4 bits for each weight of linear maps and experts.

    DIRECTORY holds a dense model or a mixture of experts. transformers loads the result, for which
    it needs the package compressed-tensors. It prints the error of every matrix, and how far the
    outputs move.

    \b
    Example: upcycle quantise smollm2-moe --bits 8 --out smollm2-int8
    """
    with collector_paused():
        from upcycle.cli.tables_of_operations import quantised_json, quantised_report
        from upcycle.operations.quantise import Rounded
        from upcycle.operations.quantise import quantise as quantised
        from upcycle.operations.rewritten import rewrite
        from upcycle.targets.compressed import check_reader

    check_reader()
    found: list[Rounded] = []

    def change(model: Any) -> Any:
        found.append(quantised(model, bits, alpha=alpha, min_group=min_group))
        return model

    with console.progress() as progress:
        done = rewrite(
            directory,
            out,
            change,
            beside=lambda folder: found[0].write(folder),
            dense=True,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    data = quantised_json(done, found[0])
    console.show(as_json, data, lambda: quantised_report(done, found[0]))
