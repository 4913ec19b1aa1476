"""The pipeline: open, capture, locate, plan, make, write, verify, describe."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle.conversion.dense_model import DenseModel, header
from upcycle.conversion.make import Made, making
from upcycle.conversion.open import open_dense
from upcycle.conversion.options import DEFAULTS, Options, check_options
from upcycle.ir.report import Report
from upcycle.models.companions import TOKENIZERS
from upcycle.models.dense import Source
from upcycle.models.onnx_file import OnnxSource
from upcycle.page.page import page_file, read_contents, write_page
from upcycle.recipe.schema import Recipe
from upcycle.targets.card import card
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.description import describe
from upcycle.targets.files.staging import check_output
from upcycle.targets.load import check_opens
from upcycle.targets.onnx.file_names import ENCODER
from upcycle.util.progress import Progress, silent, step
from upcycle.verification.checks import raise_if_failed

SCRATCH = "upcycle-layers"  # in a directory that is being written
Verify = Callable[[Report, Path, Made, Any, Progress], Report]


def convert_model(
    source: Source | OnnxSource,
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    options: Options = DEFAULTS,
    progress: Progress = silent,
) -> Report:
    """Convert a named model into the directory `out`; its report is also written there.

    Everything that can be refused is refused before the weights are read. A failure leaves `out` as
    it was; the finished files of a streamed run stay beside it, for `options.resume`.

    Raises:
        UpcycleError: `upcycle.errors` says which.
    """
    check_options(options)
    check_output(out, overwrite=options.overwrite, protect=source.paths)
    dense = open_dense(source, recipe, recipe_name, out, options, progress)
    with dense.output(out) as directory:
        scratch = directory / SCRATCH
        with making(dense, scratch, options.workers, progress) as made:
            options.watch("transform", made)
            written = dense.write(directory, scratch, made, progress)
        options.watch("lower", directory)
        report = replace(header(made.plan, dense.facts), calibration=made.calibration)
        verify, name = dense.verify if options.verify else None, out.absolute().name
        report = finish(dense, made, written, report, directory, name, verify, progress)
        options.watch("verify", report)
        return report


def finish(
    dense: DenseModel[Any],
    made: Made,
    written: Any,
    report: Report,
    directory: Path,
    name: str,
    verify: Verify | None,
    progress: Progress,
) -> Report:
    """Verify what was written into `directory` and describe it there; the finished report.

    Args:
        written: what `dense.write` returned.
        report: what is known so far.
        name: of the result, for its card.
        verify: measures the files; None leaves that out.

    Raises:
        VerificationError: a check did not pass.
        UsageError: nothing can open the files.
    """
    checkpoint = written if isinstance(written, Checkpoint) else None
    if checkpoint is not None:
        report = replace(report, checkpoint=checkpoint.facts())
    if verify is None or report.streamed:  # else it is loaded to be compared
        with step(progress, "opening again"):
            check_opens(directory)
    if verify is not None:
        report = verify(report, directory, made, written, progress)
        raise_if_failed(report)
    shutil.rmtree(directory / SCRATCH, ignore_errors=True)
    targets = ["onnx"] if checkpoint is None else dense.options.targets
    is_pair = checkpoint is not None and (directory / ENCODER).is_file()
    text = card(
        name,
        made.plan,
        report,
        targets,
        checkpoint,
        is_pair=is_pair,
        has_tokenizer=any((directory / file).is_file() for file in TOKENIZERS),
    )
    describe(directory, made.plan, made.provenance, report, text)
    write_page(read_contents(directory), page_file(directory))
    return report
