"""Record torch calls as a graph: the data that `capture` returns, and what makes it."""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from upcycle.capture.concrete_values import ConcreteValues, UnknownValueError
from upcycle.capture.source_lines import asserted, source_here
from upcycle.util.trees import leaves_of, tensors_in


@dataclass(frozen=True)
class Call:
    """One call of a module: the nodes of the tensors that went in and came out.

    Attributes:
        plain: all that went in was one positional tensor, all that came out one tensor, nothing
            else was changed, and no hook watches inside: a module of one tensor can take the place.
            A node of an ONNX file, which is a call of its own, has no `inputs` here.
        replayed: it repeats a recorded call of a block.
        span: ``(start, stop)`` of the nodes that it recorded, by their place in the graph; empty
            for a node of an ONNX file.
    """

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    plain: bool = True
    replayed: bool = False
    span: tuple[int, int] = (0, 0)


@dataclass
class Program:
    """What a forward did.

    Attributes:
        graph: a node for each torch call; ``node.meta`` has `shape`, `dtype`, `path`, the
            innermost module in whose forward it ran, and `source`, the ``file.py:line`` of the
            model that made it; one under torch.func has its
            `transform`; a call that writes in place has `writes`, the nodes of what was in
            that memory. Parameters and buffers are ``get_attr``; a ``placeholder`` has `argument`,
            what the model calls the input. Of a graph that was recorded, see
            `upcycle.capture.graph_nodes`, `nodes` has the names of its nodes that hold the tensor.
        calls: module path -> its calls.
        replays: path of a recorded block -> paths of the siblings that repeat it.
        is_graph: a graph of torch.fx was recorded.
    """

    graph: fx.Graph
    calls: dict[str, list[Call]] = field(default_factory=dict)
    replays: dict[str, list[str]] = field(default_factory=dict)
    is_graph: bool = False


@functools.cache
def opaque_call(name: str) -> Callable[..., Any]:
    """A target of this name for a node of a graph, which is never run."""

    def call(*args: Any) -> Any:
        raise AssertionError("the graph is a view, it does not run")

    call.__name__ = name
    return call


replayed_block = opaque_call("replayed_block")  # a block that repeats a recorded one
overwritten = opaque_call("overwritten")  # a tensor after a write to another view of its memory
getitem_of = opaque_call("getitem_of")  # one of several outputs


def op_name(target: Any) -> str:
    """One name for all spellings of an operation: ``__iadd__``, ``aten.add.Tensor`` are ``add``."""
    name: str = getattr(target, "__name__", "") or type(target).__name__
    if name == "__get__":  # a property such as Tensor.T
        return str(target.__self__.__name__)
    name = name.partition(".")[0].strip("_")  # operations of torch.library have an overload
    return _SPELLINGS.get(name, name)


_SPELLINGS = {
    **{f"i{op}": op for op in ("add", "sub", "mul", "pow", "matmul")},
    **{f"r{op}": op for op in ("add", "mul")},
    **dict.fromkeys(("truediv", "itruediv", "idiv", "true_divide", "divide"), "div"),
    "rtruediv": "rdiv",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "swish": "silu",
    "clip": "clamp",
    "permute_copy": "permute",
    # of exported programs, which know operations by their names in ATen
    **{f"native_{norm}_norm": f"{norm}_norm" for norm in ("batch", "group", "layer")},
    **{
        f"native_batch_norm_legit{end}": "batch_norm" for end in ("", "_functional", "_no_training")
    },
    "fused_rms_norm": "rms_norm",
    "native_dropout": "dropout",
    "numpy_T": "T",
    "to_copy": "to",
    "unsafe_view": "view",
}


