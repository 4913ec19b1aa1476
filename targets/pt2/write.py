"""Write the programs of a converted model beside its checkpoint."""

from pathlib import Path

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UnsupportedError
from upcycle.targets.pt2.export import programs
from upcycle.targets.traced.experts import Form
from upcycle.util.quiet import quiet_logs

SUFFIX = ".pt2"


def write_programs(
    directory: Path,
    model: nn.Module,
    example: ExampleInputs,
    form: Form = "portable",
    *,
    cache: bool = True,
) -> list[Path]:
    """Write ``model.pt2``, or the files of a model that generates text; returns them.

    Args:
        directory: exists.
        model, example, form, cache: as for `upcycle.targets.pt2.export.programs`.

    Raises:
        UnsupportedError: torch cannot export the model.
    """
    written = []
    try:
        for stem, program in programs(model, example, form, cache=cache):
            path = directory / f"{stem}{SUFFIX}"
            with quiet_logs("torch.export", "torch._export"):
                torch.export.save(program, path)
            written.append(path)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"`targets=pt2`: {error}; `targets=safetensors` alone writes the checkpoint"
        ) from error
    return written
