"""Running ONNX files, also where their inner tensors are wanted."""

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from upcycle.errors import UnsupportedError, UpcycleError, UsageError, one_line
from upcycle.onnx.external_data import external_files, homes
from upcycle.onnx.inputs import Array
from upcycle.onnx.shapes import subgraphs

MANY_NODES = 10_000


def session(
    model: Path | bytes,
    *,
    weights: Path | None = None,
    threads: int = 0,
    prepack: bool = False,
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: the file, or its bytes.
        weights: the folder of the external data of a file given as bytes.
        threads: 0 lets ONNX Runtime choose.
        prepack: lay a copy of each weight out for the kernels: faster, and twice the memory. For
            rounded matrices they are other kernels, which round tokens, too.

    Raises:
        UsageError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "running an ONNX file needs ONNX Runtime: pip install onnxruntime "
            "(with a GPU onnxruntime-gpu, not both)"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what matters comes as an exception
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepack and not _has_rounded(model):  # whose kernel is another one without it
        options.add_session_config_entry("session.disable_prepacking", "1")
    # To plan which tensor may take whose place it compares all nodes with all others: minutes.
    if not prepack:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.enable_mem_reuse = _nodes(model) < MANY_NODES
    if weights is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(weights.absolute()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _nodes(model: Path | bytes) -> int:
    """How many nodes there are when every function is put in its place; 0 for no ONNX model."""
    try:
        if isinstance(model, bytes):
            proto = onnx.load_model_from_string(model)
        else:
            proto = onnx.load(model, load_external_data=False)
    except (OSError, DecodeError):
        return 0
    inside = {(f.domain, f.name): len(f.node) for f in proto.functions}
    return sum(inside.get((node.domain, node.op_type), 1) for node in _all_nodes(proto.graph))


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of the graph and of every branch in it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _all_nodes(inner)


def _has_rounded(model: Path | bytes) -> bool:
    """Whether the name of the kernel of rounded experts is in a file."""
    if isinstance(model, bytes):
        return b"QMoE" in model
    if not model.is_file() or not model.stat().st_size:
        return False
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(b"QMoE") >= 0


def run(
    path: Path, feeds: Mapping[str, Array], extra: Sequence[str] = (), *, prepack: bool = False
) -> dict[str, Array]:
    """All outputs of a file on the CPU, and the inner tensors named in `extra`, by name.

    `prepack` is as for `session`. Weights in external files are mapped by ONNX Runtime and not read
    here.

    Raises:
        UsageError: ONNX Runtime is not installed.
        UnsupportedError: it cannot load the file, or not run it on `feeds`.
    """
    with described(path):
        runner = opened(path, extra, prepack=prepack)
        names = [value.name for value in runner.get_outputs()]
        made = zip(names, runner.run(None, dict(feeds)), strict=True)
        found: dict[str, Array] = {}
        for name, value in made:
            if isinstance(value, list):  # a sequence
                found |= {f"{name}.{i}": part for i, part in enumerate(value)}
            else:
                found[name] = value
        return found


def opened(path: Path, extra: Sequence[str] = (), *, prepack: bool = False) -> Any:
    """A session of a file that also returns the inner tensors named in `extra`."""
    if not extra:
        return session(path, prepack=prepack)
    model, folder = _with_outputs(path, extra)
    return session(model, weights=folder, prepack=prepack)


def fetch(
    path: Path, batches: Sequence[Mapping[str, Array]], names: Sequence[str]
) -> list[list[Array]]:
    """The inner tensors `names` for each of `batches`; what they do not need is not computed.

    Raises: as `run`.
    """
    with described(path):
        model, folder = _with_outputs(path, names, only=True)
        runner = session(model, weights=folder)
        needed = {value.name for value in runner.get_inputs()}
        given = [{n: array for n, array in feeds.items() if n in needed} for feeds in batches]
        return [list(runner.run(list(names), feeds)) for feeds in given]


@contextmanager
def described(path: Path) -> Iterator[None]:
    """Within it errors of ONNX Runtime become an UnsupportedError that names the file."""
    try:
        yield
    except UpcycleError:
        raise
    except Exception as error:  # onnxruntime's own types, which say what and where
        raise UnsupportedError(f"ONNX Runtime cannot run {path.name}: {one_line(error)}") from error


def _with_outputs(path: Path, names: Sequence[str], *, only: bool = False) -> tuple[bytes, Path]:
    """The file with these outputs, and the folder that its external data is in."""
    proto = onnx.load(path, load_external_data=False)
    if only:
        del proto.graph.output[:]
    present = {value.name for value in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    files = list(external_files(path, proto))
    near, linked = homes(path)
    home = near if all(file.is_relative_to(near) for _, file in files) else linked
    for entry, file in files:
        entry.value = os.path.relpath(file, home)
    return bytes(proto.SerializeToString()), home
