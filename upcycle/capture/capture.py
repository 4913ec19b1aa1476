"""Capture: record one ordinary forward of a model as a graph, without its arithmetic.

The model's own Python code runs on fake tensors (shapes and dtypes only), and every torch call that
returns a tensor becomes a node. Control flow, caches and keyword objects therefore just work. Only
what follows from integer inputs alone has values, see `upcycle.capture.concrete_values`. The graph
is a view to decide on: it is never executed.

Sibling blocks of a ModuleList or Sequential that have the same structure are recorded twice, so
that a region that crosses from one block to the next is seen; the further ones replay the shapes,
so the time does not grow with the depth of the model.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from upcycle.capture.graph_nodes import labelled
from upcycle.capture.recorder import Call, Program, Recorder, replayed_block
from upcycle.capture.recording import recording
from upcycle.capture.repeated_blocks import repeated_blocks
from upcycle.capture.source_lines import source_of
from upcycle.errors import CaptureError, ValueNeededError, first_line
from upcycle.layers.tap import has_hooks
from upcycle.util.copies import state_restored
from upcycle.util.trees import leaves_of, results_in

ExampleInputs = Mapping[str, Any] | tuple[Any, ...]


def capture(model: nn.Module, example: ExampleInputs, *, repeat_blocks: bool = True) -> Program:
    """Record one forward of `model`.

    A forward that draws random numbers to decide what to do, as layer drop in training does, is
    recorded in evaluation mode.

    Args:
        model: in any mode; its weights may be on the meta device. It is left as it was.
        example: keyword arguments, or a tuple of positional ones; of float tensors only shapes and
            dtypes matter.
        repeat_blocks: record at most two of equal sibling blocks.

    Raises:
        ValueNeededError: what the model does depends on values that are not known.
        CaptureError: the forward failed on fake tensors; the message has the operator's own words
            and the line of the model.
    """
    check_runs(model)
    try:
        with state_restored(model):
            try:
                return _record(model, example, repeat_blocks)
            except (DataDependentOutputException, DynamicOutputShapeException):
                if not model.training:
                    raise
        with state_restored(model):
            for module in model.modules():
                module.training = False
            return _record(model, example, repeat_blocks)
    except Exception as error:
        raise _refusal(model, example, error) from error


def check_runs(model: nn.Module) -> None:
    """Refuse a model that no inputs could run here."""
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    reason = None
    if isinstance(model, torch.jit.ScriptModule):
        reason = "it is a ScriptModule, whose operations are not seen; give the module that it was"
        reason += " made from"
    elif type(model).forward is nn.Module.forward and "forward" not in vars(model):
        reason = "it has no forward; give a module whose forward calls the method that is meant"
    elif lazy is not None:
        reason = f"its parameter `{lazy}` has no shape yet; run the model once first"
    if reason is not None:
        raise CaptureError(f"{type(model).__name__}: {reason}")


def _refusal(model: nn.Module, example: ExampleInputs, error: Exception) -> CaptureError:
    name, where = type(model).__name__, source_of(error)
    asked = "numpy() is not supported" in str(error)
    if asked or isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        call = next(iter(getattr(error, "__notes__", ())), "`numpy`" if asked else f"`{error}`")
        return ValueNeededError(
            f"{name}: {call} at {where} reads a value that depends on weights or float inputs; if "
            "it is only checked or logged, leave that out for the conversion, and if it decides "
            "what runs, replace it, as with torch.where, or convert a submodule that does without"
        )
    at = f" at {where}" if where else ""
    return CaptureError(
        f"{name}: the forward fails on example inputs {_describe(example)} "
        f"({type(error).__name__}{at}: {first_line(error)}); give inputs that it accepts with "
        "`example_inputs`"
    )


def _record(model: nn.Module, example: ExampleInputs, repeat_blocks: bool) -> Program:
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), fake_mode:
        tensors = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu")
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        }
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
    given = leaves_of((args, kwargs))
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: fake_mode.from_tensor(t.detach().cpu()), (args, kwargs)
    )
    fakes = leaves_of((args, kwargs))
    recorder = Recorder(tensors, fakes)
    named = example.items() if isinstance(example, Mapping) else enumerate(example)
    arguments = [str(name) for name, value in named for _ in leaves_of(value)]
    for node, argument in zip(recorder.graph.nodes, arguments, strict=True):
        node.meta["argument"] = argument
    integers = list(zip(fakes, given, strict=True))
    integers += [(tensors[name], buffer) for name, buffer in model.named_buffers()]
    for fake, real in integers:
        if not (real.is_floating_point() or real.is_complex() or real.is_meta):
            recorder.values.learn(fake, real.detach().cpu().clone())
    _watch_calls(model, recorder, repeated_blocks(model) if repeat_blocks else {})
    if isinstance(model, fx.GraphModule):
        model, recorder.program.is_graph = labelled(model, recorder), True
    with recording(), fake_mode, recorder:
        out = functional_call(model, tensors, args, kwargs, strict=False)
    recorder.graph.output(tuple(recorder.node_of(tensor) for tensor in results_in(out)))
    return recorder.program


def _describe(example: ExampleInputs) -> str:
    items = example.items() if isinstance(example, Mapping) else enumerate(example)
    shapes = (f"{k}: {list(v.shape) if isinstance(v, torch.Tensor) else v!r}" for k, v in items)
    return "{" + ", ".join(shapes) + "}"


def _watch_calls(model: nn.Module, recorder: Recorder, blocks: Mapping[str, Any]) -> None:
    """Note for each module what went in and out, and replay blocks that were recorded twice.

    The forward of each instance is wrapped; `state_restored` takes the wrappers away.
    """
    recorded: Counter[Any] = Counter()
    templates: dict[Any, tuple[str, Any]] = {}

    def watch(path: str, module: nn.Module) -> None:
        forward = module.forward
        hooked = any(has_hooks(inner) for inner in module.modules() if inner is not module)

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            inputs = recorder.nodes_of((args, kwargs))
            is_block = path in blocks
            key = (blocks[path], _call_structure(args, kwargs, recorder)) if is_block else None
            replayed = is_block and recorded[key] >= 2
            start, done, before = (
                len(recorder.graph.nodes),
                len(recorder.changes),
                vars(module).copy(),
            )
            if replayed:
                template, out = templates[key]
                out = pytree.tree_map_only(torch.Tensor, lambda t: t.new_empty(t.shape), out)
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
            if any(vars(module).get(name, module) is not value for name, value in before.items()):
                recorder.changes.append(0)
            plain = (
                len(args) == 1
                and not kwargs
                and all(isinstance(tree, torch.Tensor) for tree in (*args, out))
                and not hooked
                and all(number > start for number in recorder.changes[done:])
            )
            outputs = tuple(recorder.nodes_of(out))
            span = (start, len(recorder.graph.nodes))
            call = Call(tuple(inputs), outputs, plain, replayed, span)
            recorder.program.calls.setdefault(path, []).append(call)
            return out

        module.forward = watched

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            watch(path, module)


def _call_structure(args: Any, kwargs: Any, recorder: Recorder) -> Any:
    """What decides how a block runs, of the arguments: shapes, known values, types of the rest."""
    leaves, form = pytree.tree_flatten((args, kwargs))

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (tuple(value.shape), value.dtype, recorder.values.content(value))
        plain = value is None or isinstance(value, bool | int | float | str)
        return repr(value) if plain else type(value)

    return str(form), tuple(leaf(value) for value in leaves)
