"""Open a file of `torch.export`."""

from pathlib import Path

import torch
from torch.export import ExportedProgram

from upcycle.errors import UsageError, is_out_of_memory, one_line
from upcycle.models.program_rules import check_program
from upcycle.util.quiet import quiet_logs


def is_program(name: str) -> bool:
    """Whether a model of this name is a file of `torch.export`."""
    return name.endswith(".pt2") and not Path(name).is_dir()


def open_program(path: Path, *, allow_pickle: bool = False, trust: bool = False) -> ExportedProgram:
    """The program in a file; nothing in it runs, see `upcycle.models.program_rules`.

    Raises:
        UsageError: there is none, it is damaged, or it has something in it that could run.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    check_program(path, allow_pickle=allow_pickle, trust=trust)
    try:
        with quiet_logs("torch.export", "torch._export"):
            return torch.export.load(path)
    except Exception as error:  # a damaged file makes torch fail in any way
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"{path}: torch {torch.__version__} cannot read this program: {one_line(error)}; "
            "write it again with this version of torch"
        ) from error
