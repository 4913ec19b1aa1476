"""What a native MoE architecture is to upcycle: data, one `NativeTarget` per architecture.

Shape suffixes: E experts, I expert width, S width of the shared expert, D d_model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from upcycle.ir.spec import MoESpec

# Config fields that most decoders have and that keep their meaning.
COMMON_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


@dataclass(frozen=True)
class TensorRule:
    """How a tensor of the dense model is written.

    Attributes:
        pattern: regular expression for its whole name. Each rule that matches writes a tensor; a
            tensor that no rule matches is written as it is.
        name: the name in the file; ``\\1`` is the first group of `pattern`.
        change: the dense tensor -> the written one; also called on the meta device, for the shape.
    """

    pattern: str
    name: str
    change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class DenseArchitecture:
    """One dense architecture, and how the MoE architecture computes all but its FFNs.

    Attributes:
        architecture: its class with a language-modeling head.
        absent: config fields that must be false or zero.
        fits: a config -> None, or why its attention cannot be held, for what `absent` cannot say.
        common, carried: config fields that are copied, also those that no class declares.
        checked: config fields that `fits` or `fields` reads.
        ignored: config fields without influence on the model.
        fields: config fields that are computed.
        tensors: rules for the tensors that are not written as they are.
        activation: of the FFN, by its name in transformers.
        layers: the modules that hold an FFN, in order.
        mlp: name of the FFN in such a module.
        roles: names of gate, up and down in it (of up and down if it has no gate).
        partial_rope: both architectures rotate the same part of each head.
        dropout: both have the dropout in the FFN.
    """

    architecture: str
    absent: tuple[str, ...] = ()
    fits: Callable[[PreTrainedConfig], str | None] = lambda config: None
    common: tuple[str, ...] = COMMON_FIELDS
    carried: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fields: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    tensors: Callable[[PreTrainedConfig], Sequence[TensorRule]] = lambda config: ()
    activation: str = "silu"
    layers: Callable[[PreTrainedConfig], list[str]] = lambda config: [
        f"model.layers.{i}" for i in range(config.num_hidden_layers)
    ]
    mlp: str = "mlp"
    roles: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    partial_rope: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class RouterRule:
    """A rule for the weights of the chosen experts that the router can follow.

    Attributes:
        score: p, of which the largest are chosen: the softmax over all experts or a sigmoid;
            ``input`` is a sigmoid that multiplies the input of the expert and not its output.
        renormalise: p is divided by its sum over the chosen experts.
        config: the config fields that select the rule.
        factor: config field of a factor on the weights, or None.
        by_logits: the experts are chosen before the softmax, which can bring logits together.
        hot: logits and softmax are computed in float32 whatever the model's dtype, so that a router
            times a large number gives the best expert the whole weight.
    """

    score: Literal["softmax", "sigmoid", "input"]
    renormalise: bool
    config: Mapping[str, Any] = field(default_factory=dict)
    factor: str | None = None
    by_logits: bool = False
    hot: bool = False


# The routers whose config says whether the weights of the chosen experts are divided by their sum.
NORM_TOPK_PROB = (
    RouterRule("softmax", renormalise=True, config={"norm_topk_prob": True}),
    RouterRule("softmax", renormalise=False, config={"norm_topk_prob": False}),
)


@dataclass(frozen=True)
class Stacks:
    """Experts in one tensor per matrix and expert.

    Attributes:
        name: with ``{layer}``, ``{expert}`` and ``{matrix}``.
        matrices: what ``{matrix}`` is for gate [I, D], up [I, D] and down [D, I].
    """

    name: str
    matrices: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    def stacked(self, layer: str) -> list[str]:
        """For each matrix the name of the stack [E, ...]: without the number of the expert."""
        name = self.name.replace("{expert}.", "")
        return [name.format(layer=layer, matrix=matrix) for matrix in self.matrices]


@dataclass(frozen=True)
class FusedTensors:
    """Experts in two tensors, [E, 2I, D] and [E, D, I], under names with ``{layer}``.

    Attributes:
        up, down: the names.
        transposed: [E, D, 2I] and [E, I, D] instead.
        interleaved: rows of gate and up alternate.
        biases: names with what they hold: tensors [E, 2I] and [E, D] with a constant for the gate
            and one for up, and zeros.
    """

    up: str
    down: str
    transposed: bool = False
    interleaved: bool = False
    biases: tuple[str, str] | None = None
    up_bias: float = 0.0


@dataclass(frozen=True)
class Shared:
    """The shared expert of an architecture.

    Attributes:
        matrices: names of gate, up and down with ``{layer}``; two names if gate and up are fused.
        width: config field of its width; None if the width follows from `count`.
        count: config field of its width in experts; with neither it is as wide as an expert.
        least: neurons that it has at least; zeros if the layer has no shared expert.
        always: its tensors are there even if it has no neurons.
        gate: name of a gate [1, D] whose sigmoid multiplies it; then `down` is doubled.
    """

    matrices: tuple[str, ...]
    width: str | None = None
    count: str | None = None
    least: int = 0
    always: bool = False
    gate: str | None = None

    def size(self, spec: MoESpec) -> int:
        """Neurons on disk, zero padding included; 0 if there is no shared expert."""
        wanted = max(spec.shared, self.least)
        if self.width is not None:
            return wanted
        experts = -(-wanted // spec.width)
        return spec.width * (experts if self.count else max(experts, 1))


def gate_up_down(module: str) -> tuple[str, ...]:
    """The names of the three matrices in a module."""
    return tuple(f"{module}.{matrix}_proj.weight" for matrix in ("gate", "up", "down"))


def all_sparse(sparse: Sequence[bool]) -> dict[str, Any] | str:
    """`NativeTarget.dense` of an architecture without dense layers."""
    dense = [i for i, is_sparse in enumerate(sparse) if not is_sparse]
    if not dense:
        return {}
    listed = ", ".join(map(str, dense[:8])) + (", ..." if len(dense) > 8 else "")
    return f"it has no dense layers, and the plan leaves these dense: {listed}"


@dataclass(frozen=True)
class NativeTarget:
    """One MoE architecture; `num_experts`, `top_k` and `width` are names of its config fields.

    Attributes:
        sources: the dense model types that it can hold.
        forms: the rules of its router, exact ones for most recipes first. `choose` returns a target
            with a single one.
        dense: for each layer, whether it is sparse -> config fields that say so, or why not.
        constants: config fields with one value.
        router: name of the router weight [E, D] on disk.
        router_bias: name of its bias [E], or None.
        router_dtype: of both; None is that of the model.
        selection_bias: name of a float32 bias that is added to p for the choice alone, or None.
        selection_bias_shape: ``"E"`` or ``"1E"``.
        experts: the tensors of the experts on disk.
        shared: its shared expert, or None.
        fewest: experts that its router has at least.
        most_chosen: experts that a token visits at most, or None.
        grouped: transformers runs its experts with grouped_mm, for rows of 16 n bytes.
        may_untie: llama.cpp wants an output matrix of its own, so a tied one may be written twice.
        untied: it is written twice.
        refused: why nothing is written in this architecture; empty for all others.
    """

    model_type: str
    architecture: str
    sources: Mapping[str, DenseArchitecture]
    forms: tuple[RouterRule, ...] = ()
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    dense: Callable[[Sequence[bool]], dict[str, Any] | str] = all_sparse
    constants: Mapping[str, Any] = field(default_factory=dict)
    router: str = "{layer}.mlp.gate.weight"
    router_bias: str | None = None
    router_dtype: torch.dtype | None = None
    selection_bias: str | None = None
    selection_bias_shape: Literal["E", "1E"] = "E"
    experts: Stacks | FusedTensors = Stacks("{layer}.mlp.experts.{expert}.{matrix}.weight")
    shared: Shared | None = None
    fewest: int = 1
    most_chosen: int | None = None
    grouped: bool = True
    auto_class: str = "AutoModelForCausalLM"
    may_untie: bool = False
    untied: bool = False
    refused: str = ""


# Llama, which most MoE architectures hold in some way.
LLAMA = DenseArchitecture(
    "LlamaForCausalLM", absent=("attention_bias", "mlp_bias"), ignored=("pretraining_tp",)
)
