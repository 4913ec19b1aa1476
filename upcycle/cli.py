"""The command line: ``upcycle convert MODEL --recipe NAME --out DIR``, and what belongs to it.

The commands are thin: they read a recipe, call `upcycle.driver` and print a report. They import
what needs torch themselves, so that ``--help`` answers at once.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from upcycle import console
from upcycle.program import Program, collector_paused, size_in_bytes
from upcycle.version import __version__

Command = TypeVar("Command", bound=Callable[..., Any])


def _level(ctx: click.Context, param: click.Parameter, chosen: bool) -> None:
    if chosen:
        console.start_log(logging.DEBUG if param.name == "verbose" else logging.ERROR)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator out of several, applied in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_log = _options(
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_level, help="Say more."
    ),
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_level, help="Only errors."
    ),
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_trust = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that the model directory contains."
)
_inputs = click.option(
    "--inputs",
    metavar="MODULE:CALLABLE",
    help="A function that returns example inputs, for a model whose inputs cannot be guessed.",
)
_recipe = _options(
    click.option(
        "--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe or a YAML file."
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of it."
    ),
)


@click.group("upcycle", cls=Program)
@click.version_option(__version__, message="upcycle %(version)s")
@_log
def main() -> None:
    """Turn dense networks into sparse Mixtures of Experts.

    MODEL is a Hugging Face directory, an .onnx file, sample:NAME (see `upcycle samples`) or a
    Python function that returns an nn.Module, as package.module:callable.
    """


@main.command()
@click.argument("model")
@_recipe
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory for the result."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(["safetensors", "onnx"]),
    default=["safetensors", "onnx"],
    show_default=True,
    help="What to write; may be repeated.",
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="PATH",
    help="Data for recipes that need it: text, .jsonl, images, tensors. Several are domains.",
)
@click.option(
    "--text-field",
    default="text",
    show_default=True,
    metavar="NAME",
    help="Field of a .jsonl record, or column of a data set, with the text.",
)
@_inputs
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, auto.  [default: cpu]")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="Load the weights in this dtype.  [default: the checkpoint's]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of every draw.  [default: recipe]")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    callback=size_in_bytes,
    default="5GB",
    show_default=True,
    help="Largest size of a weight file.",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--verify/--no-verify", default=True, help="Compare with the dense model.")
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Convert piece by piece, for models larger than memory.  [default: if it must be]",
)
@click.option("--resume", is_flag=True, help="Go on with a streamed run that was interrupted.")
@_trust
@click.option(
    "--allow-pickle", is_flag=True, help="Read weights from .bin files, which can run code."
)
@_log
def convert(
    model: str,
    recipe: str,
    overrides: tuple[str, ...],
    out: Path,
    targets: tuple[str, ...],
    inputs: str | None,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    seed: int | None,
    **options: Any,
) -> None:
    """Convert MODEL, verify the result and write it."""
    from upcycle import driver, recipe_file, report
    from upcycle.source import open_model

    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    loaded = recipe_file.load_recipe(recipe, overrides)
    source = open_model(
        model,
        inputs=inputs,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        dtype=dtype,
        device=device,
    )
    with console.progress() as progress:
        done = driver.convert_model(
            source,
            loaded,
            recipe_name=Path(recipe).name,
            out=out,
            targets=list(dict.fromkeys(targets)),
            progress=progress,
            **options,
        )
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(out)): path.stat().st_size for path in files}
    console.print_result(*report.conversion_report(done, str(out), sizes))


@main.command()
@click.argument("model")
@_recipe
@_inputs
@_json
@_trust
@_log
def plan(
    model: str,
    recipe: str,
    overrides: tuple[str, ...],
    inputs: str | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Show what a recipe would do to MODEL, and what it costs."""
    with collector_paused():
        from upcycle import preview, recipe_file, report
        from upcycle.source import open_model

        loaded = recipe_file.load_recipe(recipe, overrides)
        source = open_model(model, inputs=inputs, trust_remote_code=trust_remote_code)
        planned, estimate = preview.plan_model(source, loaded, Path(recipe).name)
    if as_json:
        console.print_json(report.plan_json(planned, estimate))
    else:
        console.print_result(*report.plan_report(planned, estimate))


@main.command()
@click.argument("model")
@_inputs
@_json
@_trust
@_log
def inspect(model: str, inputs: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """List the dense FFNs of MODEL, and what only looks like one."""
    with collector_paused():
        from upcycle import preview, report
        from upcycle.source import open_model

        source = open_model(model, inputs=inputs, trust_remote_code=trust_remote_code)
        located = preview.inspect_model(source)
    if as_json:
        console.print_json(report.located_json(located))
    else:
        console.print_result(*report.located_report(located))


@main.command()
@click.argument("dense")
@click.argument("converted", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_inputs
@_json
@_trust
@_log
def verify(
    dense: str, converted: Path, inputs: str | None, as_json: bool, trust_remote_code: bool
) -> None:
    """Compare CONVERTED with the DENSE model that it was made from."""
    from upcycle import driver, report
    from upcycle.source import open_model
    from upcycle.verification import raise_if_failed

    source = open_model(dense, inputs=inputs, trust_remote_code=trust_remote_code)
    checked = driver.verify_paths(source, converted)
    if as_json:
        console.print_json(checked)
    else:
        console.print_result(*report.verification_report(checked))
    raise_if_failed(checked)


@main.command()
@click.argument("name", required=False)
@_log
def recipes(name: str | None) -> None:
    """List the shipped recipes, or print the recipe NAME."""
    from upcycle import shipped

    if name is not None:
        click.echo(shipped.recipe_text(name), nl=False)
        return
    from upcycle.recipe_facts import shipped_facts

    for about in map(shipped.describe, shipped.recipe_names()):
        click.echo(f"{about.name}\n  {about.title}")
        click.echo(f"  {about.authors}, {about.paper}, {about.year}, {about.url}")
        click.echo(f"  {shipped_facts(about.name)}")


@main.command()
@_log
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from upcycle import recipe_file

    console.print_json(recipe_file.recipe_schema())


@main.group(invoke_without_command=True)
@_log
@click.pass_context
def samples(ctx: click.Context) -> None:
    """List the small real models that can be tried at once."""
    from upcycle.sample_store import find
    from upcycle.samples import PREFIX, SAMPLES

    if ctx.invoked_subcommand is not None:
        return
    for name, sample in SAMPLES.items():
        megabytes = f"{sample.package.megabytes:.0f} MB to download"
        state = "ready" if find(sample.package) else megabytes
        click.echo(f"{PREFIX}{name}  ({state})\n  {sample.kind}")
        click.echo(f"  {sample.source}, {sample.licence}")


@samples.command("add")
@click.argument("name")
@_log
def add_sample(name: str) -> None:
    """Download the sample NAME."""
    from upcycle.samples import add

    click.echo(add(name))
