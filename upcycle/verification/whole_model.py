"""Verify: how far the converted model is from the dense one, in tiers.

- T0 each row of each expert is traced to the dense row that it came from, bit for bit.
- T1 each converted layer against its dense FFN, on the activations that it gets in the model; for
  split methods also with all experts at weight one, which must be exact; and with distinct experts
  against a plain loop over them.
- T2 the whole model: outputs, and for language models predictions and perplexity.
- T3 the written files, loaded as a user would load them.
- T4 ONNX Runtime against PyTorch.

A report is plain data; `checks` lists what was compared with what was allowed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.evaluation import NEW_TOKENS, Evaluation, evaluation_for, outputs_of
from upcycle.data.text import is_language_model
from upcycle.errors import VerificationError
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import Provenance
from upcycle.layers.moe import MoE
from upcycle.recipe.schema import Recipe
from upcycle.util.eval_mode import eval_mode
from upcycle.util.module_facts import device_of, model_dtype
from upcycle.verification.checks import END_TO_END, Check
from upcycle.verification.layers import layer_checks, layer_report, random_tokens
from upcycle.verification.metrics import ROUNDING, LanguageModelDistance, distance


def budget(recipe: Recipe, dtype: torch.dtype) -> float:
    """The end to end error that the recipe allows, but never less than rounding."""
    return max(recipe.verify.max_relative_error, ROUNDING[dtype])


def verify(
    dense: nn.Module, converted: nn.Module, inputs: ExampleInputs | None = None
) -> dict[str, Any]:
    """How far `converted` is from `dense` on `inputs` (guessed and random if None).

    Both are run in eval mode and left in the mode that they were in.

    Returns:
        `outputs`: for each output the largest absolute, relative and root-mean-square error and
        the cosines; `relative`: the largest of the relative errors.

    Raises:
        VerificationError: the outputs have different names or shapes.
    """
    with eval_mode(dense, converted):
        return compare_models(dense, converted, evaluation_for(dense, example=inputs))


def verify_layers(
    dense: nn.Module,
    converted: nn.Module,
    layers: list[tuple[MoESpec, MoE]],
    provenance: Mapping[str, Provenance],
    evaluation: Evaluation,
    sources: Sequence[Mapping[str, torch.Tensor]] = (),
) -> tuple[list[dict[str, Any]], list[Check]]:
    """Tiers T0 and T1.

    Args:
        provenance: FFN path -> the dense neurons behind its layer.
        sources: tensors of the models that experts were taken from, if there are several.
    """
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    rows: list[dict[str, Any]] = []
    with _router_inputs([layer for _, layer in layers]) as seen:
        outputs_of(converted, evaluation.batches[0])
    for spec, layer in layers:
        x_TD = seen.get(layer)
        row = {} if x_TD is not None else {"inputs": "random tokens"}  # the inputs do not reach it
        if x_TD is None:
            x_TD = random_tokens(spec, layer)
        origin = provenance.get(spec.ffn.path)
        rows.append(layer_report(spec, layer, x_TD, parameters, origin, sources) | row)
    return rows, list(layer_checks(rows, model_dtype(dense)))


@contextmanager
def _router_inputs(layers: list[MoE]) -> Iterator[dict[MoE, torch.Tensor]]:
    """The tokens [T, D] that each layer was last given."""
    seen: dict[MoE, torch.Tensor] = {}

    def remember(layer: MoE) -> Callable[..., None]:
        return lambda _, args: seen.__setitem__(layer, args[0].detach())

    handles = [layer.router.register_forward_pre_hook(remember(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare_models(
    reference: nn.Module, other: nn.Module, evaluation: Evaluation, *, predictions: bool = True
) -> dict[str, Any]:
    """Tier T2: the distance of every output, the worst of them, and of predictions."""
    outputs: dict[str, dict[str, float]] = {}
    for batch in evaluation.batches:
        ours, theirs = outputs_of(other, batch), outputs_of(reference, batch)
        for name, tensor in theirs.items():
            if name not in ours or ours[name].shape != tensor.shape:
                raise VerificationError(
                    f"the converted model does not return {name} {list(tensor.shape)}"
                )
            found = distance(ours[name], tensor).to_json()
            if name not in outputs or found["relative"] > outputs[name]["relative"]:
                outputs[name] = found
    if not outputs:
        raise VerificationError("the model returns no float tensor that could be compared")
    report: dict[str, Any] = {"inputs": evaluation.what, "outputs": outputs}
    report["relative"] = max(found["relative"] for found in outputs.values())
    if predictions and evaluation.windows is not None and is_language_model(reference):
        both = LanguageModelDistance()
        for window in evaluation.windows:
            tokens = window[None]
            batch = {"input_ids": tokens, "use_cache": False}
            both.update(
                outputs_of(reference, batch)["logits"].cpu(),
                outputs_of(other, batch)["logits"].cpu(),
                tokens,
            )
        report["language_model"] = both.to_json()
    return report


def same_greedy_text(reference: nn.Module, other: nn.Module, evaluation: Evaluation) -> bool | None:
    """Whether both generate the same tokens after each prompt; None where they do not generate."""
    if not evaluation.prompts or not is_language_model(reference):
        return None

    def generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
        prompt = prompt.to(device_of(model))
        mask = torch.ones_like(prompt)
        with torch.no_grad():
            tokens: torch.Tensor = model.generate(
                input_ids=prompt,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return tokens.cpu()

    return all(
        torch.equal(generate(reference, prompt), generate(other, prompt))
        for prompt in evaluation.prompts
    )


def raise_if_failed(report: Mapping[str, Any]) -> None:
    """Raise VerificationError, naming the worst failure, if a check of the report did not pass."""
    failed = [c for c in report["checks"] if not c["passed"]]
    if failed:
        worst = max(failed, key=lambda c: c["error"] - c["allowed"])
        raise VerificationError(
            f"verification failed: {worst['what']}: error {worst['error']:.3g}, allowed "
            f"{worst['allowed']:.3g}{_where(report)}{_advice(worst)}"
        )


def _where(report: Mapping[str, Any]) -> str:
    largest = report.get("largest_error_at")
    if not largest:
        return ""
    return f" (of the layers {largest['layer']} is furthest off, by {largest['relative']:.3g})"


def _advice(worst: Check) -> str:
    if worst["what"] == END_TO_END:
        return "; the recipe's verify.max_relative_error sets what is allowed"
    return "; the converted model is wrong, please report it"
