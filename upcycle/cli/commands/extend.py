"""``upcycle extend``: one more expert for each layer, or experts that do nothing."""

from pathlib import Path
from typing import Any

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@options.data
@options.text_field
@click.option(
    "--layers",
    default="all",
    metavar="all|shift|0,3,...",
    help="By number or path; `shift` is the half in which the data change the load most.",
)
@click.option(
    "--like",
    type=click.Choice(["visited", "mean"]),
    default="visited",
    help="The new expert: a copy of the most visited one, or the mean of all.",
)
@click.option(
    "--nulls",
    type=click.IntRange(min=1),
    help="Add so many experts that do nothing instead, a multiple of those that there are.",
)
@options.out
@options.overwrite
@options.as_json
@options.trust
@options.pickle
@options.log
def extend(
    directory: Path,
    data: tuple[str, ...],
    text_field: str,
    layers: str,
    like: str,
    nulls: int | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Write DIRECTORY with one more expert in each layer, which nobody chooses yet.

    The outputs stay as they are; raise the bias of the new experts while you train them
    (`upcycle.set_new_bias`).

    \b
    Example: upcycle extend smollm2-moe --data law.txt --out smollm2-extended
    """
    with collector_paused():
        from upcycle.cli.mixture import check_mixture
        from upcycle.cli.tables_of_operations import extended_report, rewritten_json
        from upcycle.data.calibration_files import read_calibration
        from upcycle.operations.extend import add_nulls, layers_by_shift, layers_named
        from upcycle.operations.extend import extend as extended
        from upcycle.operations.rewritten import recording, rewrite
        from upcycle.operations.trace_data import batches_of, traced

    check_mixture(directory)
    given = read_calibration(data, field=text_field, allow_pickle=allow_pickle) if data else None
    if layers == "shift" and given is None:
        raise click.UsageError("--layers shift compares --data with the default text; give --data")
    where: dict[str, Any] = {"directory": directory, "trust_remote_code": trust_remote_code}
    done_to: list[str] = []
    settings = {"layers": layers} | ({"like": like} if nulls is None else {"nulls": nulls})

    def change(model: Any) -> Any:
        batches = batches_of(model, given, **where).batches
        if nulls is not None:
            done_to.extend(layers_named(model, layers))
            return add_nulls(model, nulls, batches[:1])
        if layers == "shift":
            chosen = layers_by_shift(traced(model, None, **where), traced(model, given, **where))
        else:
            chosen = layers_named(model, layers)
        done_to.extend(chosen)
        return extended(
            model,
            batches,
            layers=None if layers == "all" else chosen,
            like="mean" if like == "mean" else "visited",
        )

    with console.progress() as progress:
        done = rewrite(
            directory,
            out,
            change,
            record=recording(directory, "extend", settings, {}),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    added = 1 if nulls is None else nulls
    report = {**rewritten_json(done), "layers": done_to, "added": added}
    console.show(as_json, report, lambda: extended_report(done, done_to, nulls))
