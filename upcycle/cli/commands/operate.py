"""``upcycle prune``, ``place`` and ``quantise``: write a directory that is there in another way."""

from pathlib import Path
from typing import Any, cast

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--keep", type=click.IntRange(min=1), help="Experts left of each layer; or:")
@click.option(
    "--below",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Remove those with a smaller share of their layer, such as 0.01.",
)
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
    keep: int | None,
    below: float | None,
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

    It prints the share of each expert, and how far the outputs move.

    \b
    Example: upcycle prune smollm2-drop --keep 6 --text sample.txt --out smollm2-pruned
             upcycle prune smollm2-drop --below 0.01 --by mass --out smollm2-pruned
    """
    with collector_paused():
        from upcycle.cli.mixture import check_mixture
        from upcycle.cli.tables_of_operations import pruned_json, pruned_report
        from upcycle.data.calibration_files import read_calibration
        from upcycle.operations.prune import By, Pruned
        from upcycle.operations.prune import prune as pruned
        from upcycle.operations.rewritten import recording, rewrite
        from upcycle.operations.trace_data import batches_of, held_out

    if (keep is None) == (below is None):
        raise click.UsageError("give one of --keep and --below")
    check_mixture(directory)
    given = read_calibration(data, field=text_field, allow_pickle=allow_pickle) if data else None
    seen: dict[str, Any] = {}
    settings: dict[str, Any] = {"by": by} | ({"keep": keep} if keep else {"below": below})
    left: dict[str, tuple[int, ...]] = {}

    def change(model: Any) -> Any:
        seen["data"] = batches_of(
            model, given, directory=directory, trust_remote_code=trust_remote_code
        )
        seen["pruned"] = pruned(model, seen["data"].batches, keep, below=below, by=cast(By, by))
        settings["on"] = seen["data"].what
        left.update(seen["pruned"].left)
        return model

    def judge(model: Any) -> Any:
        if given is None:
            return None
        return held_out(model, given, directory=directory, trust_remote_code=trust_remote_code)

    with console.progress() as progress:
        done = rewrite(
            directory,
            out,
            change,
            record=recording(directory, "prune", settings, left),
            judge=judge,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    found: Pruned = seen["pruned"]
    console.show(
        as_json,
        pruned_json(done, found),
        lambda: pruned_report(done, found, by=by, data=seen["data"].what, below=below),
    )


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
        from upcycle.cli.mixture import check_mixture
        from upcycle.cli.tables_of_operations import placement_report, rewritten_json
        from upcycle.operations.placement import place as placed
        from upcycle.operations.renumber import FILE, renumber, write_plan
        from upcycle.operations.rewritten import recording, rewrite

    check_mixture(directory)
    recorded = inspection.trace_of(directory, trace, trust_remote_code=trust_remote_code)
    found = placed(recorded, devices, nodes, seed=seed)
    order = {path: found.order(at).tolist() for at, path in enumerate(recorded.paths)}

    def change(model: Any) -> Any:
        renumber(model, found)
        return model

    with console.progress() as progress:
        done = rewrite(
            directory,
            out,
            change,
            beside=lambda folder: write_plan(folder / FILE, recorded, found, devices, nodes),
            record=recording(directory, "place", {"devices": devices, "nodes": nodes}, order),
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
@options.out
@options.overwrite
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
        from upcycle.cli.tables_of_rounding import quantised_json, quantised_report
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
