"""The tensors of one FFN before and after its conversion.

Shape suffixes: D d_model, O d_out, F d_ff (neurons), M expansions, E experts, I neurons of an
expert, G = M * I rows of an expert's fused expansion.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from upcycle.ir.ffn import FFN
from upcycle.pointwise import Pointwise


@dataclass(frozen=True)
class FFNWeights:
    """A dense FFN: ``down(f(up_0 x + b_0, ..., up_{M-1} x + b_{M-1})) + down_bias``.

    One float dtype throughout. Neuron j is row j of every expansion and column j of `down_OF`.
    For a gated FFN expansion 0 is the gate, which the activation reads, and expansion 1 is up.
    `sources` has the same FFN of each model that experts are taken from, if there are several.
    """

    pointwise: Pointwise
    up_MFD: torch.Tensor
    up_bias_MF: torch.Tensor | None
    down_OF: torch.Tensor
    down_bias_O: torch.Tensor | None
    sources: tuple["FFNWeights", ...] = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The dense FFN at `x` [..., D]; returns [..., O], in the dtype of `x`."""
        return torch.nn.functional.linear(self.hidden(x), self.down_OF, self.down_bias_O)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The activations of the neurons at `x` [..., D]; [..., F]."""
        z = [torch.nn.functional.linear(x, up_FD) for up_FD in self.up_MFD]
        if self.up_bias_MF is not None:
            z = [z_F + bias_F for z_F, bias_F in zip(z, self.up_bias_MF, strict=True)]
        return self.pointwise(*z)

    def of_neurons(self, neuron_F: torch.Tensor) -> "FFNWeights":
        """The FFN that has only the neurons `neuron_F`, int64, in that order."""
        bias_MF = self.up_bias_MF
        return replace(
            self,
            up_MFD=self.up_MFD[:, neuron_F],
            up_bias_MF=None if bias_MF is None else bias_MF[:, neuron_F],
            down_OF=self.down_OF[:, neuron_F],
        )

    def to(self, target: torch.dtype | str) -> "FFNWeights":
        """The same FFN in another float dtype, or on another device."""
        moved = {name: tensor.to(target) for name, tensor in tensors_of(self).items()}
        return replace(self, **moved, sources=tuple(source.to(target) for source in self.sources))

    def cpu(self) -> "FFNWeights":
        """The same FFN in host memory; itself if it is there already, or on the meta device."""
        return self if self.up_MFD.device.type in ("cpu", "meta") else self.to("cpu")


@dataclass(frozen=True)
class ExpertWeights:
    """The experts made from one dense FFN, in the layout of the transformers experts interface.

    Attributes:
        up_EGD: [E, M * I, D]; rows ``i * I .. (i + 1) * I`` of an expert are its expansion i.
        up_bias_EG: [E, M * I] or None.
        down_EOI: [E, O, I].
        down_bias_EO: [E, O] where each expert is a whole FFN; else None: the output bias of parts
            of one FFN is kept out of them, and the layer adds it once, which is right under every
            routing rule.
        neuron_EI: [E, I] int64, the dense neuron behind each neuron; -1 is a neuron of zeros.
        up_scale, down_scale: factors on the expansions and on the contraction, relative to the
            dense FFN.
    """

    up_EGD: torch.Tensor
    up_bias_EG: torch.Tensor | None
    down_EOI: torch.Tensor
    neuron_EI: torch.Tensor
    up_scale: float = 1.0
    down_scale: float = 1.0
    down_bias_EO: torch.Tensor | None = None


@dataclass(frozen=True)
class Provenance:
    """The dense neuron behind each neuron of a layer.

    Attributes:
        expert_EI: [E, I] int64; -1 is zero padding and -2 a neuron drawn anew.
        shared_S: [S] int64, of the shared expert; empty if there is none.
    """

    expert_EI: torch.Tensor
    shared_S: torch.Tensor


@dataclass(frozen=True)
class MoEWeights:
    """Everything that one MoE layer holds.

    Attributes:
        router: the tensors of the router by their names in it, float32 or int64; for a linear one
            ``weight`` [E, D] and perhaps ``bias`` [E].
        output_bias_O: added once, or None: that of the FFN, or of the shared expert where each
            expert has its own.
        shared: the shared expert as a single expert, or None.
        low_rank: ``(V_RD, U_OR)`` of the term ``U V x`` that every token gets, or None.
        figures: what fitting measured, for the report.
    """

    experts: ExpertWeights
    router: Mapping[str, torch.Tensor]
    output_bias_O: torch.Tensor | None
    shared: ExpertWeights | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def provenance(self) -> Provenance:
        """The dense neurons that the layer was made of."""
        none = torch.empty(0, dtype=torch.int64)
        shared_S = none if self.shared is None else self.shared.neuron_EI[0]
        return Provenance(self.experts.neuron_EI, shared_S)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under its name in `upcycle.layers.moe.MoE`; nothing is copied."""
        experts, shared = self.experts, self.shared
        up = "gate_up_proj" if experts.up_EGD.shape[1] > experts.down_EOI.shape[2] else "up_proj"
        named: dict[str, torch.Tensor | None] = {
            **{f"router.{name}": tensor for name, tensor in self.router.items()},
            f"experts.{up}": experts.up_EGD,
            f"experts.{up}_bias": experts.up_bias_EG,
            "experts.down_proj": experts.down_EOI,
            "experts.down_proj_bias": experts.down_bias_EO,
            "output_bias": self.output_bias_O,
        }
        if shared is not None:
            bias_EG = shared.up_bias_EG
            named |= {
                f"shared_expert.{up}.weight": shared.up_EGD[0],
                f"shared_expert.{up}.bias": None if bias_EG is None else bias_EG[0],
                "shared_expert.down_proj.weight": shared.down_EOI[0],
            }
        if self.low_rank is not None:
            named |= {f"low_rank.{i}.weight": tensor for i, tensor in enumerate(self.low_rank)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def tensors_of(weights: FFNWeights | ExpertWeights) -> dict[str, Any]:
    """The tensors by the names of their fields, without those that are None."""
    return {n: value for n, value in vars(weights).items() if isinstance(value, torch.Tensor)}


def gather_experts(
    ffn: FFNWeights,
    neuron_EI: torch.Tensor,
    *,
    up_scale: float = 1.0,
    down_scale: float = 1.0,
    scale_gate: bool = True,
) -> ExpertWeights:
    """Build experts by choosing dense neurons: the one way in which rows are copied.

    `neuron_EI` is that of the experts. `up_scale` is a factor on the last expansion, or on every
    one with `scale_gate`, and `down_scale` one on the contraction. Memory: E * I / F times `ffn`.
    """
    padding_EI = neuron_EI < 0

    def gathered(rows: torch.Tensor, factor: float) -> torch.Tensor:
        """[F, ...] -> [E, I, ...]."""
        chosen = rows[neuron_EI.clamp(min=0)] * factor
        chosen[padding_EI] = 0
        return chosen

    def fused(rows_M: torch.Tensor) -> torch.Tensor:
        """[M, F, ...] -> [E, M * I, ...]."""
        *gates, last = rows_M
        blocks = [gathered(gate, up_scale if scale_gate else 1.0) for gate in gates]
        return torch.cat([*blocks, gathered(last, up_scale)], dim=1)

    return ExpertWeights(
        up_EGD=fused(ffn.up_MFD),
        up_bias_EG=None if ffn.up_bias_MF is None else fused(ffn.up_bias_MF),
        down_EOI=gathered(ffn.down_OF.t(), down_scale).transpose(1, 2).contiguous(),
        neuron_EI=neuron_EI,
        up_scale=up_scale,
        down_scale=down_scale,
    )


def as_matrix(stored: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """A view of a weight as [out, in]; a 1x1 convolution is a linear map."""
    return (stored.t() if transposed else stored).flatten(1)


def read_matrices(ffn: FFN, parameters: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Views of the expansions of an FFN, each [F, D], and then of its contraction, [O, F]."""
    for p in (*ffn.expansions, ffn.contraction):
        matrix = as_matrix(parameters[p.weight].detach(), transposed=p.transposed)
        yield matrix[slice(*p.rows), slice(*p.columns or (None,))]


def read_ffn(
    ffn: FFN,
    parameters: Mapping[str, torch.Tensor],
    sources: Sequence[Mapping[str, torch.Tensor]] = (),
) -> FFNWeights:
    """The tensors of one located FFN; of `parameters` only those in ``ffn.parameters`` are read.

    `sources` are the parameters of other models, for ``FFNWeights.sources``.
    """
    *ups, down_OF = read_matrices(ffn, parameters)
    zeros_F = ups[0].new_zeros(ffn.d_ff)
    biases = [
        parameters[p.bias].detach()[slice(*p.rows)] if p.bias else zeros_F for p in ffn.expansions
    ]
    bias_name = ffn.contraction.bias
    return FFNWeights(
        pointwise=ffn.pointwise,
        up_MFD=torch.stack(ups),
        up_bias_MF=torch.stack(biases) if ffn.has_up_bias else None,
        down_OF=down_OF.contiguous(),
        down_bias_O=parameters[bias_name].detach() if bias_name else None,
        sources=tuple(read_ffn(ffn, source) for source in sources),
    )
