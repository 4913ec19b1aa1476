"""A training step of both models: forward, backward and an update."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from upcycle.bench.measures import Subject, Tick
from upcycle.bench.timing import compared, interleaved
from upcycle.bench.whole import Call, text_of
from upcycle.capture.capture import ExampleInputs
from upcycle.data.text import is_language_model
from upcycle.util.modules import eval_mode
from upcycle.util.trees import results_in


def training_row(
    subject: Subject, count: int, parameters: Mapping[str, int], tick: Tick
) -> dict[str, Any]:
    """Training steps on a text of `count` tokens, or on one batch if the models read no text.

    The update is that of SGD with a learning rate of zero, so the weights stay.

    Args:
        parameters: ``dense``, ``converted`` and ``active``: what EfficientLLM's throughput of
            training is divided by.

    Returns:
        As a row of what is read, with ``tokens_per_second`` and ``per_parameter`` of each model;
        for ``active`` those of the converted model.
    """
    ids_BL = text_of(subject.dense, subject.evaluation, count)
    inputs = subject.evaluation.batches[0] if ids_BL is None else {"input_ids": ids_BL}
    models = subject.engine.models
    with torch.enable_grad(), eval_mode(*models.values()):
        calls = {name: trainer(model, inputs) for name, model in models.items()}
        found = interleaved(calls, seconds=subject.seconds)
    for model in models.values():
        model.zero_grad()
    tick()
    tokens = None if ids_BL is None else ids_BL.numel()
    row = {"tokens": tokens} | compared(found, {"dense": None, "converted": None})
    if tokens is not None:
        speed = {name: tokens / row[name]["median"] for name in ("dense", "converted")}
        of = {"dense": "dense", "converted": "converted", "active": "converted"}
        row["tokens_per_second"] = speed
        row["per_parameter"] = {name: speed[of[name]] / n for name, n in parameters.items()}
    return row


def trainer(model: nn.Module, inputs: ExampleInputs) -> Call:
    """A function that does one step; a language model learns the text, others a mean of zero."""
    model.train()
    trained = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.SGD(trained, lr=0.0)

    def step() -> None:
        if isinstance(inputs, Mapping):
            given: dict[str, Any] = dict(inputs)
            if is_language_model(model):
                given["labels"] = given["input_ids"]
            out = model(**given)
        else:
            out = model(*inputs)
        loss = getattr(out, "loss", None)
        if loss is None:
            tensors = [t for t in results_in(out) if isinstance(t, torch.Tensor)]
            loss = torch.stack(
                [t.float().square().mean() for t in tensors if t.requires_grad]
            ).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
