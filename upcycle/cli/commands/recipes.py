"""``upcycle recipes`` and ``upcycle schema``."""

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
