"""The architectures of the zoo as programs of `torch.export`, and what converting one shows."""

from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from zoo_facts import ARCHITECTURES, SPLIT_ALL

import upcycle
from upcycle.capture.capture import ExampleInputs
from upcycle.capture.guess_inputs import find_example, randomised
from upcycle.conversion.api import Conversion
from upcycle.targets.traced.cache import without_cache


@dataclass(frozen=True)
class Converted:
    """One architecture, converted from its module and from its program.

    Attributes:
        model, inputs: the dense module, and inputs of it.
        direct, indirect: the two conversions.
        error: of the second's first output, over the largest of the dense model.
    """

    model: nn.Module
    inputs: ExampleInputs
    direct: Conversion
    indirect: Conversion
    error: float

    @property
    def missing(self) -> list[str]:
        """The FFNs that only the module shows."""
        found = {ffn.path for ffn in self.indirect.plan.located.ffns}
        return [ffn.path for ffn in self.direct.plan.located.ffns if ffn.path not in found]

    @property
    def unequal(self) -> list[str]:
        """The weights that are not the same, bit for bit, or that only the module's has."""
        ours, theirs = self.indirect.model.state_dict(), self.direct.model.state_dict()
        tensors = {name: t for name, t in theirs.items() if isinstance(t, torch.Tensor)}
        return [
            name
            for name, tensor in tensors.items()
            if name in dict(self.direct.model.named_parameters())
            and (name not in ours or not torch.equal(tensor, ours[name]))
        ]


def model_and_inputs(name: str) -> tuple[nn.Module, ExampleInputs]:
    """The dense model of an architecture, and random inputs."""
    case = ARCHITECTURES[name]
    model = zoo.drawn(case)
    example = case.example() if case.example else find_example(model)[0]
    return model, randomised(example, vocabulary=zoo.VOCABULARY, seed=1)


def exported(model: nn.Module, inputs: ExampleInputs) -> ExportedProgram:
    """The program of a model, with as many axes that may vary as torch finds."""
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))

    def every_axis(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        return {axis: Dim.AUTO for axis, size in enumerate(value.shape) if size > 1}

    shapes = pytree.tree_map(every_axis, (*args, *kwargs.values()))
    if kwargs:
        shapes = dict(zip(kwargs, shapes, strict=True))
    with without_cache(model), torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def converted(name: str, program: ExportedProgram | None = None) -> Converted:
    """Split every FFN of an architecture, as a module and as a program."""
    model, inputs = model_and_inputs(name)
    program = exported(model, inputs) if program is None else program
    direct = upcycle.convert(model, SPLIT_ALL, inputs, verify=False)
    indirect = upcycle.convert(program, SPLIT_ALL, verify=False)
    with torch.no_grad():
        expected = zoo.run(model, inputs)
        actual = zoo.run(indirect.model, inputs)
    error = (actual - expected).abs().max() / expected.abs().max()
    return Converted(model, inputs, direct, indirect, float(error))
