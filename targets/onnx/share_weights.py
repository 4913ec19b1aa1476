"""Point the initializers of a graph at tensors that are already on disk.

Names differ between a graph and a checkpoint, so tensors are found by their bits: a fingerprint of
256 of them for the search, then a comparison of all.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from upcycle.onnx.nodes import Nodes
from upcycle.onnx.tensors import ONNX_TYPES, tensor_of
from upcycle.targets.files.stored import Stored, read_stored

log = logging.getLogger(__name__)

INLINE_BYTES = 1024  # below this a tensor stays in the .onnx file
INLINE_INDEX_BYTES = 65536  # the same for positions, masks and shapes, which no checkpoint holds
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Match:
    """A stored tensor that equals a wanted one after a cast, and a swap of its last two axes."""

    name: str
    stored: Stored
    transposed: bool
    cast: bool


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor as integers, so that -0 differs from 0 and a NaN equals itself."""
    return tensor.view(_BITS[tensor.element_size()])


def _fingerprint(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    """Shape, type, and up to 256 elements spread evenly over `tensor`, whatever its strides."""
    flat = np.linspace(0, tensor.numel() - 1, min(tensor.numel(), 256)).astype(np.int64)
    index = tuple(torch.from_numpy(i) for i in np.unravel_index(flat, tensor.shape))
    return tuple(tensor.shape), tensor.dtype, bits(tensor[index]).numpy().tobytes()


class Store:
    """The stored tensors of an output directory, searchable by content."""

    def __init__(self, directory: Path, stored: Mapping[str, Stored]) -> None:
        self.directory = directory
        self._index: dict[object, list[Match]] = defaultdict(list)
        for name, entry in stored.items():
            if not entry.shape or math.prod(entry.shape) == 0:  # a scalar is in the graph itself
                continue
            for transposed in (False, True) if len(entry.shape) in (2, 3) else (False,):
                for cast in (False, True) if entry.dtype in _NARROW else (False,):
                    match = Match(name, entry, transposed, cast)
                    self._index[self._fingerprint(match)].append(match)

    @property
    def is_empty(self) -> bool:
        """Whether there is no checkpoint beside the file."""
        return not self._index

    def value(self, match: Match) -> torch.Tensor:
        """What the graph gets from `match`, without the cast."""
        tensor = read_stored(self.directory, match.stored)
        return tensor.mT if match.transposed else tensor

    def find(self, tensor: torch.Tensor) -> Match | None:
        """A stored tensor with the bits of `tensor`, those that need no extra node first."""
        if tensor.numel() == 0 or tensor.element_size() not in _BITS:
            return None
        found = self._index.get(_fingerprint(tensor), [])
        for match in sorted(found, key=lambda m: (m.cast, m.transposed)):
            if self._equal(match, tensor):
                return match
        return None

    def _fingerprint(self, match: Match) -> object:
        shape, dtype, sample = _fingerprint(self.value(match))
        if match.cast:
            narrow = torch.frombuffer(bytearray(sample), dtype=dtype)
            dtype, sample = torch.float32, narrow.float().numpy().tobytes()
        return shape, dtype, sample

    def _equal(self, match: Match, tensor: torch.Tensor) -> bool:
        value = self.value(match)
        rows = max(1, (1 << 24) // max(1, math.prod(tensor.shape[1:])))  # a copy of 64 MB at most
        return all(
            torch.equal(bits(value[i : i + rows].to(tensor.dtype)), bits(tensor[i : i + rows]))
            for i in range(0, len(tensor), rows)
        )


def share_weights(model: ir.Model, store: Store, path: Path) -> int:
    """Point every initializer of `model` that is on disk at its file; returns how many are not.

    The rest goes to ``<path>.data``, beside `path`, where the graph will be saved.
    """
    graph = model.graph
    head = Nodes()
    shared: dict[str, ir.Value] = {}
    missing: list[ir.Value] = []
    for value in list(graph.initializers.values()):
        tensor = tensor_of(value)
        if tensor is None or _is_small(tensor):
            continue
        match = store.find(tensor)
        if match is None:
            missing.append(value)
            continue
        del graph.initializers[str(value.name)]
        if match.name not in shared:
            shared[match.name] = stored_value(match.name, match.stored, store.directory)
        new = shared[match.name]
        # Nodes are kept apart by the name of the value, which is unique in the graph.
        if match.cast:
            new = head("Cast", new, to=ir.DataType.FLOAT.value, name=f"{value.name}/float32")
        if match.transposed:
            perm = [1, 0] if len(match.stored.shape) == 2 else [0, 2, 1]
            new = head("Transpose", new, perm=perm, name=f"{value.name}/transposed")
        ir.convenience.replace_all_uses_with(value, new)
    for value in shared.values():
        if value.name in graph.initializers:  # a tensor of this name that is not the stored one
            value.name = f"{value.name}/stored"
        graph.register_initializer(value)
    if head.nodes:
        graph.insert_before(graph[0], head.nodes)
    size = _write(missing, path)
    if missing:
        level = logging.INFO if store.is_empty else logging.WARNING
        text = "%s.data: %d tensors (%d bytes) are not in the checkpoint"
        log.log(level, text, path.name, len(missing), size)
    return len(missing)


def write_weights(model: ir.Model, path: Path) -> int:
    """Write every large initializer of `model` to ``<path>.data``; returns how many there are."""
    values = [v for graph in model.graphs() for v in graph.initializers.values()]
    large = [v for v in values if (tensor := tensor_of(v)) is not None and not _is_small(tensor)]
    _write(large, path)
    return len(large)


def _is_small(tensor: torch.Tensor) -> bool:
    is_weight = tensor.is_floating_point() or tensor.dtype in (torch.int8, torch.uint8)
    limit = INLINE_BYTES if is_weight else INLINE_INDEX_BYTES
    return tensor.numel() * tensor.element_size() < limit


def stored_value(name: str, stored: Stored, directory: Path) -> ir.Value:
    """An initializer that is read from where it is stored, in a file of `directory`."""
    dtype, shape = ONNX_TYPES[stored.dtype], ir.Shape(stored.shape)
    tensor = ir.ExternalTensor(
        *(stored.file, stored.offset, stored.nbytes, dtype),
        shape=shape,
        name=name,
        base_dir=directory,
    )
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)


def _write(values: list[ir.Value], path: Path) -> int:
    """Move the tensors to ``<path>.data``; returns their bytes."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    if not tensors:
        return 0
    written = ir.external_data.convert_tensors_to_external(
        tensors, path.parent, f"{path.name}.data"
    )
    for value, tensor in zip(values, written, strict=True):
        value.const_value = tensor
    return sum(tensor.nbytes for tensor in written)
