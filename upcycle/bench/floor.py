"""The least time that a machine needs for a layer or a model: no implementation goes below it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from upcycle.bench.machine import Machine
from upcycle.ir.spec import MoESpec
from upcycle.passes.plan.costs import layer_flops, layer_parameters
from upcycle.recipe.onnx import Onnx


@dataclass(frozen=True)
class Floor:
    """Counts the FLOPs of the linear maps that a token visits, and the bytes of their weights.

    Attributes:
        itemsize: bytes of a weight in the computation.
        routed_itemsize: the same for a weight of a routed expert, which may be rounded.
        specs: all converted layers.
        parameters: of the dense model, without embeddings, which are looked up.
        head: those of them that make the logits.
    """

    machine: Machine
    itemsize: float
    routed_itemsize: float
    specs: Sequence[MoESpec]
    parameters: int
    head: int

    def of_layer(self, spec: MoESpec, tokens: int, visited: int) -> dict[str, float]:
        """Seconds of ``dense`` and ``converted`` for tokens that visit `visited` experts in all."""
        ffn = spec.ffn
        dense = self.machine.floor(2 * ffn.num_weights * tokens, ffn.num_parameters * self.itemsize)
        sparse = self.machine.floor(layer_flops(spec) * tokens, self._layer_bytes(spec, visited))
        return {"dense": dense, "converted": sparse}

    def of_model(self, tokens: int, logits: int) -> dict[str, float]:
        """Seconds for `tokens` tokens, `logits` of which get logits.

        Attention to other tokens is left out, and so are the experts that one token does not visit.
        """
        before = sum(spec.ffn.num_parameters for spec in self.specs)
        rest = self.parameters - before
        head = 2 * self.head * (logits - tokens)  # is in `rest` for every token

        def seconds(flops: float, weight_bytes: float) -> float:
            return self.machine.floor(
                (2 * rest + flops) * tokens + head, rest * self.itemsize + weight_bytes
            )

        active = sum(self._layer_bytes(spec, spec.top_k) for spec in self.specs)
        return {
            "dense": seconds(2 * before, before * self.itemsize),
            "converted": seconds(sum(layer_flops(spec) for spec in self.specs), active),
        }

    def weight_bytes(self, parameters: int) -> dict[str, float]:
        """Bytes of the weights of ``dense``, which has `parameters`, and of ``converted``."""
        before = sum(spec.ffn.num_parameters for spec in self.specs)
        layers = sum(self._layer_bytes(spec, spec.num_experts) for spec in self.specs)
        dense = parameters * self.itemsize
        return {"dense": dense, "converted": dense - before * self.itemsize + layers}

    def _layer_bytes(self, spec: MoESpec, visited: int) -> float:
        others = layer_parameters(spec, 0)
        routed = layer_parameters(spec, visited) - others
        return others * self.itemsize + routed * self.routed_itemsize


def floor_of(
    machine: Machine,
    dense: nn.Module,
    specs: Sequence[MoESpec],
    *,
    itemsize: int,
    options: Onnx | None,
) -> Floor:
    """The floor of a dense model and its converted layers.

    `itemsize` are the bytes of a weight in the computation, unless `options`, those of the ONNX
    file if that is run, make it less.
    """
    model: Any = dense
    output = model.get_output_embeddings() if isinstance(dense, PreTrainedModel) else None
    head = set(output.parameters()) if isinstance(output, nn.Module) else set()
    tables = {m.weight for m in dense.modules() if isinstance(m, nn.Embedding)}
    looked_up = sum(weight.numel() for weight in tables - head)
    size: float = 2 if options is not None and options.half else itemsize
    return Floor(
        machine,
        size,
        options.bits / 8 if options is not None and options.rounds else size,
        specs,
        sum(p.numel() for p in dense.parameters()) - looked_up,
        sum(p.numel() for p in head),
    )
