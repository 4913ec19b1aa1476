"""Capture: record one ordinary forward of a model as a graph, without computing a number.

The model's own Python runs on fake tensors (shapes and dtypes only), and every torch call that
returns a tensor becomes a node. Control flow, caches and keyword objects therefore just work, and
the weights may be absent (meta device). The graph is a view to decide on: it is never executed.

Sibling blocks of a ModuleList or Sequential that have the same structure are recorded twice; the
further ones replay the shapes, so the time does not grow with the depth of the model. Two and not
one, so that a region that crosses from one block to the next is seen.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from upcycle.errors import CaptureError

ExampleInputs = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module: the nodes of the tensors that went in and came out."""

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass
class Program:
    """What a forward did.

    Attributes:
        graph: a node for each torch call; ``node.meta`` has `shape`, `dtype` and `path`, the
            innermost module in whose forward it ran. Parameters and buffers are ``get_attr``.
        calls: module path -> its calls.
        replays: path of a recorded block -> paths of the siblings that repeat it.
    """

    graph: fx.Graph
    calls: dict[str, list[Call]] = field(default_factory=dict)
    replays: dict[str, list[str]] = field(default_factory=dict)


def replayed_block(*args: Any) -> Any:
    """Target of the node that stands for a block which repeats a recorded one."""
    raise AssertionError("the graph is a view, it does not run")