class Recorder(TorchFunctionMode):
    """Adds a node for each torch call that returns a tensor or writes to one."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], inputs: Iterable[Any]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.program = Program(self.graph)
        self.path: list[str] = [""]
        self.source = ""  # of what is recorded, where a graph notes it
        self._node: dict[int, fx.Node] = {}
        self._views: dict[int, list[torch.Tensor]] = {}  # tensors of one storage; keeps ids unique
        for tensor in (t for t in inputs if isinstance(t, torch.Tensor)):
            self._bind(tensor, self.graph.placeholder(f"input_{len(self._node)}"))
        self.values = ConcreteValues()
        self.changes: list[int] = []  # when what was made was changed: its place in the graph
        self._names = {id(t): name for name, t in tensors.items()}
        self._weights = list(tensors.values())

    def _bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        number = len(self.graph.nodes) if node.op == "call_function" else 0  # it was there
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, path=self.path[-1])
        node.meta["number"] = number
        if id(tensor) not in self._node:
            self._views.setdefault(_storage(tensor), []).append(tensor)
        self._node[id(tensor)] = node

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that made `tensor`; a weight or an unknown constant gets one now."""
        if id(tensor) not in self._node:
            name = self._names.get(id(tensor), "")
            node = self.graph.create_node("get_attr", name or "constant")
            node.meta["parameter"] = name
            self._bind(tensor, node)
        return self._node[id(tensor)]

    def enter(self, path: str, source: str) -> None:
        """What follows comes from the module at `path`, and that line; a graph says so, which has
        neither modules nor lines of its own."""
        self.path[-1], self.source = path, source

    def label(self, value: Any, name: str) -> None:
        """Note that the graph which is recorded holds `value` at its node `name`."""
        if isinstance(value, torch.Tensor):
            self.node_of(value).meta.setdefault("nodes", []).append(name)

    def nodes_of(self, tree: Any) -> list[fx.Node]:
        """The nodes of all tensors in a nested structure."""
        return [self.node_of(t) for t in tensors_in(tree)]

    def record(self, target: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> fx.Node:
        """Add the call, and a ``getitem`` for each tensor if it returns several."""
        if not args and "input" in kwargs:  # the data is always the first argument
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        to_node = functools.partial(pytree.tree_map_only, torch.Tensor, self.node_of)
        inputs = to_node(tuple(args)), to_node(dict(kwargs))
        node = self.graph.create_node("call_function", target, *inputs, name=op_name(target))
        node.meta["source"] = self.source or source_here()
        if (transform := torch._C._functorch.peek_interpreter_stack()) is not None:
            node.meta["transform"] = transform.key().name.lower()
        if isinstance(out, torch.Tensor):
            self._bind(out, node)
            return node
        node.meta["path"] = self.path[-1]
        for i, tensor in enumerate(pytree.tree_leaves(out)):
            if isinstance(tensor, torch.Tensor):
                self._bind(tensor, self.graph.call_function(getitem_of, (node, i)))
        return node

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = leaves_of((args, kwargs))
        versions = [tensor._version for tensor in given]
        known = self.values.knows(given)
        try:
            out = self._fake(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            try:
                out = self._from_values(func, args, kwargs, known)
            except (UnknownValueError, DataDependentOutputException):
                if (truth := asserted(sys._getframe(1), op_name(func))) is not None:
                    return truth
                error.add_note(f"`{op_name(func)}`")
                raise error from None
        if op_name(func) == "dropout" and any(out is tensor for tensor in given):
            out = out.view(out.shape)  # outside training it does nothing, and is to be seen
        written = [t for t, v in zip(given, versions, strict=True) if t._version != v]
        returned = leaves_of(out)
        if written:
            self._write(func, args, kwargs, out if returned else written[0], written)
        elif any(all(t is not g for g in given) for t in returned):
            self.record(func, args, kwargs, out)
        if known and (written or returned) and self.values.small(returned):
            self._keep_values(func, args, kwargs, out, written)
        else:
            self._forget(written)
        return out

    def _fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        if op_name(func) == "grouped_mm":  # on fake tensors torch has it for bfloat16 alone
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **kwargs)

    def _from_values(self, func: Any, args: Any, kwargs: Any, known: bool) -> Any:
        """The result of a call that needs values: as far as they go, else its shape alone."""
        with_numbers = self.values.with_numbers(args, kwargs)
        try:
            if not known:
                return self._fake(func, *with_numbers)
            real = self.values.run(func, args, kwargs)
        except DynamicOutputShapeException:
            real = self.values.run(func, *with_numbers, shape_only=True)
        except UnknownValueError:  # it draws random numbers
            return self._fake(func, *with_numbers)
        return pytree.tree_map_only(torch.Tensor, torch.empty_like, real)

    def _keep_values(
        self, func: Any, args: Any, kwargs: Any, out: Any, written: list[torch.Tensor]
    ) -> None:
        try:
            real = pytree.tree_leaves(self.values.run(func, args, kwargs))
        except UnknownValueError:
            self._forget(written)
            return
        for fake, value in zip(pytree.tree_leaves(out), real, strict=True):
            if isinstance(fake, torch.Tensor):
                self.values.learn(fake, value)

    def _forget(self, written: list[torch.Tensor]) -> None:
        for storage in {_storage(tensor) for tensor in written}:
            self.values.forget(self._views.get(storage, ()))

    def _write(
        self, func: Any, args: Any, kwargs: Any, out: Any, written: list[torch.Tensor]
    ) -> None:
        """Record a call that changed tensors in place, and every other view of their memory."""
        for tensor in written:
            self.node_of(tensor)
        storages = {_storage(tensor) for tensor in written}
        views = [view for storage in storages for view in self._views.get(storage, [])]
        before = {id(view): self._node[id(view)] for view in views}
        node = self.record(func, args, kwargs, out)
        node.meta["writes"] = tuple(before.values())
        self.changes += [old.meta["number"] for old in before.values()]
        direct = {id(t) for t in pytree.tree_leaves(out)}
        for view in views:
            if id(view) not in direct:
                old = before[id(view)]
                self._bind(view, self.graph.call_function(overwritten, (old, node)))


def _storage(tensor: torch.Tensor) -> int:
    """Identifies the memory that views of one tensor share; sparse tensors have none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)
