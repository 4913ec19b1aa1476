"""A program of `torch.export` as a module whose graph can be read and rewritten."""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from upcycle.capture.capture import ExampleInputs


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """What the program computes, with its parameters and buffers under the names that they had.

    It can be called as the program's own `module`, with other batches and lengths where the program
    allows that, and has the mode that its graph was exported in, whatever ``training`` says.
    """
    unlifted = program.module(check_guards=False)
    return fx.GraphModule(unlifted, unlifted.graph, _class_name(program))


def _class_name(program: ExportedProgram) -> str:
    """The class of the module that was exported, as the graph notes it."""
    for node in program.graph.nodes:
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        for path, kind in (found for found in stack.values() if isinstance(found, tuple)):
            name = str(getattr(kind, "__qualname__", kind)).rpartition(".")[2]
            if not path and name.isidentifier():
                return name
    return "GraphModule"


def example_of(program: ExportedProgram) -> ExampleInputs | None:
    """The inputs that it was exported with, or others of their shapes; None if it has neither."""
    given = program.example_inputs or _of_shapes(program)
    signature = program.module_call_graph[0].signature
    if given is None or signature is None:
        return None
    args, kwargs = given
    names = signature.forward_arg_names or []
    if not kwargs:
        return tuple(args)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _of_shapes(program: ExportedProgram) -> tuple[Any, Any] | None:
    """Numbers in the shapes that the graph notes for its inputs; None if some are no tensors."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    leaves = [values.get(name) for name in program.graph_signature.user_inputs]
    fakes = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    signature = program.module_call_graph[0].signature
    if signature is None or len(fakes) < len(leaves):
        return None
    args, kwargs = pytree.tree_unflatten([_like(fake) for fake in fakes], signature.in_spec)
    return args, kwargs


def _like(fake: torch.Tensor) -> torch.Tensor:
    """Ones of integers, for they may be ids; random floats."""
    sizes = [size if isinstance(size, int) else int(size.node.hint or 2) for size in fake.shape]
    if fake.is_floating_point():
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(fake.dtype)
    return torch.ones(sizes, dtype=fake.dtype)
