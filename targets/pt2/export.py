"""A converted model as a program of `torch.export`, whose layers are in one of two forms.

- ``portable``: operations of ATen alone, which any process with torch loads, and which its
  compilers take; each expert runs on its own tokens.
- ``fused``: the experts of a layer are one node, ``upcycle::moe``, so that our kernels run; to load
  it, a process imports upcycle first.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from upcycle.capture.capture import ExampleInputs
from upcycle.data.verification_inputs import cast_floats
from upcycle.errors import UnsupportedError, first_line
from upcycle.targets.traced.arguments import arguments_of, identifiers
from upcycle.targets.traced.axes import Axes, default_axes
from upcycle.targets.traced.cache import without_cache
from upcycle.targets.traced.experts import Form, experts_as
from upcycle.targets.traced.outputs import as_python, tensor_outputs
from upcycle.targets.traced.parts import Part, parts
from upcycle.util.modules import eval_mode, model_dtype, no_fast_path
from upcycle.util.quiet import quiet_logs

log = logging.getLogger(__name__)


def programs(
    model: nn.Module, example: ExampleInputs, form: Form = "portable", *, cache: bool = True
) -> Iterator[tuple[str, ExportedProgram]]:
    """The programs of `model` by the stems of their files, see `upcycle.targets.traced.parts`.

    Their inputs are named as the arguments of the model, and they return a dict of tensors, named
    as its outputs. They compute in the type of the model. Batch and length may vary, where the
    model's code lets them.

    Args:
        model: with layers of upcycle, or others whose experts are `Experts`.
        example: inputs of it.
        form: of the layers.
        cache: a model that generates text takes and returns its keys and values.

    Raises:
        UnsupportedError: `torch.export` cannot take the model.
    """
    model = as_python(model)
    given = arguments_of(model, cast_floats(example, model_dtype(model)))
    with without_cache(model), eval_mode(model), experts_as(model, form):
        for part in parts(model, given, cache=cache):
            yield part.stem, _program(model, part)


def _program(model: nn.Module, part: Part) -> ExportedProgram:
    names = list(part.example)
    words = dict(zip(names, identifiers(names), strict=True))
    axes = default_axes(part.example) if part.axes is None else part.axes
    inputs = {words[name]: tensor for name, tensor in part.example.items()}
    shapes = {words[name]: _dynamic(tensor, axes, name) for name, tensor in part.example.items()}
    with tensor_outputs(model, part.compute, words, as_dict=True), _quiet(), torch.no_grad():
        try:
            program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # any of the model's own, on the way through torch
            raise UnsupportedError(
                f"torch.export cannot take this model: {first_line(error)}"
            ) from error
    _check_axes(program, words, axes, required=part.axes is not None)
    return program


def _check_axes(
    program: ExportedProgram, words: Mapping[str, str], axes: Axes, *, required: bool
) -> None:
    """Refuse an axis that can only have one size if it is `required` to vary; else the log says so.

    Raises:
        UnsupportedError: there is one.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for name, word in words.items():
        for axis, label in axes.get(name, {}).items():
            value = values.get(word)
            if value is None or not isinstance(size := value.shape[axis], int):
                continue
            problem = f"axis {axis} ({label}) of input {name} can only be {size}"
            if required:
                raise UnsupportedError(f"{problem}: the model's code depends on it")
            log.warning("%s", problem)


def _dynamic(tensor: Tensor, axes: Axes, name: str) -> dict[int, Any]:
    return dict.fromkeys(axes.get(name, ()), Dim.AUTO)


@contextmanager
def _quiet() -> Iterator[None]:
    with quiet_logs("torch.export", "torch._export", "torch.fx"), no_fast_path():
        yield
