"""Matrices of 8 bits in standard operations: int8 numbers, and one scale for a block of a row.

Every runtime can read them. ONNX Runtime 1.32 makes ``MatMulNBits`` of ``DequantizeLinear`` and a
product when it loads a file.

Shape suffixes: N rows, K inputs of a row, B blocks of a row.
"""

import hashlib
import math
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

from upcycle.ir.quantise import SMALLEST, Block, common_group, quantise
from upcycle.onnx.node_names import SCOPES
from upcycle.onnx.nodes import Nodes
from upcycle.onnx.tensors import numbers_of, tensor_of
from upcycle.targets.onnx.forms.fused import initializer
from upcycle.targets.onnx.forms.unpack import matrix
from upcycle.targets.onnx.share_weights import INLINE_BYTES
from upcycle.targets.onnx.torch_ops.opaque import OPAQUE

BLOCK = 128  # where the recipe leaves it open: the scales are 3 % of the numbers
SUFFIX = ".int8"  # of an initializer; that of its scales ends with `SUFFIX` + `SCALE`
SCALE = ".scale"


@dataclass(frozen=True)
class Int8:
    """Rounded matrices, of which an element is ``numbers * scale`` of its block.

    Attributes:
        numbers: [..., N, K] int8.
        scale: [..., N, B], in the type of the matrices.
    """

    numbers: torch.Tensor
    scale: torch.Tensor

    @property
    def block(self) -> int:
        """Inputs of one block, of which the last may be shorter."""
        return block_of(self.numbers.shape[-1], self.scale.shape[-1])

    def floats(self) -> torch.Tensor:
        """The rounded matrices in float32."""
        return self.numbers.float() * self.steps()

    def steps(self) -> torch.Tensor:
        """The distance of neighbouring values, for each element."""
        each = self.scale.float().repeat_interleave(self.block, dim=-1)
        return each[..., : self.numbers.shape[-1]]


def block_of(columns: int, blocks: int) -> int:
    """The length of a block, which divides the rows."""
    return columns // blocks


def int8(weight: torch.Tensor, block: Block) -> Int8:
    """Round matrices [..., N, K] to 8 bits, in blocks that divide their rows.

    `block` is a group size, ``adaptive`` for what the matrices ask for, or another word, which
    stands for `BLOCK`. Blocks are powers of two, of which ONNX Runtime makes ``MatMulNBits``; rows
    that none from `SMALLEST` on divides have one scale.
    """
    columns = weight.shape[-1]
    wanted = block if isinstance(block, int) else BLOCK
    if block == "adaptive":
        wanted = common_group(weight.reshape(-1, *weight.shape[-2:])) or columns
    size = min(math.gcd(columns, 2**30), wanted)
    flat = weight.reshape(1, -1, columns)
    (found,) = quantise([flat], 8, size if size >= SMALLEST else "row")
    numbers = (found.packed ^ 128).view(torch.int8).reshape(weight.shape)
    return Int8(numbers, found.scale.reshape(*weight.shape[:-1], -1))


def registered(graph: ir.Graph | ir.Function | None, name: str, found: Int8) -> list[ir.Value]:
    """Two initializers: numbers and scales of the matrix that had this name."""
    return [
        initializer(graph, name + SUFFIX, found.numbers),
        initializer(graph, name + SUFFIX + SCALE, found.scale),
    ]


def lift_constants(model: ir.Model) -> None:
    """Make initializers of the large constants among the nodes, in place."""
    common.LiftConstantsToInitializersPass(lift_all_constants=False)(model)


def round_matrices(model: ir.Model, block: Block, *, unpack: bool) -> None:
    """Round every matrix that the graph multiplies with, or looks rows up in, to 8 bits; in place.

    Left in floats are routers (what leads from a layer's tokens to its opaque node), small
    matrices, and weights that are no matrices. A matrix that is read twice, such as an embedding
    that is the head, too, is stored once.
    """
    lift_constants(model)
    kept = _routers(model.graph)
    stored: dict[object, list[ir.Value]] = {}
    for node in list(model.graph.all_nodes()):
        if node in kept or node.domain:
            continue
        place = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)
        if place is None or len(node.inputs) <= place:
            continue
        value, rows = _matrix(node.inputs[place])
        if value is None or not _is_worth(value):
            continue
        if node.op_type == "Gather" and (rows or _flag(node, "axis")):
            continue
        if node.op_type == "Gemm" and _flag(node, "transB"):
            rows = not rows
        weight = numbers_of(value)
        by_row = rows or node.op_type == "Gather"
        found = int8(weight if by_row else weight.T.contiguous(), block)
        key = hashlib.sha256(found.numbers.numpy().tobytes()).digest(), found.numbers.shape
        if key not in stored:
            stored[key] = registered(model.graph, str(value.name), found)
        numbers, scale = stored[key]
        _read_rounded(node, place, str(value.name), numbers, scale, found.block, unpack)


def _read_rounded(
    node: ir.Node,
    place: int,
    name: str,
    numbers: ir.Value,
    scale: ir.Value,
    block: int,
    unpack: bool,
) -> None:
    notes = {key: text for key, text in node.metadata_props.items() if key == SCOPES}
    n = Nodes(f"{node.outputs[0].name}/{name}{SUFFIX}/", notes)
    graph = node.graph
    assert graph is not None
    if node.op_type != "Gather":
        node.replace_input_with(place, matrix(n, numbers, scale, block, unpack=unpack))
        node.attributes.pop("transB", None)
        graph.insert_before(node, n.nodes)
        return
    (before,), ids = node.outputs, node.inputs[1]
    rows = (n("Gather", value, ids, axis=0) for value in (numbers, scale))
    after = n("DequantizeLinear", *rows, axis=-1, block_size=block)
    after.shape, after.type, name = before.shape, before.type, str(before.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], n.nodes, [before], [after])
    after.name = name


def _flag(node: ir.Node, name: str) -> bool:
    """Whether an attribute is there and not 0."""
    return name in node.attributes and node.attributes[name].as_int() != 0


def _matrix(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The initializer behind a matrix, and whether it is transposed on the way."""
    turned = False
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("Identity", "Transpose") or len(value.shape or ()) > 2:
            return None, False
        if producer.op_type == "Transpose":
            turned = not turned
        value = producer.inputs[0]
    return (value if value is not None and value.is_initializer() else None), turned


def _is_worth(value: ir.Value) -> bool:
    """Whether it is a matrix of floats, and large enough to be smaller with its scales."""
    if value.shape is None or len(value.shape) != 2 or value.is_graph_input():
        return False
    tensor = tensor_of(value)
    return (
        tensor is not None
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        and min(tensor.shape) >= SMALLEST
        and tensor.numel() * 4 >= INLINE_BYTES
    )


def _routers(graph: ir.Graph) -> set[ir.Node]:
    """The nodes between the tokens of each layer and the weights of its experts."""
    import networkx as nx  # what is not rounded does without

    nodes = list(graph.all_nodes())
    flow = nx.DiGraph((source, node) for node in nodes for source in node.predecessors())

    def behind(value: ir.Value | None) -> set[ir.Node]:
        node = None if value is None else value.producer()
        return set() if node is None else {node} | nx.ancestors(flow, node)

    layers = [node.inputs for node in nodes if (node.domain, node.op_type) == OPAQUE]
    return set().union(*(behind(weights_TE) - behind(x_TD) for x_TD, weights_TE, *_ in layers))
