"""The tensors of one FFN before and after its conversion.

Shape suffixes: D d_model, O d_out, F d_ff (neurons), M expansions, E experts, I neurons of an
expert, G = M * I rows of an expert's fused expansion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from upcycle.ir.ffn import FFN, Projection
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

    def to(self, dtype: torch.dtype) -> "FFNWeights":
        """The same FFN in another float dtype."""

        def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return FFNWeights(
            pointwise=self.pointwise,
            up_MFD=self.up_MFD.to(dtype),
            up_bias_MF=cast(self.up_bias_MF),
            down_OF=self.down_OF.to(dtype),
            down_bias_O=cast(self.down_bias_O),
            sources=tuple(source.to(dtype) for source in self.sources),
        )

    def cpu(self) -> "FFNWeights":
        """The same FFN in the memory of the host; this one, if it is there or has no numbers."""
        if self.up_MFD.device.type in ("cpu", "meta"):
            return self
        bias_MF, bias_O = self.up_bias_MF, self.down_bias_O
        return FFNWeights(
            pointwise=self.pointwise,
            up_MFD=self.up_MFD.cpu(),
            up_bias_MF=None if bias_MF is None else bias_MF.cpu(),
            down_OF=self.down_OF.cpu(),
            down_bias_O=None if bias_O is None else bias_O.cpu(),
            sources=tuple(source.cpu() for source in self.sources),
        )


@dataclass(frozen=True)
class ExpertWeights:
    """The experts made from one dense FFN, in the layout of the transformers experts interface.

    Attributes:
        up_EGD: [E, M * I, D]; rows ``i * I .. (i + 1) * I`` of an expert are its expansion i.
        up_bias_EG: [E, M * I] or None.
        down_EOI: [E, O, I]. The output bias of the FFN is kept out of the experts: the layer adds
            it once, which is right under every routing rule.
        neuron_EI: [E, I] int64, the dense neuron behind each neuron; -1 is zero padding.
        up_scale: factor on expansion 1 of a gated FFN (on expansion 0 of a plain one, and on every
            expansion when `scale_gate`) relative to the dense rows.
        down_scale: factor on the contraction relative to the dense columns.
        scale_gate: `up_scale` applies to every expansion.
    """

    up_EGD: torch.Tensor
    up_bias_EG: torch.Tensor | None
    down_EOI: torch.Tensor
    neuron_EI: torch.Tensor
    up_scale: float = 1.0
    down_scale: float = 1.0
    scale_gate: bool = True


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
        experts: the routed experts.
        router: the tensors of the router by their names in it, float32 or int64; for a linear one
            ``weight`` [E, D] and perhaps ``bias`` [E].
        output_bias_O: added once, or None.
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


def gather_experts(
    ffn: FFNWeights,
    neuron_EI: torch.Tensor,
    *,
    up_scale: float = 1.0,
    down_scale: float = 1.0,
    scale_gate: bool = True,
) -> ExpertWeights:
    """Build experts by choosing dense neurons: the one way in which rows are copied.

    Args:
        ffn: the dense FFN.
        neuron_EI: [E, I] int64, dense neuron of each expert neuron; -1 makes a neuron of zeros,
            which adds nothing to the output because its column of `down` is zero.
        up_scale, down_scale, scale_gate: see `ExpertWeights`.

    Returns:
        Experts in the dtype of `ffn`, E * I / F times its memory.
    """
    num_experts, width = neuron_EI.shape
    padding_EI = neuron_EI < 0
    flat = neuron_EI.clamp(min=0).reshape(-1)
    blocks, biases = [], []
    last = len(ffn.up_MFD) - 1
    for i, up_FD in enumerate(ffn.up_MFD):
        factor = up_scale if scale_gate or i == last else 1.0
        rows = up_FD[flat].reshape(num_experts, width, -1) * factor
        rows[padding_EI] = 0
        blocks.append(rows)
        if ffn.up_bias_MF is not None:
            bias = ffn.up_bias_MF[i][flat].reshape(num_experts, width) * factor
            bias[padding_EI] = 0
            biases.append(bias)
    down_EIO = ffn.down_OF.t()[flat].reshape(num_experts, width, -1) * down_scale
    down_EIO[padding_EI] = 0
    return ExpertWeights(
        up_EGD=torch.cat(blocks, dim=1),
        up_bias_EG=torch.cat(biases, dim=1) if biases else None,
        down_EOI=down_EIO.transpose(1, 2).contiguous(),
        neuron_EI=neuron_EI,
        up_scale=up_scale,
        down_scale=down_scale,
        scale_gate=scale_gate,
    )


def read_ffn(
    ffn: FFN,
    parameters: Mapping[str, torch.Tensor],
    sources: Sequence[Mapping[str, torch.Tensor]] = (),
) -> FFNWeights:
    """The tensors of one located FFN.

    Args:
        ffn: where to look.
        parameters: tensor by name, read lazily: only the names in ``ffn.parameters`` are asked for.
        sources: the same of other models, for ``FFNWeights.sources``.
    """

    def rows(p: Projection, tensor: torch.Tensor, *, is_weight: bool) -> torch.Tensor:
        if is_weight and p.transposed:
            tensor = tensor.t()
        if is_weight:
            tensor = tensor.reshape(tensor.shape[0], -1)  # a 1x1 convolution is a linear map
        if is_weight and p.columns:
            tensor = tensor[:, slice(*p.columns)]
        return tensor[slice(*p.rows)]

    ups = [rows(p, parameters[p.weight].detach(), is_weight=True) for p in ffn.expansions]
    biases = [
        rows(p, parameters[p.bias].detach(), is_weight=False)
        if p.bias
        else ups[0].new_zeros(ffn.d_ff)
        for p in ffn.expansions
    ]
    down = ffn.contraction
    bias = parameters[down.bias].detach() if down.bias else None
    return FFNWeights(
        pointwise=ffn.pointwise,
        up_MFD=torch.stack(ups),
        up_bias_MF=torch.stack(biases) if ffn.has_up_bias else None,
        down_OF=rows(down, parameters[down.weight].detach(), is_weight=True).contiguous(),
        down_bias_O=bias,
        sources=tuple(read_ffn(ffn, source) for source in sources),
    )
