"""The engines that run both models: torch and ONNX Runtime."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.bench import onnx_models, whole
from upcycle.bench.layers import Pair, pair
from upcycle.bench.whole import Call
from upcycle.capture.capture import ExampleInputs
from upcycle.data.text import is_language_model
from upcycle.data.verification_inputs import Evaluation
from upcycle.errors import UsageError
from upcycle.ir.spec import MoESpec
from upcycle.onnx.external_data import stored_bytes
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.file_names import ENCODER, MODEL
from upcycle.targets.traced.cache import cache_argument

log = logging.getLogger(__name__)
Calls = dict[str, Call]  # "dense" and "converted"


@dataclass(frozen=True)
class Engine:
    """Both models, and the layers that can be run by themselves.

    Attributes:
        models: ``dense`` and ``converted``, as `reader` and `writer` take them.
        makers: what makes each of them in another process.
        reader: a model and its inputs -> a call that runs it.
        writer: a model and ids [B, L] of a prompt -> a call that writes the next token; None if
            they write no text.
        last_logits_only: reading a text makes the logits of its last token alone.
        disk: bytes of the files of each model, if they are others than those of the checkpoint.
    """

    pairs: list[Pair]
    models: Mapping[str, Any]
    makers: Mapping[str, Callable[[], Any]]
    reader: Callable[[Any, ExampleInputs], Call]
    writer: Callable[[Any, torch.Tensor], Call] | None
    last_logits_only: bool
    disk: Mapping[str, int] | None = None

    def read(self, inputs: ExampleInputs) -> Calls:
        """Calls that run both models on `inputs`."""
        return {name: self.reader(model, inputs) for name, model in self.models.items()}

    def write(self, ids_BL: torch.Tensor) -> Calls | None:
        """Calls that write the next token after a prompt."""
        if self.writer is None:
            return None
        return {name: self.writer(model, ids_BL) for name, model in self.models.items()}


def torch_engine(
    dense: nn.Module,
    converted: nn.Module,
    specs: Sequence[MoESpec],
    makers: Mapping[str, Callable[[], Any]],
) -> Engine:
    """Both models in torch; `specs` are the layers to run by themselves."""
    is_writer = is_language_model(dense)
    return Engine(
        pairs=[pair(dense, converted, spec) for spec in specs],
        models={"dense": dense, "converted": converted},
        makers=makers,
        reader=whole.reader,
        writer=whole.writer if is_writer and cache_argument(dense) else None,
        last_logits_only=is_writer and whole.only_last(dense),
    )


def onnx_engine(
    dense: nn.Module,
    converted: nn.Module,
    directory: Path,
    specs: Sequence[MoESpec],
    evaluation: Evaluation,
    *,
    folder: Path,
    threads: int,
) -> Engine:
    """Both models in ONNX Runtime; `specs` are the layers to run by themselves.

    The converted file is in `directory`; the dense model is exported into `folder`, with the first
    batch of `evaluation` as its example.
    """
    file = directory / MODEL
    ours = onnx_models.opened(file, threads)
    options = Onnx(cache=onnx_models.has_cache(ours))
    dense_file = onnx_models.write_dense(folder, dense, evaluation, options)
    runners = {"dense": onnx_models.opened(dense_file, threads), "converted": ours}
    files = {"dense": dense_file, "converted": file}
    makers = {name: partial(onnx_models.opened, path, threads) for name, path in files.items()}
    pairs = []
    for spec in specs:
        ffn = spec.ffn
        ends = (ffn.expansions[0].module, ffn.contraction.module)
        before = onnx_models.layer(dense_file, *ends, threads)
        after = onnx_models.layer(file, ffn.place, ffn.place, threads)
        if before is None or after is None:
            log.warning("%s: the ONNX graph does not show it apart; not measured", ffn.path)
        else:
            pairs.append(replace(pair(dense, converted, spec), dense=before, converted=after))
    writer = onnx_models.writer if all(map(onnx_models.has_cache, runners.values())) else None
    disk = {name: stored_bytes(path) for name, path in files.items()}
    return Engine(pairs, runners, makers, onnx_models.reader, writer, False, disk)


def check_file(directory: Path) -> None:
    """Raise UsageError unless one ONNX file is the whole model."""
    if not (directory / MODEL).is_file():
        is_pair = (directory / ENCODER).is_file()
        more = " (an encoder and a decoder apart are not measured)" if is_pair else ""
        raise UsageError(
            f"{directory}: no {MODEL} is here{more}; convert with `targets=onnx`, or use "
            "`engine=torch`"
        )
