"""``upcycle esft``: the experts that a task needs, in a file to be trained."""

from pathlib import Path

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@options.data
@options.text_field
@click.option(
    "--p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.2,
    help="Share of the score of a layer that its chosen experts have.",
)
@click.option(
    "--by",
    type=click.Choice(["tokens", "gate"]),
    default="tokens",
    help="The score: visits, or the weights of them.",
)
@click.option(
    "--like",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Take the experts that are in this adapter, as after training DIRECTORY.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The adapter."
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@options.as_json
@options.trust
@options.pickle
@options.log
def esft(
    directory: Path,
    data: tuple[str, ...],
    text_field: str,
    p: float,
    by: str,
    like: Path | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Choose the experts of DIRECTORY that some data need, and write them as an adapter.

    Train its parameters alone; `upcycle generate --adapter FILE` and `upcycle.adapters` run it.

    \b
    Example: upcycle esft smollm2-moe --data law.txt --p 0.2 --out law.safetensors
    """
    with collector_paused():
        from upcycle.cli.mixture import check_mixture
        from upcycle.cli.new_file import check_new_file
        from upcycle.cli.tables_of_operations import adapter_report
        from upcycle.data.calibration_files import read_calibration
        from upcycle.operations.esft import choose
        from upcycle.operations.expert_adapter import ExpertAdapter
        from upcycle.operations.trace_data import traced
        from upcycle.targets.load import load

    check_new_file(out, overwrite=overwrite)
    check_mixture(directory)
    given = read_calibration(data, field=text_field, allow_pickle=allow_pickle) if data else None
    wanted = None if like is None else ExpertAdapter.load(like)
    model = load(directory, trust_remote_code=trust_remote_code)
    shares: dict[str, float] = {}
    if wanted is not None:
        wanted.layers_in(model)
        experts = wanted.experts
    else:
        with console.progress() as progress:
            trace = traced(
                model,
                given,
                directory=directory,
                trust_remote_code=trust_remote_code,
                done=lambda at, of: progress("tracing", at, of),
            )
        chosen = choose(trace, p, by="gate" if by == "gate" else "tokens")
        experts = {one.path: one.experts for one in chosen}
        shares = {one.path: one.share for one in chosen}
    made = ExpertAdapter.taken(model, experts)
    made.save(out)
    held = sum(rows.numel() for rows in made.parameters())
    of = sum(rows.numel() for rows in model.parameters())
    report = {
        "out": str(out),
        "experts": {path: list(numbers) for path, numbers in made.experts.items()},
        "shares": shares,
        "parameters": held,
        "of_the_model": held / of,
    }
    console.show(as_json, report, lambda: adapter_report(made, shares, held / of, out))
