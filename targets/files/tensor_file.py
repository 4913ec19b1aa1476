"""Write tensors to safetensors files one at a time, so that no model has to fit in memory.

The sizes of all tensors are known before any is read, so the header is written first and each
tensor is read, written and dropped in its turn. Same tensors, same order: same bytes.
"""

import errno
import itertools
import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from upcycle.errors import ResourceError, UpcycleError
from upcycle.targets.files.output_file import OutputFile
from upcycle.targets.files.stored import Stored

GB = 10**9
MAX_SHARD_SIZE = 5 * GB
LARGE = GB  # bytes of one checkpoint from which on it is written past the cache

# The names that safetensors files use for element types.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that will be written.

    Attributes:
        name: in the file.
        shape, dtype: what `read` will return.
        read: called once, when it is the tensor's turn.
        stack: consecutive entries with the same stack have one shape and dtype and stay together
            in one file, so that they can also be used as one tensor with one axis more.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    stack: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardLog(Protocol):
    """The complete files of a run, so that an interrupted one can be continued."""

    def is_whole(self, path: Path) -> bool:
        """Whether an earlier run finished the file, and it is unchanged."""

    def finished(self, path: Path, digest: str) -> None:
        """Note that the file is complete; `digest` is its SHA-256."""


def write_tensors(
    directory: Path,
    entries: Iterable[TensorEntry],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    stem: str = "model",
    log: ShardLog | None = None,
) -> dict[str, Stored]:
    """Write `entries`, in their order and without gaps, to one or several safetensors files.

    One file is ``<stem>.safetensors``; several are numbered and listed in
    ``<stem>.safetensors.index.json``, as Hugging Face names them. A tensor or stack that is larger
    than `max_shard_size` gets a file of its own.

    Where an element would not start at a multiple of its size (an odd number of 2-byte elements
    before a 4-byte one), that file's tensors are sorted by element size, largest first.

    Args:
        directory: an existing directory.
        entries: what to write; names and stack names are unique.
        max_shard_size: bytes of tensors in one file.
        stem: first part of the file names.
        log: knows which files are complete; those are not read or written again.

    Returns:
        Where each tensor lies, by name; and each stack, by stack name, with shape [E, ...].

    Raises:
        ResourceError: the disk is too small (found before anything is written), or became full.
        UpcycleError: a safetensors file cannot hold the dtype of an entry.
        ValueError: names are not unique, or `read` returned something else than was declared.
    """
    groups = _groups(list(entries))
    shards = [_aligned(shard) for shard in _shards(groups, max_shard_size)]
    total = sum(entry.nbytes for shard in shards for entry in shard)
    check_disk(directory, total)
    stored: dict[str, Stored] = {}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = directory / f"{stem}{suffix}.safetensors"
        header, places = _layout(path.name, shard)
        stored |= places
        if log is None or not log.is_whole(path):
            past_cache, hashed = total >= LARGE, log is not None
            digest = _write_shard(path, header, shard, past_cache=past_cache, hashed=hashed)
            if log is not None and digest is not None:
                log.finished(path, digest)
    if len(shards) > 1:
        weight_map = {e.name: stored[e.name].file for shard in shards for e in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return stored


def check_disk(path: Path, nbytes: int) -> None:
    """Raise ResourceError if the disk of `path`, which need not exist, has too few bytes free."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise ResourceError(
            f"{path}: {nbytes / GB:.2f} GB will be written and {free / GB:.2f} GB are free; "
            f"make room or choose a directory on another disk"
        )


def _groups(entries: Sequence[TensorEntry]) -> list[list[TensorEntry]]:
    """The entries, with those of one stack together; refuses what `write_tensors` refuses."""
    groups: list[list[TensorEntry]] = []
    for stack, run in itertools.groupby(entries, key=lambda entry: entry.stack):
        members = list(run)
        if stack is None:
            groups += [[entry] for entry in members]
        elif len({(entry.shape, entry.dtype) for entry in members}) == 1:
            groups.append(members)
        else:
            raise ValueError(f"stack {stack}: its tensors differ in shape or dtype")
    names = Counter(entry.name for entry in entries)
    names.update(group[0].stack for group in groups if group[0].stack is not None)
    for name, count in names.items():
        if count > 1:
            raise ValueError(f"{name}: two tensors or stacks have this name")
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise UpcycleError(
                f"{entry.name}: a safetensors file cannot hold {entry.dtype}; "
                f"convert the model to another dtype first"
            )
    return groups


def _shards(groups: list[list[TensorEntry]], max_size: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(entry.nbytes for entry in group)
        if shards[-1] and size + nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1] += group
        size += nbytes
    return shards


def _aligned(shard: list[TensorEntry]) -> list[TensorEntry]:
    offset = 0
    for entry in shard:
        if offset % entry.dtype.itemsize:
            return sorted(shard, key=lambda entry: -entry.dtype.itemsize)
        offset += entry.nbytes
    return shard


def _layout(file: str, shard: list[TensorEntry]) -> tuple[bytes, dict[str, Stored]]:
    """The bytes before the first tensor, and where each tensor will be."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = list(itertools.accumulate(entry.nbytes for entry in shard))
    for entry, end in zip(shard, ends, strict=True):
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end - entry.nbytes, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    stored: dict[str, Stored] = {}
    for entry, end in zip(shard, ends, strict=True):
        offset = len(start) + end - entry.nbytes
        stored[entry.name] = Stored(file, offset, entry.shape, entry.dtype)
        if entry.stack is not None:
            first = stored.get(entry.stack) or Stored(file, offset, (0, *entry.shape), entry.dtype)
            shape = (first.shape[0] + 1, *entry.shape)
            stored[entry.stack] = replace(first, shape=shape)
    return start, stored


def _write_shard(
    path: Path, header: bytes, shard: list[TensorEntry], *, past_cache: bool, hashed: bool
) -> str | None:
    """Write a file; its SHA-256, if wanted."""
    try:
        with OutputFile(path, past_cache=past_cache, hashed=hashed) as file:
            file.write(header)
            for entry in shard:
                _write_tensor(file, entry)
        return file.sha256
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(f"{path}: the disk became full; make room and run again") from error


def _write_tensor(file: OutputFile, entry: TensorEntry) -> None:
    tensor = entry.read().detach()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise ValueError(
            f"{entry.name}: declared {entry.dtype} {entry.shape}, "
            f"read {tensor.dtype} {tuple(tensor.shape)}"
        )
    flat = tensor.to("cpu").contiguous().reshape(-1)
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)
