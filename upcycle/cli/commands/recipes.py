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
    from upcycle.cli.recipe_facts import shipped_facts

    for about in map(shipped.describe, shipped.recipe_names()):
        click.echo(f"{about.name}\n  {about.title}")
        click.echo(f"  {about.authors}, {about.paper}, {about.year}, {about.url}")
        click.echo(f"  {shipped_facts(about.name)}")


@click.command()
@options.log
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from upcycle.recipe import reader as recipe_file

    console.print_json(recipe_file.recipe_schema())
