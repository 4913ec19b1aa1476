"""Rounded matrices in the files of a checkpoint, in the form ``pack-quantized``.

That is a form of the package compressed-tensors, which transformers and vLLM load: the numbers of a
row in words of 32 bits, the scales of its groups, and the shape. A linear map has the group size
that ``config.json`` gives its name. transformers makes floats of experts as it loads them, with one
group size for all of a model, and of other linear maps in the first forward.

Shape suffixes: N rows, K inputs of a row, W words of a row.
"""

import importlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UsageError, one_line
from upcycle.ir.quantise import Quantised
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.targets.files.tensor_file import TensorEntry, write_tensors
from upcycle.util.json_text import read_json

WORD = torch.int32
EXPERTS = r"re:.*\.experts(\.\d+\..*)?$"  # transformers wants the word in it


@dataclass(frozen=True)
class Packed:
    """A rounded matrix of a checkpoint.

    Attributes:
        shape: N and K.
        quantised: a stack of this matrix alone.
        module: the linear map in the model whose weight it is; None for a matrix of an expert.
    """

    shape: tuple[int, int]
    quantised: Quantised
    module: str | None


def check_reader() -> None:
    """Raise UsageError if the package by which such files are loaded cannot be imported."""
    try:
        importlib.import_module("compressed_tensors")
    except ImportError as error:
        raise UsageError(
            "quantised weights are loaded by compressed-tensors, which cannot be imported "
            f"({one_line(error)}); `pip install compressed-tensors`"
        ) from error


def tensors_of(matrix: Packed) -> dict[str, torch.Tensor]:
    """What the files have of a matrix, by what follows ``weight_``."""
    found = matrix.quantised
    scale = found.scale[0] if found.block else found.scale[0][:, None]
    return {"packed": words(found.packed[0]), "scale": scale, "shape": torch.tensor(matrix.shape)}


def words(packed_NP: torch.Tensor) -> torch.Tensor:
    """Bytes [N, P] in words [N, W], the first of four in the low one, with zeros at the end."""
    padded = torch.nn.functional.pad(packed_NP, (0, -packed_NP.shape[1] % WORD.itemsize))
    return padded.contiguous().view(WORD)


def write_packed(directory: Path, matrices: Mapping[str, Packed], kept: Sequence[str]) -> None:
    """Write `matrices` in the place of the tensors of these names, and say so in ``config.json``.

    Args:
        directory: of a model as transformers saved it, whose files are replaced.
        matrices: by the name of the float tensor in the files, which ends with ``.weight``. All
            have the same bits, and all experts the same group size.
        kept: the linear maps of the model that stay as they are.
    """
    tensors = read_tensors(directory)
    made = directory / "packed"
    made.mkdir()
    write_tensors(made, _entries(tensors, matrices))
    for pattern in ("model*.safetensors", "model.safetensors.index.json"):
        for path in directory.glob(pattern):
            path.unlink()
    for path in made.iterdir():
        path.rename(directory / path.name)
    shutil.rmtree(made)
    path = directory / "config.json"
    config = {**read_json(path), "quantization_config": quantization_config(matrices, kept)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entries(
    tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, Packed]
) -> Iterator[TensorEntry]:
    for name in tensors:
        parts = {name: tensors[name]}
        if name in matrices:
            stem = name.removesuffix("weight")
            found = tensors_of(matrices[name]).items()
            parts = {f"{stem}weight_{part}": tensor for part, tensor in found}
        for part, tensor in parts.items():
            yield _entry(part, tensor)


def _entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def quantization_config(matrices: Mapping[str, Packed], kept: Sequence[str]) -> dict[str, Any]:
    """The section of that name in ``config.json``."""
    groups: dict[tuple[bool, int, int | None], dict[str, None]] = {}
    for matrix in matrices.values():
        key = (matrix.module is None, matrix.quantised.bits, matrix.quantised.block)
        groups.setdefault(key, {})[matrix.module or EXPERTS] = None
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": list(targets),
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if block else "channel",
                    "group_size": block,
                    "dynamic": False,
                },
            }
            for number, ((_, bits, block), targets) in enumerate(groups.items())
        },
        "ignore": list(kept),
    }
