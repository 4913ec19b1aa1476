"""Tier T2 of verification: a whole model against another one."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.text import is_language_model
from upcycle.data.verification_inputs import NEW_TOKENS, Evaluation, evaluation_for, outputs_of
from upcycle.errors import VerificationError
from upcycle.ir.measured import Check, Distance, ModelDistance
from upcycle.ir.rounding import ROUNDING
from upcycle.recipe.schema import Recipe
from upcycle.util.modules import device_of, eval_mode
from upcycle.verification.checks import END_TO_END, check
from upcycle.verification.metrics import check_outputs, compare_predictions, distance


def verify(
    dense: nn.Module, converted: nn.Module, inputs: ExampleInputs | None = None
) -> ModelDistance:
    """How far `converted` is from `dense` on `inputs` (guessed and random if None).

    Both are run in eval mode and left in the mode that they had.

    Raises:
        VerificationError: the outputs have different names or shapes.
    """
    with eval_mode(dense, converted):
        return compare_models(dense, converted, evaluation_for(dense, example=inputs))


def compare_models(
    reference: nn.Module, other: nn.Module, evaluation: Evaluation, *, predictions: bool = True
) -> ModelDistance:
    """The distance of every output, on the batch where it is worst, and of predictions.

    Raises:
        VerificationError: the outputs have different names or shapes.
    """
    outputs: dict[str, Distance] = {}
    for batch in evaluation.batches:
        ours, theirs = outputs_of(other, batch), outputs_of(reference, batch)
        check_outputs(ours, theirs, "the converted model")
        for name, tensor in theirs.items():
            found = output_distance(name, ours[name], tensor)
            if name not in outputs or found.relative > outputs[name].relative:
                outputs[name] = found
    if not outputs:
        raise VerificationError("the model returns no float tensor that could be compared")
    language = None
    if predictions and evaluation.windows is not None and is_language_model(reference):
        language = compare_predictions(
            (next_tokens(reference, tokens), next_tokens(other, tokens), tokens)
            for tokens in torch.split(evaluation.windows, 1)
        )
    worst = max(found.relative for found in outputs.values())
    return ModelDistance(evaluation.what, outputs, worst, language)


def output_distance(name: str, ours: torch.Tensor, reference: torch.Tensor) -> Distance:
    """How far an output is from its reference; for scores also whether the largest are the same."""
    found = distance(ours, reference)
    if not name.endswith("logits") or reference.dim() < 2:
        return found
    same_B = ours.argmax(-1) == reference.argmax(-1)
    return replace(found, top1_agreement=same_B.double().mean().item())


def next_tokens(model: nn.Module, ids_BS: torch.Tensor) -> torch.Tensor:
    """The scores [B, S, V] of a language model for tokens [B, S], on the CPU."""
    return outputs_of(model, {"input_ids": ids_BS, "use_cache": False})["logits"].cpu()


def end_to_end(found: ModelDistance, recipe: Recipe, dtype: torch.dtype) -> Check:
    """A distance from the dense model against what the recipe allows, never less than rounding."""
    allowed = max(recipe.verify.max_relative_error, ROUNDING[dtype])
    return check(END_TO_END, found.relative, allowed)


def same_greedy_text(reference: nn.Module, other: nn.Module, evaluation: Evaluation) -> bool | None:
    """Whether both generate the same tokens after each prompt; None where they do not generate."""
    if not evaluation.prompts or not is_language_model(reference):
        return None

    def generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
        prompt = prompt.to(device_of(model))
        with torch.no_grad():
            tokens: torch.Tensor = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return tokens.cpu()

    return all(
        torch.equal(generate(reference, prompt), generate(other, prompt))
        for prompt in evaluation.prompts
    )
