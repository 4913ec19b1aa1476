"""``upcycle convert``."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused, size_in_bytes
from upcycle.cli.sections import SectionedCommand

# Of `upcycle.conversion.passes`, which takes seconds to import; a test compares the two.
PASS_NAMES = ("capture", "locate", "plan", "transform", "rewrite", "lower", "verify")


_SECTIONS = {
    "The recipe": ("recipe", "overrides", "calibration", "text_field", "seed"),
    "The model": ("inputs", "device", "dtype", "trust_remote_code", "allow_pickle"),
    "The result": (
        *("out", "targets", "runtimes", "architecture", "onnx_profile", "pt2_form"),
        *("max_shard_size", "overwrite"),
    ),
    "The run": (
        *("verify", "stream", "resume", "fresh", "jobs", "executor", "print_after", "stop_after"),
    ),
}


@click.command(cls=SectionedCommand, sections=_SECTIONS)
@click.argument("model")
@options.recipe
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory for the result."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(["safetensors", "onnx", "pt2"]),
    help="What to write; may be repeated.  [default: safetensors and onnx; of a .pt2 file "
    "safetensors and pt2]",
)
@options.pt2_form
@click.option(
    "--calibration",
    multiple=True,
    metavar="PATH",
    help="Data for recipes that need it: text, .jsonl, images, tensors. Several are domains.",
)
@options.text_field
@options.runtimes
@options.inputs
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, auto.  [default: cpu]")
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="Load the weights as float32, bfloat16, float16, float64 (or fp32, bf16, fp16, half)."
    "  [default: the checkpoint's]",
)
@click.option(
    "--onnx-profile",
    type=click.Choice(["cpu", "cuda", "portable"]),
    help="Where the ONNX file will run; as --set onnx.profile.  [default: recipe]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of every draw.  [default: recipe]")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    callback=size_in_bytes,
    default="5GB",
    help="Largest size of a weight file.",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option(
    "--verify/--no-verify", default=True, show_default=False, help="Compare with the dense model."
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Convert piece by piece, for models larger than memory.  [default: if it must be]",
)
@click.option("--resume", is_flag=True, help="Go on with a streamed run that was interrupted.")
@click.option("--fresh", is_flag=True, help="Remove what an interrupted run left.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Layers made at a time, where no data is needed.  [default: cores, or what memory holds]",
)
@click.option(
    "--executor",
    type=click.Choice(["threads", "ray"]),
    default="threads",
    help="Make layers here, or on the Ray cluster of RAY_ADDRESS.",
)
@click.option(
    "--print-after",
    multiple=True,
    type=click.Choice(PASS_NAMES),
    help="Print what a pass made; may be repeated. `upcycle passes` tells of them.",
)
@click.option(
    "--stop-after", type=click.Choice(PASS_NAMES), help="End after a pass, and write nothing."
)
@options.as_json
@options.trust
@options.pickle
@options.log
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
    onnx_profile: str | None,
    seed: int | None,
    jobs: int | None,
    executor: str,
    print_after: tuple[str, ...],
    stop_after: str | None,
    as_json: bool,
    **others: Any,
) -> None:
    """Convert MODEL, verify the result and write it.

    `upcycle plan` shows what would be done, without weights; `upcycle init` proposes a recipe.

    \b
    Example: upcycle convert sample:minilm --recipe sparse-upcycling --out minilm-moe

    \b
    Exit codes: 0 done, 2 usage or recipe, 3 verification failed, 4 unsupported,
    5 disk or memory too small, 130 interrupted, 1 a bug in upcycle.
    """
    with collector_paused():
        from upcycle.cli import tables_of_reports as report
        from upcycle.cli.tables_of_passes import shown_after
        from upcycle.conversion.open import usual_targets
        from upcycle.conversion.options import Options
        from upcycle.conversion.passes import StoppedError, Watch
        from upcycle.conversion.pipeline import convert_model
        from upcycle.conversion.workers import Workers
        from upcycle.models.named import open_model
        from upcycle.recipe import reader as recipe_file

    if as_json and print_after:
        raise click.UsageError("--print-after prints tables; leave --json out")
    if onnx_profile is not None:
        overrides = (*overrides, f"onnx.profile={onnx_profile}")
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    done = None
    loaded = recipe_file.load_recipe(recipe, overrides)
    watch = Watch(shown_after(print_after), stop_after)
    with console.progress() as progress, suppress(StoppedError):
        source = open_model(
            model,
            inputs=inputs,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            dtype=dtype,
            device=device,
            progress=progress,
        )
        done = convert_model(
            source,
            loaded,
            recipe_name=Path(recipe).name,
            out=out,
            options=Options(
                targets=tuple(dict.fromkeys(targets)) or usual_targets(source),
                workers=Workers(executor, jobs),
                watch=watch,
                **others,
            ),
            progress=progress,
        )
    if done is None:
        said = f"stopped after {stop_after}; nothing was written"
        console.show(as_json, {"stopped_after": stop_after}, lambda: [said])
        return
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(out)): path.stat().st_size for path in files}
    data = {"out": str(out), "files": sizes, "report": done.to_json()}
    console.show(as_json, data, lambda: report.conversion_report(done, str(out), sizes))
