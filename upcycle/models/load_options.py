"""How a person names the dtype and the device to load a model with."""

import re

import torch

from upcycle.errors import UsageError, one_line

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
          "float16": torch.float16}  # fmt: skip
SHORT = {"fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32",
         "bf16": "bfloat16", "fp16": "float16", "half": "float16"}  # fmt: skip


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of ``bfloat16`` or ``bf16``; None for None.

    Raises:
        UsageError: it is no such name.
    """
    if name is None:
        return None
    found = DTYPES.get(SHORT.get(name.lower(), name.lower()))
    if found is None:
        raise UsageError(
            f"`dtype={name}`: unknown; choose one of {', '.join(DTYPES)} "
            "(or fp64, fp32, bf16, fp16, half)"
        )
    return found


def device_named(name: str | None) -> str:
    """The device of ``cpu``, ``cuda:1``, ``gpu`` or ``auto``; the CPU for None.

    Raises:
        UsageError: there is no such device.
    """
    if name in (None, "cpu"):
        return "cpu"
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = re.sub("^gpu", "cuda", name or "")
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise UsageError(f"`device={name}`: unknown; choose cpu, cuda or gpu, cuda:1, mps or auto")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"`device={name}`: {one_line(error)}") from error
    return device
