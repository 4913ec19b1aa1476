"""Text from a mixture of experts, with its routing or with another."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from upcycle.errors import UnsupportedError
from upcycle.operations.adapters import adapters as served
from upcycle.operations.contrast import SelfContrast
from upcycle.operations.expert_adapter import ExpertAdapter
from upcycle.routing.override import Expert, override
from upcycle.routing.steering import Steering
from upcycle.util.modules import device_of, eval_mode


@dataclass(frozen=True)
class Contrast:
    """The arguments of `SelfContrast`."""

    ranks: tuple[int, ...] = (2,)
    alpha: float = 0.1
    beta: float = 0.5


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    k: int | None = None,
    suppress: Sequence[Expert] = (),
    force: Sequence[Expert] = (),
    steering: Steering | None = None,
    contrast: Contrast | None = None,
    adapters: Sequence[ExpertAdapter] = (),
    adapter_ids: Sequence[int] = (0,),
) -> list[str]:
    """What `model` writes after each of the prompts, which are read together.

    Args:
        model: a decoder of transformers, or an encoder-decoder.
        tokenizer: that of the model.
        temperature: of the samples; 0 takes the best token each time.
        seed: of the samples.
        k, suppress, force: as for `upcycle.override`.
        contrast: decode by it.
        adapters, adapter_ids: as for `upcycle.adapters`, an id for each prompt.

    Raises:
        UnsupportedError: the model does not generate.
        UsageError: as `upcycle.override` and `SelfContrast`.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedError(f"{type(model).__name__} does not generate text; give one that does")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(device_of(model))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    more: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": tokenizer.pad_token_id}
    if temperature > 0:
        more["temperature"] = temperature
    with ExitStack() as stack, torch.random.fork_rng(), torch.no_grad():
        stack.enter_context(eval_mode(model))
        torch.manual_seed(seed)
        if steering is not None:
            stack.enter_context(steering.on(model))
        if k is not None or suppress or force:
            stack.enter_context(override(model, k=k, suppress=suppress, force=force))
        if adapters:
            stack.enter_context(served(model, adapters, adapter_ids))
        if contrast is not None:
            more["logits_processor"] = [SelfContrast(model, inputs, **vars(contrast))]
        made = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=max_new_tokens, **more
        )
    first = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(made[:, first:], skip_special_tokens=True)
    return texts
