"""What runs the two models: torch, or ONNX Runtime."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from upcycle.bench import onnx_models, whole
from upcycle.bench.layers import Pair, pair
from upcycle.bench.whole import Call
from upcycle.capture.capture import ExampleInputs
from upcycle.data.evaluation import Evaluation
from upcycle.data.text import is_language_model
from upcycle.errors import UsageError
from upcycle.ir.spec import MoESpec
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.cache import cache_argument
from upcycle.targets.onnx.parts import ENCODER, MODEL

log = logging.getLogger(__name__)
Calls = dict[str, Call]  # "dense" and "converted"


@dataclass(frozen=True)
class Engine:
    """Both models, ready to run.

    Attributes:
        pairs: layers that can be run by themselves.
        read: inputs -> calls of both models.
        write: ids [B, L] of a prompt -> calls that write the next token; None if they write none.
        last_logits_only: reading a text makes the logits of its last token and no others.
    """

    pairs: list[Pair]
    read: Callable[[ExampleInputs], Calls]
    write: Callable[[torch.Tensor], Calls] | None
    last_logits_only: bool


def torch_engine(dense: nn.Module, converted: nn.Module, specs: Sequence[MoESpec]) -> Engine:
    """Both models in torch; `specs` are the layers to run by themselves."""
    models = {"dense": dense, "converted": converted}

    def read(inputs: ExampleInputs) -> Calls:
        return {name: whole.reader(model, inputs) for name, model in models.items()}

    def write(ids_BL: torch.Tensor) -> Calls:
        return {name: whole.writer(model, ids_BL) for name, model in models.items()}

    is_writer = is_language_model(dense)
    return Engine(
        pairs=[pair(dense, converted, spec) for spec in specs],
        read=read,
        write=write if is_writer and cache_argument(dense) else None,
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
    """Both models in ONNX Runtime.

    Args:
        dense, converted: the same in torch; the dense one is exported.
        directory: of the converted model.
        specs: the layers to run by themselves.
        evaluation: gives the example of the export.
        folder: for the dense file.
        threads: of ONNX Runtime.

    Raises:
        UsageError: there is no file.
    """
    check_file(directory)
    ours = onnx_models.opened(directory / MODEL, threads)
    options = Onnx(cache=onnx_models.has_cache(ours))
    files = {
        "dense": onnx_models.write_dense(folder, dense, evaluation, options),
        "converted": directory / MODEL,
    }
    runners = {"dense": onnx_models.opened(files["dense"], threads), "converted": ours}
    pairs = []
    for spec in specs:
        inside, ffn = pair(dense, converted, spec), spec.ffn
        place = spec.ffn.place
        ends = (ffn.expansions[0].module, ffn.contraction.module)
        found = {
            "dense": onnx_models.layer(files["dense"], *ends, threads),
            "converted": onnx_models.layer(files["converted"], place, place, threads),
        }
        if found["dense"] is None or found["converted"] is None:
            log.warning("%s: the ONNX graph does not show it apart; not measured", ffn.path)
            continue
        pairs.append(replace(inside, dense=found["dense"], converted=found["converted"]))

    def read(inputs: ExampleInputs) -> Calls:
        return {name: onnx_models.reader(runner, inputs) for name, runner in runners.items()}

    def write(ids_BL: torch.Tensor) -> Calls:
        return {name: onnx_models.writer(runner, ids_BL) for name, runner in runners.items()}

    is_writer = all(onnx_models.has_cache(runner) for runner in runners.values())
    return Engine(pairs, read, write if is_writer else None, last_logits_only=False)


def check_file(directory: Path) -> None:
    """Raises UsageError if there is no ONNX file that is the whole model."""
    if not (directory / MODEL).is_file():
        more = " (an encoder and a decoder apart are not measured)" if _is_pair(directory) else ""
        raise UsageError(
            f"{directory}: no {MODEL} is here{more}; convert with --target onnx, or use --engine "
            "torch"
        )


def _is_pair(directory: Path) -> bool:
    return (directory / ENCODER).is_file()
