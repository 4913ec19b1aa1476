"""Every architecture of the zoo, and what a conversion of one shows."""

import re
import time
from dataclasses import dataclass

import torch
import zoo
from torch import nn
from zoo import Case
from zoo_senses import SENSES
from zoo_text import TEXT
from zoo_timm import TIMM
from zoo_torch import TORCH

import upcycle
from upcycle.capture.capture import ExampleInputs
from upcycle.capture.guess_inputs import find_example, randomised
from upcycle.ir.ffn import FFN
from upcycle.layers.moe import MoE
from upcycle.recipe.schema import Recipe

ARCHITECTURES: dict[str, Case] = {**zoo.ZOO, **TEXT, **SENSES, **TORCH, **TIMM}
LIBRARIES = ("transformers", "timm")
SPLIT_ALL = Recipe.model_validate(
    {
        "experts": {"method": "contiguous", "count": 5},
        "router": {"method": "avg_key", "top_k": "all", "weights": "one"},
    }
)
# Words in the names of weights that belong to no FFN.
OTHERS = re.compile(
    r"\b(qkv|[qkvo]_proj|query|attn|self_attn|attention|self_attention|lm_head|classifier|"
    r"pooler|\w*embed(ding)?_tokens|word_embeddings|wte|wpe)\b"
)


@dataclass(frozen=True)
class Facts:
    """What was found in a model, and what converting it changed.

    Attributes:
        library: the class, with its package for a class of a library.
        found: the FFNs that a conversion takes.
        misses: how many places were refused.
        error: largest difference of an output of the split model, over the largest output.
        sensitivity: the same with the experts zeroed.
        seconds: to guess the inputs, capture and locate.
        model, converted: the dense model, and the split one as it was before the zeroing.
    """

    library: str
    found: tuple[FFN, ...]
    misses: int
    error: float | None
    sensitivity: float | None
    seconds: float
    model: nn.Module
    converted: nn.Module | None

    @property
    def placement(self) -> str:
        """Of the FFNs, each once."""
        return ", ".join(sorted({ffn.placement for ffn in self.found}))

    @property
    def activation(self) -> str:
        """Of the FFNs, each once."""
        return ", ".join(sorted({ffn.pointwise.name for ffn in self.found}))


def library_of(model: nn.Module) -> str:
    """The class, or that it was written for the zoo."""
    package = type(model).__module__.partition(".")[0]
    if package == "torch" and type(model) is not nn.Sequential:
        return f"torch.nn.{type(model).__name__}"
    return f"{package}.{type(model).__name__}" if package in LIBRARIES else "by hand"


def facts_of(name: str) -> Facts:
    """Locate, split and compare one architecture."""
    case = ARCHITECTURES[name]
    model = zoo.drawn(case)
    start = time.perf_counter()
    example = case.example() if case.example else find_example(model)[0]
    located = upcycle.locate(model, example)
    seconds = time.perf_counter() - start
    found = tuple(ffn for ffn in located.ffns if ffn.kind == "ffn")
    error = sensitivity = converted = None
    if found:
        inputs = randomised(example, vocabulary=zoo.VOCABULARY, seed=1)
        converted = upcycle.convert(model, SPLIT_ALL, inputs, verify=False, located=located).model
        with torch.no_grad():
            expected = zoo.run(model, inputs)
            error = _relative(zoo.run(converted, inputs), expected)
            sensitivity = _relative(_without_ffns(converted, inputs), expected)
    return Facts(
        library_of(model), found, len(located.misses), error, sensitivity, seconds, model, converted
    )


def _without_ffns(converted: nn.Module, inputs: ExampleInputs) -> torch.Tensor:
    """The output where each FFN adds nothing; the model is left as it was."""
    layers = [module for module in converted.modules() if isinstance(module, MoE)]
    zeroed = [layer.experts.down_proj for layer in layers]
    zeroed += [layer.output_bias for layer in layers if layer.output_bias is not None]
    kept = [tensor.clone() for tensor in zeroed]
    for tensor in zeroed:
        tensor.zero_()
    out = zoo.run(converted, inputs)
    for tensor, old in zip(zeroed, kept, strict=True):
        tensor.copy_(old)
    return out


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
