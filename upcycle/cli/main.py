"""The command line: ``upcycle convert MODEL --recipe NAME --out DIR``, and what belongs to it."""

import atexit
import gc

import click

from upcycle.cli.commands import (
    bench,
    convert,
    env,
    esft,
    export,
    extend,
    generate,
    graph,
    init,
    merge,
    operate,
    options,
    passes,
    plan,
    recipes,
    report,
    trace,
    verify,
)
from upcycle.cli.group import CommandGroup
from upcycle.version import __version__

# The collection at the end of Python takes a second with transformers, and saves nothing.
atexit.register(gc.freeze)


@click.group("upcycle", cls=CommandGroup, context_settings={"show_default": True})
@click.version_option(__version__, message="upcycle %(version)s")
@options.log
def main() -> None:
    """Turn dense networks into sparse Mixtures of Experts.

    MODEL is a Hugging Face directory, a model of the hub (org/name, org/name@revision), a .gguf,
    .onnx or .pt2 file, the directory of a PEFT adapter, sample:NAME (see `upcycle samples`) or a
    Python function that returns an nn.Module, as package.module:callable.
    """


for command in (
    init.init,
    convert.convert,
    plan.plan,
    plan.inspect,
    graph.graph,
    verify.diff,
    verify.verify,
    bench.bench,
    export.export,
    trace.trace,
    generate.generate,
    generate.steer,
    operate.prune,
    operate.place,
    extend.extend,
    merge.merge,
    esft.esft,
    operate.quantise,
    report.report,
    recipes.recipes,
    recipes.schema,
    recipes.samples,
    passes.passes,
    env.env,
):
    main.add_command(command)
