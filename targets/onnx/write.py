"""Write the ONNX files of a converted model, beside its checkpoint."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.verification_inputs import cast_floats
from upcycle.errors import UnsupportedError
from upcycle.layers.moe import MoE
from upcycle.recipe.onnx import ONNX_DEFAULTS, Onnx
from upcycle.targets.files.stored import Stored
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.traced.arguments import Arguments, arguments_of
from upcycle.targets.traced.cache import PAST, without_cache
from upcycle.targets.traced.parts import Part, parts
from upcycle.util.modules import device_of, eval_mode, model_dtype

log = logging.getLogger(__name__)


def write_onnx(
    directory: Path,
    model: nn.Module,
    example: ExampleInputs,
    stored: Mapping[str, Stored],
    options: Onnx = ONNX_DEFAULTS,
) -> list[Path]:
    """Write the ONNX files of a model, as `in_float32` returns it, beside its checkpoint.

    They read the weights of the checkpoint where they are the same. A model that generates text
    gets files with a cache; see `upcycle.targets.traced.parts`. Returns the files.

    Raises:
        UnsupportedError: torch cannot export the model.
    """
    try:
        given = in_graph(model, example)
        if given.chosen:
            constants = ", ".join(f"{name}={value!r}" for name, value in given.chosen.items())
            log.warning("the ONNX file computes with %s, as the example inputs say", constants)
        with without_cache(model), eval_mode(model):
            return [
                export_onnx(
                    model,
                    part.example,
                    path=directory / f"{part.stem}.onnx",
                    stored=stored,
                    dynamic=part.axes,
                    compute=part.compute,
                    options=options.model_copy(update={"tokens": _tokens(options, part)}),
                )
                for part in parts(model, given, cache=options.cache)
            ]
    except UnsupportedError as error:
        raise UnsupportedError(
            f"`targets=onnx`: {error}; `targets=safetensors` alone writes the checkpoint"
        ) from error


def _tokens(options: Onnx, part: Part) -> int | tuple[int, int] | None:
    """Of typical calls: with a cache one reads a text, and the others write a token each."""
    has_cache = any(name.startswith(f"{PAST}.") for name in part.example)
    return options.tokens or ((1, 256) if has_cache else None)


def in_float32(model: nn.Module, *, rounded_routers: bool = False) -> nn.Module:
    """The model in the type and on the device that ONNX Runtime has everywhere; a copy if needed.

    With `rounded_routers` the checkpoint holds the routers in the dtype of the other weights.

    Raises:
        UnsupportedError: its weights are float64.
    """
    dtype = model_dtype(model)
    if dtype == torch.float32 and device_of(model).type == "cpu":
        return model
    if dtype == torch.float64:
        raise UnsupportedError("`targets=onnx` computes in float32; convert with `dtype=float32`")
    model = copy.deepcopy(model)
    if rounded_routers:
        for module in model.modules():
            if isinstance(module, MoE):
                module.router.to(dtype)
    return model.to(device="cpu", dtype=torch.float32)


def in_graph(model: nn.Module, example: ExampleInputs) -> Arguments:
    """The arguments of `model` as its graph has them, floats in float32.

    Raises:
        UnsupportedError: a graph cannot have one of them.
    """
    return arguments_of(model, cast_floats(example, torch.float32))
