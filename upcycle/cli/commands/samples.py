"""``upcycle samples``."""

import click

from upcycle.cli.commands import options


@click.group(invoke_without_command=True)
@options.log
@click.pass_context
def samples(ctx: click.Context) -> None:
    """List the small real models that can be tried at once."""
    from upcycle.models.sample_store import find
    from upcycle.models.samples import PREFIX, SAMPLES

    if ctx.invoked_subcommand is not None:
        return
    for name, sample in SAMPLES.items():
        megabytes = f"{sample.package.megabytes:.0f} MB to download"
        state = "ready" if find(sample.package) else megabytes
        click.echo(f"{PREFIX}{name}  ({state})\n  {sample.kind}")
        click.echo(f"  {sample.source}, {sample.licence}")


@samples.command("add")
@click.argument("name")
@options.log
def add_sample(name: str) -> None:
    """Download the sample NAME."""
    from upcycle.models.samples import path

    click.echo(path(name, in_cache=True))
