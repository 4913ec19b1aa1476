"""Prompts, one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from upcycle.data.calibration_files import read_calibration
from upcycle.errors import UsageError
from upcycle.routing.steering import Steering, found_by
from upcycle.routing.trace import trace
from upcycle.util.modules import device_of, eval_mode


def read_prompts(path: Path, field: str = "text") -> tuple[str, ...]:
    """The prompts of a file: its lines that are not empty, or the texts of its records.

    Raises:
        UsageError: there is no such file, or no prompt in it.
    """
    given = read_calibration([str(path)], field=field)
    texts = given.texts if path.suffix == ".jsonl" else tuple("".join(given.texts).splitlines())
    prompts = tuple(text for text in texts if text.strip())
    if not prompts:
        raise UsageError(f"{path}: there is no prompt in it; write one on each line")
    return prompts


@torch.no_grad()
def steering(
    model: nn.Module,
    tokenizer: Any,
    *,
    toward: Sequence[str],
    others: Sequence[str],
    top: int = 10,
    action: Literal["suppress", "force"] = "suppress",
    about: str = "",
    done: Callable[[int, int], None] = lambda at, of: None,
) -> Steering:
    """The experts of a behaviour, by prompts that show it and `others` that do not.

    Args:
        model: reads ``input_ids``.
        tokenizer: that of the model.
        toward: prompts of the behaviour.
        top, action, about: as for `found_by`.
        done: is told of each prompt.

    Raises:
        UsageError: as `found_by`.
    """
    prompts = [*toward, *others]
    with eval_mode(model), trace(model) as seen:
        for at, prompt in enumerate(prompts):
            tokens = tokenizer(prompt, return_tensors="pt", truncation=True)
            model(input_ids=tokens["input_ids"].to(device_of(model)))
            done(at + 1, len(prompts))
    classes = ("toward",) * len(toward) + ("other",) * len(others)
    return found_by(
        replace(seen.result(), classes=classes), "toward", top=top, action=action, about=about
    )
