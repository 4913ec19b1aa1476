"""Both models as ONNX files in ONNX Runtime, whole and layer by layer.

Shape suffixes: B batch, L tokens of a text, T tokens, D d_model.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from upcycle.bench.layers import Layer
from upcycle.bench.whole import Call
from upcycle.capture.capture import ExampleInputs
from upcycle.data.verification_inputs import Evaluation
from upcycle.onnx.run import described, session
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.decode import FLOAT_TYPES, empty_past
from upcycle.targets.onnx.file_names import MODEL
from upcycle.targets.onnx.write import in_float32, write_onnx
from upcycle.targets.traced.cache import PAST, PRESENT
from upcycle.util.quiet import quiet_logs

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def write_dense(directory: Path, model: nn.Module, evaluation: Evaluation, options: Onnx) -> Path:
    """Write the dense model as the converted one was written; the file, with all weights in it."""
    with quiet_logs("upcycle.targets.onnx"):  # it would warn that the weights are in no checkpoint
        write_onnx(directory, in_float32(model), evaluation.batches[0], {}, options)
    return directory / MODEL


def opened(file: Path | onnx.ModelProto, threads: int, weights: Path | None = None) -> Any:
    """The fastest session: the weights are laid out for the kernels."""
    name = file if isinstance(file, Path) else Path(MODEL)
    model = file if isinstance(file, Path) else file.SerializeToString()
    with described(name):
        return session(model, weights=weights, threads=threads, prepack=True)


def reader(runner: Any, inputs: ExampleInputs) -> Call:
    """A function that runs the file on its `inputs` by name, with an empty past if it reads one."""
    assert isinstance(inputs, Mapping)
    wanted = runner.get_inputs()
    given = {name: _array(tensor) for name, tensor in inputs.items()}
    feeds: dict[str, Any] = {}
    if has_cache(runner):
        feeds |= empty_past(runner, len(given["input_ids"]))
    for value in wanted:
        if value.name in given:
            array = given[value.name]
            feeds[value.name] = array.astype(FLOAT_TYPES.get(value.type, array.dtype))
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones_like(given["input_ids"])
        elif value.name == "position_ids":
            ids_BL = given["input_ids"]
            feeds[value.name] = np.broadcast_to(np.arange(ids_BL.shape[1]), ids_BL.shape)
    return lambda: runner.run(None, feeds)


def _array(value: torch.Tensor) -> Any:
    return value.float().numpy() if value.is_floating_point() else value.numpy()


def has_cache(runner: Any) -> bool:
    """Whether the file reads the past of a text."""
    return any(value.name.startswith(f"{PAST}.") for value in runner.get_inputs())


def writer(runner: Any, ids_BL: torch.Tensor) -> Call:
    """A function that writes the next token of the texts, each time the one after."""
    names = [value.name for value in runner.get_outputs()]
    inputs = {value.name for value in runner.get_inputs()}
    length = ids_BL.shape[1]
    made = dict(zip(names, reader(runner, {"input_ids": ids_BL})(), strict=True))  # type: ignore[call-overload]

    def step() -> None:
        nonlocal made, length
        length += 1
        token_B1 = made["logits"][:, -1:].argmax(-1)
        feeds = {n: made[n.replace(PAST, PRESENT)] for n in inputs if n.startswith(f"{PAST}.")}
        feeds |= {"input_ids": token_B1, "attention_mask": np.ones((len(token_B1), length), int)}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.full_like(token_B1, length - 1)
        made = dict(zip(names, runner.run(None, feeds), strict=True))

    return step


def layer(file: Path, first: str, last: str, threads: int) -> Layer | None:
    """One layer of a whole model in `file` as a function of tokens [T, D].

    `first` and `last` are the paths of the modules that read the tokens and that make the result.
    None if the graph does not show the layer as a function of any number of tokens.
    """
    proto = onnx.load(file, load_external_data=False)
    x_name = _cut(proto.graph, first.replace(".", "/"), last.replace(".", "/"))
    if x_name is None:
        return None
    runner = opened(proto, threads, file.parent)
    types = {value.name: FLOAT_TYPES.get(value.type, np.int64) for value in runner.get_inputs()}

    def run(x_TD: torch.Tensor) -> Any:
        tokens = len(x_TD)
        sizes = {"sequence": tokens, "past + sequence": tokens, "past": 0}
        feeds = {  # only the shape of other inputs is read
            value.name: np.zeros(
                [n if isinstance(n, int) else sizes.get(n, 1) for n in value.shape],
                types[value.name],
            )
            for value in runner.get_inputs()
            if value.name != x_name
        }
        feeds[x_name] = _array(x_TD[None]).astype(types[x_name], copy=False)
        return runner.run(None, feeds)

    return run


def _cut(graph: Any, first: str, last: str) -> str | None:
    """Cut a graph down to the layer; the name of the tokens, or None if it cannot be cut out."""
    kinds = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    fixed = {tensor.name for tensor in graph.initializer}
    reads: set[str] = set()
    makes: set[str] = set()
    elsewhere = {value.name for value in graph.output}
    for node in graph.node:
        if node.name.startswith(f"{first}/"):
            reads |= set(node.input) - fixed
        if node.name.startswith(f"{last}/"):
            makes |= set(node.output)
        else:
            elsewhere |= set(_read(node))
    inner = {name for n in graph.node if n.name.startswith(f"{first}/") for name in n.output}
    starts = [name for name in reads - inner if _is_text(kinds.get(name))]
    ends = [name for name in makes & elsewhere if _is_text(kinds.get(name))]
    if len(starts) != 1 or len(ends) != 1:
        return None
    (x,), (y,) = starts, ends
    needed, nodes = {y}, list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if needed & set(node.output) and x not in node.output:
            nodes.append(node)
            needed |= set(_read(node))
    _keep(graph.node, nodes[::-1])
    _keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
    _keep(graph.input, [value for value in (*graph.input, kinds[x]) if value.name in needed])
    _keep(graph.output, [kinds[y]])
    return str(x)


def _keep(field: Any, kept: Sequence[Any]) -> None:
    copies = [copy.deepcopy(part) for part in kept]
    del field[:]
    field.extend(copies)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """The inputs of a node and of the nodes inside it."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read(inner)


def _is_text(value: onnx.ValueInfoProto | None) -> bool:
    """Whether a value is floats [batch, sequence, width] for any length of the sequence."""
    if value is None or value.type.tensor_type.elem_type not in _FLOATS:
        return False
    dims = value.type.tensor_type.shape.dim
    return len(dims) == 3 and bool(dims[1].dim_param)
