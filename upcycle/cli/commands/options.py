"""Options that several commands have."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from upcycle.cli import console

Command = TypeVar("Command", bound=Callable[..., Any])


def _level(ctx: click.Context, param: click.Parameter, chosen: bool) -> None:
    if chosen:
        console.start_log(logging.DEBUG if param.name == "verbose" else logging.ERROR)


def options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator out of several, applied in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


log = options(
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_level, help="Say more."
    ),
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_level, help="Only errors."
    ),
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
trust = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that the model directory contains."
)
pickle = click.option(
    "--allow-pickle", is_flag=True, help="Read weights from .bin files, which can run code."
)
inputs = click.option(
    "--inputs",
    metavar="MODULE:CALLABLE",
    help="A function that returns example inputs, for a model whose inputs cannot be guessed.",
)

data = click.option(
    "--data",
    "--text",
    "data",
    multiple=True,
    metavar="PATH",
    help="Text, .jsonl, images, tensors; several texts are classes, named by their files.  "
    "[default: built-in text, the documentation of Python]",
)
out = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory for the result."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
text_field = click.option(
    "--text-field",
    default="text",
    metavar="NAME",
    help="Field of a .jsonl record, or column of a data set, with the text.",
)
pt2_form = click.option(
    "--pt2-form",
    type=click.Choice(["portable", "fused"]),
    default="portable",
    help="Layers in a program: operations of torch alone, or one node that upcycle runs.",
)


def _recipe(ctx: click.Context, param: click.Parameter, name: str | None) -> str:
    if name is None:
        raise click.UsageError(
            "--recipe is missing; `upcycle recipes` lists them, and `upcycle init MODEL` proposes "
            "one for a goal",
            ctx,
        )
    return name


recipe = options(
    click.option(
        "--recipe",
        callback=_recipe,
        metavar="NAME|FILE",
        help="A shipped recipe or a YAML file; it must be given.",
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of it."
    ),
)
runtimes_only = click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(
        ["transformers", "vllm", "sglang", "llama.cpp", "onnxruntime"], case_sensitive=False
    ),
    help="Software that has to run the result; may be repeated.",
)
runtimes = options(
    runtimes_only,
    click.option(
        "--architecture",
        metavar="NAME",
        help="Write this MoE architecture of transformers.  [default: the first that fits]",
    ),
)
