"""What the FFNs of an ONNX file are given on calibration data, fetched from ONNX Runtime."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from upcycle.data.calibration import CalibrationData
from upcycle.data.calibration_files import CalibrationInput
from upcycle.data.default_data import EXAMPLE, RANDOM, for_calibration
from upcycle.data.text import SEQUENCE, sequences
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.models.onnx_file import OnnxSource
from upcycle.models.tokenizer import tokenizer_in
from upcycle.onnx.inputs import Array, draw_inputs, given_inputs
from upcycle.onnx.run import fetch
from upcycle.passes.calibrate.calibrate import joined
from upcycle.passes.calibrate.sites import tokens_of
from upcycle.recipe.schema import Recipe

BATCHES = 4
ROWS = 8  # of one batch, if the file leaves it open
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}

Feeds = Mapping[str, Array]


def inputs_of_ffn(spec: MoESpec, source: OnnxSource, batches: Sequence[Any]) -> FFNInputs:
    """What one FFN is given; the file is run up to it. Memory: the inputs of this FFN.

    Raises:
        UnsupportedError: the FFN is inside a branch or a loop, or the file cannot be run.
    """
    regions = source.found.regions[spec.ffn.path]
    if any(region.inside for region in regions):
        raise UnsupportedError(
            f"{spec.ffn.path}: it is inside a branch or a loop of the graph, where its inputs "
            "cannot be had; leave it out with `layers.exclude`, or use another recipe"
        )
    parts = []
    fetched = fetch(source.path, batches, [region.x_name for region in regions])
    for feeds, arrays in zip(batches, fetched, strict=True):
        batch = {name: torch.from_numpy(array) for name, array in feeds.items()}
        for array in arrays:
            x = torch.from_numpy(array).movedim(spec.ffn.axis, -1)
            parts.append(tokens_of(batch, x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1]), None))
    return joined(parts)


def onnx_calibration(
    source: OnnxSource, recipe: Recipe, given: CalibrationInput | None
) -> CalibrationData:
    """Inputs for the file, from what verification does not read.

    Without `given` texts or tensors: the inputs that the user gave for the capture; else three
    quarters of the documentation of Python if there is a tokenizer beside the file; else random
    inputs.

    Raises:
        UsageError: the file reads something else, or the data is too short.
    """
    make = partial(CalibrationData, from_dense=True)
    names = {str(value.name) for value in source.model.graph.inputs}
    is_text = "input_ids" in names and names <= _TEXT
    tokenizer = tokenizer_in(source.directory) if is_text else None
    if given is None and source.example is not None:
        return make([given_inputs(source.model, source.example)], EXAMPLE)
    if given is None and tokenizer is None:
        seeds = range(recipe.seed + 1000, recipe.seed + 1000 + BATCHES)
        return make([draw_inputs(source.model, seed=seed) for seed in seeds], RANDOM)
    given = for_calibration(given, with_code=False)
    if given.tensors is not None:
        return make(_batches(source, given.tensors), given.what)
    if not given.texts:
        raise UsageError(
            "`calibration`: for an ONNX file give a text, if its tokenizer is beside it, or tensors"
        )
    if tokenizer is None:
        raise UsageError(
            f"`calibration`: a text needs a tokenizer, and there is none beside {source.path.name} "
            "that fits its inputs; give tensors by the names of the inputs"
        )
    length, most = _fixed(source, "input_ids", 1) or SEQUENCE, recipe.calibration.tokens
    ids = sequences(tokenizer, given.texts, length, most=most, is_running=True)
    if not ids:
        raise UsageError(
            f"`calibration`: the text has less than one sequence of {length} tokens; give more"
        )
    ids_NL = torch.tensor(ids)
    everything = {
        "input_ids": ids_NL,
        "attention_mask": torch.ones_like(ids_NL),
        "token_type_ids": torch.zeros_like(ids_NL),
        "position_ids": torch.arange(length).expand_as(ids_NL),
    }
    return make(_batches(source, {name: everything[name] for name in names}), given.what)


def verification_feeds(source: OnnxSource, given: CalibrationInput | None) -> Feeds | None:
    """The first of the tensors that the user gave and calibration does not see, or None."""
    if given is None or given.tensors is None:
        return None
    return _batches(source, given.parts()[0].tensors or {})[0]


def _batches(source: OnnxSource, tensors: Mapping[str, torch.Tensor]) -> list[Feeds]:
    names = [str(value.name) for value in source.model.graph.inputs]
    if lacking := sorted(set(names) - set(tensors)):
        raise UsageError(
            f"`calibration`: {lacking[0]} is missing; the inputs are {', '.join(names)}"
        )
    fixed = next((size for name in names if (size := _fixed(source, name, 0))), None)
    rows, count = fixed or ROWS, len(tensors[names[0]])
    count = count // rows * rows if fixed else count
    if not count:
        raise UsageError(f"`calibration`: the file reads {rows} examples at once; give as many")
    split = {name: torch.split(tensors[name][:count], rows) for name in names}
    return [
        given_inputs(source.model, {name: pieces[i].numpy() for name, pieces in split.items()})
        for i in range(-(-count // rows))
    ]


def _fixed(source: OnnxSource, name: str, axis: int) -> int | None:
    """The size of an axis of an input, if the file fixes it."""
    value = next(value for value in source.model.graph.inputs if value.name == name)
    if value.shape is None or axis >= len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) and size > 0 else None
