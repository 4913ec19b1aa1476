"""``upcycle init``: from a goal to a recipe."""

import sys
from pathlib import Path
from typing import Any

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused, size_in_bytes

GOALS = {
    "train": "more capacity from the same start, which you will train",
    "faster": "a part of the work for each token",
    "smaller": "fewer bytes, with 8-bit weights in an ONNX file",
    "merge": "several models of one shape in one",
}


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else size_in_bytes(ctx, param, value)


@click.command()
@click.argument("model")
@click.option("--goal", type=click.Choice(list(GOALS)), help="What the result is for.")
@options.runtimes_only
@click.option(
    "--memory", metavar="SIZE", callback=_size, help="What the weights of the result may take."
)
@click.option(
    *("--source", "sources"),
    multiple=True,
    metavar="MODEL",
    help="merge: another model, or a PEFT adapter of MODEL; repeat it.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("recipe.yaml"),
    help="The file for the recipe.",
)
@click.option("--choose", metavar="RECIPE", help="Which proposal.  [default: the first]")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@options.inputs
@options.as_json
@options.trust
@options.log
def init(
    model: str,
    goal: str | None,
    runtimes: tuple[str, ...],
    memory: int | None,
    sources: tuple[str, ...],
    out: Path,
    choose: str | None,
    overwrite: bool,
    inputs: str | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Propose recipes for MODEL and a goal, and write the chosen one.

    Without --goal it asks, where somebody can answer.
    """
    with collector_paused():
        from upcycle.cli.proposals import propose
        from upcycle.cli.tables_of_proposals import heading, next_command, proposals_report
        from upcycle.errors import UsageError
        from upcycle.models.named import open_model
        from upcycle.recipe.rewrite import with_values
        from upcycle.recipe.shipped import recipe_text
        from upcycle.util.text_file import write_text

    if out.exists() and not overwrite:
        raise UsageError(f"{out}: it exists; give another --out, or --overwrite")
    asks = goal is None
    if goal is None:
        goal = _asked()
    with console.progress() as progress:
        source = open_model(
            model, inputs=inputs, trust_remote_code=trust_remote_code, progress=progress
        )
    chosen: Any = goal
    found, refused = propose(source, chosen, runtimes=runtimes, memory=memory, sources=sources)
    if not found:
        raise UsageError(
            f"{model}: no recipe for --goal {goal} fits: "
            + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        )
    if asks and not as_json:
        console.print_result(*proposals_report(found, refused))
        names = click.Choice([proposal.recipe for proposal in found])
        choose = choose or click.prompt("Which one", default=found[0].recipe, type=names, err=True)
    picked = next((p for p in found if p.recipe == (choose or found[0].recipe)), None)
    if picked is None:
        listed = ", ".join(proposal.recipe for proposal in found)
        raise UsageError(f"--choose {choose}: not proposed here; choose from {listed}")
    text = with_values(recipe_text(picked.recipe), picked.overrides)
    write_text(out, "\n".join([*heading(model, goal, picked), text]))
    then = next_command(model, out, picked)
    if as_json:
        plain = [vars(p) | {"costs": p.costs.to_json()} for p in found]
        data = {"proposals": plain, "refused": refused, "recipe": str(out), "next": then}
        console.print_json(data)
        return
    if not asks:
        console.print_result(*proposals_report(found, refused))
    console.print_result("", f"{picked.recipe} is written to {out}; next:", f"  {then}")


def _can_answer() -> bool:
    return sys.stdin.isatty()


def _asked() -> str:
    if not _can_answer():
        raise click.UsageError("--goal is missing, and nobody can be asked for it here")
    for name, meaning in GOALS.items():
        click.echo(f"  {name}: {meaning}", err=True)
    answer: str = click.prompt("What is the result for", type=click.Choice(list(GOALS)), err=True)
    return answer
