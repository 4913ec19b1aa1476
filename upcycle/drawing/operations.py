"""The operations of a captured program as plain data: every block is there, repeats too."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from upcycle.capture.recorder import Call, Program, getitem_of, op_name
from upcycle.drawing.steps import Step, steps_of


@dataclass(frozen=True)
class Operation:
    """One call of torch, an input, or the output of the model.

    Attributes:
        name: unique in the program.
        node: the recorded node; in a block that repeats another, that of the other.
        op: what is called; of an input, what the model calls it.
        kind: ``input``, ``output`` or ``operation``.
        path: the innermost module in whose forward it ran.
        steps: the calls of modules around it, the outermost first.
        inputs: names of the operations that it reads.
        weights: the parameters that it reads, and how many numbers they have.
        shape, dtype: of what it makes; of several tensors, of the first.
        source: ``file.py:line`` of the model.
        layer: path of the FFN or MoE layer that it is a part of; that of the model is empty.
        misses: what shows here to be no FFN, by its path, and why.
    """

    name: str
    node: str
    op: str
    kind: str
    path: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    weights: tuple[tuple[str, int], ...] = ()
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    source: str = ""
    layer: str | None = None
    misses: tuple[tuple[str, str], ...] = ()


def shape_facts(one: Operation) -> dict[str, str]:
    """What an operation makes, in words."""
    if one.shape is None:
        return {}
    return {"shape": "x".join(map(str, one.shape)) or "scalar", "dtype": one.dtype}


def operations_of(program: Program, layer_of: Mapping[fx.Node, str]) -> list[Operation]:
    """All operations in their order; those of a block that repeats another have its own names.

    Args:
        program: what was recorded.
        layer_of: path of the FFN that a recorded node is a part of.
    """
    return _Unrolled(program, layer_of).operations()


class _Unrolled:
    """Goes through the nodes once, and copies those of a recorded block for each repeat."""

    def __init__(self, program: Program, layer_of: Mapping[fx.Node, str]) -> None:
        self._program, self._layer_of = program, layer_of
        self._nodes = list(program.graph.nodes)
        self._steps = steps_of(program)
        self._found: list[list[Operation]] = [[] for _ in self._nodes]
        self._name_of: dict[fx.Node, str] = {}
        self._template_of = {p: t for t, paths in program.replays.items() for p in paths}
        self._repeats = {
            _maker(output): (path, call)
            for path, calls in program.calls.items()
            for call in calls
            if call.replayed
            for output in call.outputs[:1]
        }
        self._within = {place for _, c in self._repeats.values() for place in range(*c.span)}

    def operations(self) -> list[Operation]:
        """As `operations_of`."""
        for place, node in enumerate(self._nodes):
            if node.op == "get_attr" or node in self._name_of:
                continue
            if node in self._repeats:
                self._found[place] = self._copies(place, *self._repeats[node])
            elif _maker(node) is not node:  # one tensor of several
                self._name_of[node] = self._name_of[_maker(node)]
            elif place not in self._within:  # else an empty tensor that stands for an output
                self._name_of[node] = node.name
                self._found[place] = [self._operation(node, self._steps[place])]
        return [operation for found in self._found for operation in found]

    def _operation(self, node: fx.Node, steps: tuple[Step, ...]) -> Operation:
        made = node if "shape" in node.meta else next(iter(node.users), node)
        kinds = {"placeholder": "input", "output": "output"}
        op = op_name(node.target) if node.op == "call_function" else str(node.target)
        read = node.all_input_nodes
        dtype = str(made.meta.get("dtype", "")).removeprefix("torch.")
        return Operation(
            name=node.name,
            node=node.name,
            op=str(node.meta.get("argument", op)),
            kind=kinds.get(node.op, "operation"),
            path=str(node.meta.get("path", "")),
            steps=steps,
            inputs=tuple(dict.fromkeys(self._name_of[n] for n in read if n in self._name_of)),
            weights=tuple(
                (str(n.meta["parameter"] or n.name), math.prod(n.meta["shape"]))
                for n in read
                if n.op == "get_attr"
            ),
            shape=tuple(map(int, made.meta["shape"])) if _is_known(made) else None,
            dtype=dtype if _is_known(made) else "",
            source=str(node.meta.get("source", "")),
            layer=self._layer_of.get(node),
        )

    def _copies(self, place: int, path: str, call: Call) -> list[Operation]:
        """What the block `path` does in `call`: as the recorded block that it repeats."""
        template = self._template_of[path]
        recorded = [(c, i) for i, c in enumerate(self._program.calls[template]) if not c.replayed]
        original, i = [one for one in recorded if one[0].span[1] <= place][-1]
        inputs = self._names(original.inputs, call.inputs)
        copied: dict[str, str] = {}
        copies = []
        for found in self._found[slice(*original.span)]:
            for operation in found:
                copied[operation.name] = f"{self._nodes[place].name}.{operation.name}"
                inner = operation.steps[operation.steps.index((template, i)) + 1 :]
                copies.append(
                    replace(
                        operation,
                        name=copied[operation.name],
                        path=_renamed(operation.path, template, path),
                        steps=(
                            *self._steps[place],
                            *((_renamed(p, template, path), n) for p, n in inner),
                        ),
                        inputs=tuple(
                            copied.get(name, inputs.get(name, name)) for name in operation.inputs
                        ),
                        weights=tuple(
                            (_renamed(name, template, path), size)
                            for name, size in operation.weights
                        ),
                        layer=_renamed(operation.layer, template, path)
                        if operation.layer
                        else operation.layer,
                    )
                )
        for old, new in zip(original.outputs, call.outputs, strict=True):
            name = self._name_of.get(old, "")
            self._name_of[new] = copied.get(name, inputs.get(name, name))
        self._name_of.setdefault(self._nodes[place], copies[-1].name if copies else "")
        return copies

    def _names(self, old: tuple[fx.Node, ...], new: tuple[fx.Node, ...]) -> dict[str, str]:
        known = (
            (self._name_of.get(a), self._name_of.get(b)) for a, b in zip(old, new, strict=True)
        )
        return {a: b for a, b in known if a is not None and b is not None}


def _maker(node: fx.Node) -> fx.Node:
    """The call behind one of several tensors that it returned."""
    return node.args[0] if node.target is getitem_of else node  # type: ignore[return-value]


def is_within(path: str, module: str) -> bool:
    """Whether `path` is that of the module, or of something in it."""
    return path == module or path.startswith(f"{module}.")


def _renamed(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if is_within(path, old) else path


def _is_known(node: fx.Node) -> bool:
    """Whether the shape is; of a tensor of an ONNX graph it need not be."""
    return "shape" in node.meta and bool(node.meta.get("known", True))
