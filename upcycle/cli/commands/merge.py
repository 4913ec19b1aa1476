"""``upcycle merge``: a mixture of experts as a dense model."""

from pathlib import Path
from typing import Any, cast

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--by",
    type=click.Choice(["exact", "mean", "use"]),
    default="exact",
    help="Refuse experts that differ, or take their mean, or count each by its weights.",
)
@options.data
@options.text_field
@options.out
@options.overwrite
@options.as_json
@options.trust
@options.pickle
@options.log
def merge(
    directory: Path,
    by: str,
    data: tuple[str, ...],
    text_field: str,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Write the mixture of experts in DIRECTORY as a dense model.

    A split gives the dense model back, trained or not: all experts at weight one. Copies that are
    still the same give it back, too; those that were trained have a mean, which is approximate.

    \b
    Example: upcycle merge minilm-emoe --out minilm-dense
    """
    with collector_paused():
        from upcycle.cli.mixture import check_mixture
        from upcycle.cli.tables_of_operations import merged_report, rewritten_json
        from upcycle.data.calibration_files import read_calibration
        from upcycle.data.verification_inputs import evaluation_for
        from upcycle.operations.merge import By, Merged
        from upcycle.operations.merge import merge as merged
        from upcycle.operations.rewritten import rewrite
        from upcycle.operations.trace_data import traced
        from upcycle.targets.provenance_file import provenance_in

    check_mixture(directory)
    given = read_calibration(data, field=text_field, allow_pickle=allow_pickle) if data else None
    found: list[Merged] = []

    def change(model: Any) -> Any:
        where: dict[str, Any] = {"directory": directory, "trust_remote_code": trust_remote_code}
        inputs = evaluation_for(model, **where).batches
        tokens = 16384 if by == "use" else 2048  # enough for the sum of the weights of a token
        visits = traced(model, given, tokens=tokens, **where)
        provenance = provenance_in(directory)
        found.append(merged(model, inputs, visits, by=cast(By, by), provenance=provenance))
        return found[0].model

    with console.progress() as progress:
        done = rewrite(
            directory,
            out,
            change,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    how = {"kind": found[0].kind, "off": found[0].off}
    console.show(as_json, {**rewritten_json(done), **how}, lambda: merged_report(found[0], done))