def capture(model: nn.Module, example: ExampleInputs, *, repeat_blocks: bool = True) -> Program:
    """Record one forward of `model`.

    Args:
        model: any module, in any mode; its weights may be on the meta device. It is left as it was.
        example: keyword arguments, or a tuple of positional ones; only shapes and dtypes matter.
        repeat_blocks: record at most two of equal sibling blocks.

    Raises:
        CaptureError: the forward failed on fake tensors; the message has the operator's own words.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        tensors = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu")
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        }
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: fake_mode.from_tensor(t.detach().cpu()), (args, kwargs)
    )
    recorder = _Recorder(tensors, pytree.arg_tree_leaves(*args, **kwargs))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)  # it hides the linear maps in one call
        stack.enter_context(_state_restored(model))
        stack.enter_context(_calls_watched(model, recorder, repeat_blocks))
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake_mode)
        stack.enter_context(recorder)
        try:
            out = functional_call(model, tensors, args, kwargs, strict=False)
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CaptureError(
                f"{type(model).__name__}: the forward fails on example inputs "
                f"{_describe(example)} ({type(error).__name__}: {first_line}); "
                "give inputs that it accepts with --inputs module:callable"
            ) from error
    recorder.graph.output(tuple(recorder.nodes_of(out)))
    return recorder.program


def _describe(example: ExampleInputs) -> str:
    items = example.items() if isinstance(example, Mapping) else enumerate(example)
    shapes = (f"{k}: {list(v.shape) if isinstance(v, torch.Tensor) else v!r}" for k, v in items)
    return "{" + ", ".join(shapes) + "}"


class _Recorder(TorchFunctionMode):
    """Adds a node for each torch call that returns a tensor."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], inputs: list[Any]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.program = Program(self.graph)
        self.path: list[str] = [""]
        self._node: dict[int, fx.Node] = {}
        self._alive: list[torch.Tensor] = []  # ids are compared, so no tensor may be freed
        for tensor in (t for t in inputs if isinstance(t, torch.Tensor)):
            self._bind(tensor, self.graph.placeholder(f"input_{len(self._node)}"))
        self._names = {id(t): name for name, t in tensors.items()}
        self._alive.extend(tensors.values())

    def _bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, path=self.path[-1])
        self._node[id(tensor)] = node
        self._alive.append(tensor)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that made `tensor`; a weight or an unknown constant gets one now."""
        if id(tensor) not in self._node:
            name = self._names.get(id(tensor), "")
            node = self.graph.create_node("get_attr", name or "constant")
            node.meta["parameter"] = name
            self._bind(tensor, node)
        return self._node[id(tensor)]

    def nodes_of(self, tree: Any) -> list[fx.Node]:
        """The nodes of all tensors in a nested structure."""
        leaves = pytree.tree_leaves(tree)
        return [self.node_of(t) for t in leaves if isinstance(t, torch.Tensor)]

    def record(self, target: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Add the call, and a ``getitem`` for each tensor if it returns several."""
        to_node = functools.partial(pytree.tree_map_only, torch.Tensor, self.node_of)
        node = self.graph.create_node(
            "call_function",
            target,
            to_node(tuple(args)),
            to_node(dict(kwargs)),
            name=op_name(target),
        )
        if isinstance(out, torch.Tensor):
            self._bind(out, node)
            return
        node.meta["path"] = self.path[-1]
        for i, tensor in enumerate(pytree.tree_leaves(out)):
            if isinstance(tensor, torch.Tensor):
                self._bind(tensor, self.graph.call_function(_item, (node, i)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op_name(func) == "grouped_mm":  # on fake tensors torch has it for bfloat16 alone
            out = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        else:
            out = func(*args, **kwargs)
        if op_name(func) == "setitem":  # an assignment changes its first argument in place
            self.record(func, args, kwargs, args[0])
        elif any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(out)):
            self.record(func, args, kwargs, out)
        return out


def _item(outputs: Any, index: int) -> Any:
    raise AssertionError("the graph is a view, it does not run")


def op_name(target: Any) -> str:
    """One name for all spellings of an operation: ``__iadd__``, ``add_`` and ``radd`` are ``add``."""
    if target is _item:
        return "getitem_of"
    name: str = getattr(target, "__name__", "") or type(target).__name__
    if name == "__get__":  # a property such as Tensor.T
        return str(target.__self__.__name__)
    name = name.strip("_")
    return _SPELLINGS.get(name, name)


_SPELLINGS = {
    **{f"i{op}": op for op in ("add", "sub", "mul", "pow", "matmul")},
    **{f"r{op}": op for op in ("add", "mul")},
    "truediv": "div",
    "itruediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "swish": "silu",
    "clip": "clamp",
    "permute_copy": "permute",
}


@contextmanager
def _state_restored(model: nn.Module) -> Iterator[None]:
    """Undo every attribute that the forward sets: fake tensors must not stay in the model."""
    saved = [
        (
            m,
            dict(m.__dict__),
            {k: dict(m.__dict__[k]) for k in ("_parameters", "_buffers", "_modules")},
        )
        for m in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, tables in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, table in tables.items():
                module.__dict__[key].clear()
                module.__dict__[key].update(table)


@contextmanager
def _calls_watched(model: nn.Module, recorder: _Recorder, repeat_blocks: bool) -> Iterator[None]:
    """Note for each module what went in and out, and replay blocks that were recorded twice.

    The forward of each instance is wrapped; `_state_restored` takes the wrappers away.
    """
    blocks = _repeated_blocks(model) if repeat_blocks else {}
    recorded: Counter[Any] = Counter()
    templates: dict[Any, tuple[str, Any]] = {}

    def watch(path: str, module: nn.Module) -> None:
        forward = module.forward

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            inputs = recorder.nodes_of((args, kwargs))
            key = (blocks.get(path), tuple((n.meta["shape"], n.meta["dtype"]) for n in inputs))
            if path in blocks and recorded[key] >= 2:
                template, out = templates[key]
                out = _fresh(out)
                recorder.record(replayed_block, (inputs,), {}, out)
                recorder.program.replays.setdefault(template, []).append(path)
            else:
                recorder.path.append(path)
                try:
                    out = forward(*args, **kwargs)
                finally:
                    recorder.path.pop()
                recorded[key] += 1
                templates[key] = (path, out)
            call = Call(tuple(inputs), tuple(recorder.nodes_of(out)))
            recorder.program.calls.setdefault(path, []).append(call)
            return out

        module.forward = watched

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            watch(path, module)
    yield


def _fresh(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.new_empty(t.shape), tree)


def _repeated_blocks(model: nn.Module) -> dict[str, Any]:
    """Path of each child of a ModuleList or Sequential -> its structure, if it holds linear maps."""
    blocks: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for name, child in module.named_children():
                if next(child.children(), None) is not None:
                    prefix = f"{path}.{name}" if path else name
                    blocks[prefix] = (path, _structure(child, int(name) if name.isdigit() else -1))
    return blocks


def _structure(block: nn.Module, index: int) -> Any:
    """Everything that decides what a block computes, except its weights and its own index."""

    def scalars(module: nn.Module) -> tuple[Any, ...]:
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        return tuple(
            sorted(
                (k, "index" if v is not True and v == index else repr(v)) for k, v in plain.items()
            )
        )

    modules = tuple((name, type(m), scalars(m)) for name, m in block.named_modules())
    parameters = tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
    buffers = tuple((name, tuple(b.shape), b.dtype) for name, b in block.named_buffers())
    return modules, parameters, buffers
