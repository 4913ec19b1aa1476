"""Does the file compute what the module computes?"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.onnx.run import session
from upcycle.targets.traced.outputs import named_tensors

Inputs = Mapping[str, Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class Difference:
    """The largest ``|file - module|`` and the largest ``|module|``, over all float outputs."""

    max_abs_error: float
    max_reference: float


def compare_with_torch(path: Path, model: nn.Module, inputs: Sequence[Inputs]) -> list[Difference]:
    """Run the file and the module on each of `inputs`; one result for each.

    Args:
        path: a file that `export_onnx` wrote.
        model: the module that it was written from.
        inputs: arguments of the module: by name, or in the order of the inputs of the file.
    """
    runner = session(path)
    names = [i.name for i in runner.get_inputs()]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        return [_compare(runner, names, model, given) for given in inputs]
    finally:
        for module, mode in modes.items():
            module.training = mode


def _compare(runner: Any, names: Sequence[str], model: nn.Module, given: Inputs) -> Difference:
    args, kwargs = ((), given) if isinstance(given, Mapping) else (given, {})
    feeds = dict(zip(names, (*args, *kwargs.values()), strict=False))
    feeds |= {name: kwargs[name] for name in names if name in kwargs}
    actual = runner.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = named_tensors(model(*args, **kwargs)).values()
    error, reference = 0.0, 0.0
    for got, want in zip(actual, expected, strict=True):
        if want.is_floating_point() and want.numel():
            difference = torch.from_numpy(got).double() - want.double()
            error = max(error, difference.abs().max().item())
            reference = max(reference, want.abs().max().item())
    return Difference(error, reference)
