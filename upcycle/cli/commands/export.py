"""``upcycle export``."""

from pathlib import Path
from typing import cast

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory for the result."
)
@click.option(
    "--target",
    type=click.Choice(["onnx", "native", "gguf", "pt2"]),
    default="onnx",
    help="An ONNX file; a checkpoint in an MoE architecture of transformers; a file for llama.cpp; "
    "a program of torch.export.",
)
@click.option(
    "--pt2-form",
    type=click.Choice(["portable", "fused"]),
    help="Layers of --target pt2: operations of torch alone, or one node that upcycle runs.",
)
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="The type of the weights of --target gguf; that of the model if not given.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key of the section `onnx` of a recipe, as onnx.form=quantised.",
)
@click.option(
    "--dense", metavar="MODEL", help="The dense model, if DIRECTORY holds no transformers model."
)
@options.runtimes
@options.inputs
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option(
    "--verify/--no-verify", default=True, show_default=False, help="Compare with the model."
)
@options.as_json
@options.trust
@options.log
def export(
    directory: Path,
    out: Path,
    target: str,
    gguf_type: str | None,
    pt2_form: str | None,
    overrides: tuple[str, ...],
    runtimes: tuple[str, ...],
    architecture: str | None,
    dense: str | None,
    inputs: str | None,
    overwrite: bool,
    verify: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Write the mixture of experts in DIRECTORY, trained or not, in another format."""
    with collector_paused():
        from upcycle.cli.tables_of_reports import export_report
        from upcycle.conversion.export import ExportTarget
        from upcycle.conversion.export import export as write
        from upcycle.errors import UsageError
        from upcycle.ir.report import plain
        from upcycle.models.dense import Source
        from upcycle.models.named import open_model
        from upcycle.recipe.reader import onnx_options
        from upcycle.targets.gguf.write import GgufType
        from upcycle.targets.traced.experts import Form
        from upcycle.util.named_callable import inputs_named

    model = None
    if dense is not None:
        source = open_model(dense)
        if not isinstance(source, Source):
            raise UsageError(f"{dense}: it is an ONNX file, and a model of torch is needed")
        model = source.load()
    with console.progress() as progress:
        done = write(
            directory,
            out,
            target=cast(ExportTarget, target),
            model=model,
            example_inputs=inputs_named(inputs),
            onnx=onnx_options(overrides),
            architecture=architecture,
            gguf_type=cast(GgufType | None, gguf_type),
            pt2_form=cast(Form | None, pt2_form),
            runtimes=runtimes,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            verify=verify,
            progress=progress,
        )
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(out)): path.stat().st_size for path in files}
    data = {"out": str(out), "files": sizes, **plain(done)}
    console.show(as_json, data, lambda: export_report(done, str(out), sizes))
