"""What the tensors of an ONNX graph come from, noted node by node."""

import onnx_ir as ir

from upcycle.passes.locate_onnx.names import subgraphs


class Origins:
    """Notes of the nodes in their order, so that no question walks back through the graph."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._sources: dict[ir.Value, ir.Value] = {}  # a copy -> what it is a copy of
        self._constant: set[ir.Value] = set()  # what nodes make

    def note(self, node: ir.Node) -> None:
        """Note the outputs of `node`; those that it reads from are noted before."""
        values = [value for value in node.inputs if value is not None]
        if values and not subgraphs(node) and all(map(self.is_constant, values)):
            self._constant.update(node.outputs)
        if node.op_type == "Identity" and values:
            self._sources[node.outputs[0]] = self.source_of(values[0])

    def source_of(self, value: ir.Value) -> ir.Value:
        """The tensor itself, past copies of it."""
        return self._sources.get(value, value)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a tensor is made of weights and constants alone."""
        return value in self._constant or ir.convenience.get_const_tensor(value) is not None
