"""``upcycle recipes``, ``upcycle schema`` and ``upcycle samples``: what comes with upcycle."""

import click

from upcycle.cli import console
from upcycle.cli.commands import options


@click.command()
@click.argument("name", required=False)
@options.log
def recipes(name: str | None) -> None:
    """List the shipped recipes, or print the recipe NAME."""
    from upcycle.recipe import shipped

    if name is not None:
        click.echo(shipped.recipe_text(name), nl=False)
        return
    from upcycle.cli.recipe_facts import recipe_facts
    from upcycle.recipe.reader import load_recipe

    for about in map(shipped.describe, shipped.recipe_names()):
        click.echo(f"{about.name}\n  {about.title}")
        click.echo(f"  {about.authors}, {about.paper}, {about.year}, {about.url}")
        click.echo(f"  {recipe_facts(load_recipe(about.name))}")


@click.command()
@click.option("--report", "is_report", is_flag=True, help="That of report.json instead.")
@options.log
def schema(is_report: bool) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from upcycle.ir.report import report_schema
    from upcycle.recipe.reader import recipe_schema

    console.print_json(report_schema() if is_report else recipe_schema())


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
