"""Where the weights of an ONNX file that lie beside it really are.

A cache of the Hugging Face hub has links to blobs in place of files. As in ONNX Runtime, data may
be in the folder of the file, or in that of the file that a link leads to.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from upcycle.errors import UsageError
from upcycle.onnx.shapes import subgraphs


def homes(path: Path) -> tuple[Path, Path]:
    """The folders that external data of the file at `path` may be in."""
    return path.parent.resolve(), path.resolve().parent


def external_files(
    path: Path, model: onnx.ModelProto
) -> Iterator[tuple[onnx.StringStringEntryProto, Path]]:
    """The location of each external tensor of `model`, and the file that it leads to.

    Raises:
        UsageError: it leads out of the folder, or to no file.
    """
    for tensor in _tensors([*model.graph.node, *(n for f in model.functions for n in f.node)]):
        yield from _file(path, tensor)
    for tensor in model.graph.initializer:
        yield from _file(path, tensor)


def stored_bytes(*paths: Path) -> int:
    """Bytes of ONNX files and of the files that their weights lie in, each counted once.

    Raises:
        UsageError: as `external_files`.
    """
    files = {path.resolve() for path in paths}
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        files |= {file for _, file in external_files(path, model)}
    return sum(file.stat().st_size for file in files)


def _file(
    path: Path, tensor: onnx.TensorProto
) -> Iterator[tuple[onnx.StringStringEntryProto, Path]]:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    for entry in (entry for entry in tensor.external_data if entry.key == "location"):
        location = Path(entry.value)
        file = (path.parent / location).resolve()
        is_near = any(file.is_relative_to(home) for home in homes(path))
        if location.is_absolute() or ".." in location.parts or not is_near:
            raise UsageError(
                f"{path}: its weight {tensor.name} is said to be in {entry.value}, outside the "
                "folder of the file"
            )
        if not file.is_file():
            raise UsageError(
                f"{path}: its external data {entry.value} is missing; put the file beside it"
            )
        yield entry, file


def _tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """The tensors in attributes, and all of the branches and bodies there."""
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
        for graph in subgraphs(node):
            yield from graph.initializer
            yield from _tensors(graph.node)
