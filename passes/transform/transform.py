"""Make the weights of one MoE layer, and take a split back.

Shape suffixes: E experts, I neurons of an expert, F neurons of the FFN, D d_model, M expansions,
O d_out.
"""

from dataclasses import replace

import torch

from upcycle.errors import UnsupportedError
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, FFNWeights, MoEWeights
from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.transform.built import build_experts, build_router
from upcycle.passes.transform.compensate import compensate


def transform(ffn: FFNWeights, spec: MoESpec, data: FFNInputs | None = None) -> MoEWeights:
    """Build experts and router for one dense FFN: a pure function of its arguments.

    What it promises is ``spec.promise``. `data` is what the FFN was given in calibration, if
    `passes.plan.plan.needs` asks for it.

    Returns:
        Experts in the dtype of `ffn`, a float32 router, and the output bias: of each expert that is
        a whole FFN, else of the layer, which adds it once. Memory: the experts, and what their
        method says.
    """
    dense = DenseLayer(ffn, spec, spec.generator("experts"), data)
    parts = build_experts(dense)
    dense = replace(dense, generator=spec.generator("router"))
    router = build_router(dense, parts)
    config = spec.router_config()
    if config.balance:
        router["selection_bias"] = torch.zeros(spec.num_experts + config.nulls)
    if config.weights == "gain":
        router["gain"] = torch.zeros(spec.num_experts)
    bias_EO, bias_O = _output_biases(dense, parts)
    experts = replace(parts.experts, down_bias_EO=bias_EO)
    made = MoEWeights(experts, router, bias_O, parts.shared)
    return compensate(made, ffn, spec, data) if data is not None else made


def _output_biases(
    dense: DenseLayer, parts: Parts
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of the experts [E, O], and what the layer adds once [O]; scaled as their contractions."""
    ffn, spec, bias_O = dense.ffn, dense.spec, dense.ffn.down_bias_O
    if bias_O is None or not spec.expert_bias:
        return None, bias_O
    sources = [ffn.sources[source] for source in spec.source_E] or [ffn] * spec.num_experts
    biases = [bias_O if one.down_bias_O is None else one.down_bias_O for one in sources]
    bias_EO = torch.stack(biases) * parts.experts.down_scale
    return bias_EO, None if parts.shared is None else bias_O * parts.shared.down_scale


def merge_to_dense(
    experts: ExpertWeights, ffn: FFNWeights, shared: ExpertWeights | None = None
) -> FFNWeights:
    """Put the experts of a split back together, each neuron in its old place, without padding.

    Right after the split the result is the dense FFN bit for bit; after training it is the layer
    with all experts chosen and weights one.

    Returns:
        A dense FFN in new memory, in the dtype of `experts`. Of `ffn`, which they were made from,
        it has the output bias alone.

    Raises:
        UnsupportedError: the experts do not hold each neuron of `ffn` once, unscaled.

    Source:
        Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908
    """
    arity, d_ff = ffn.up_MFD.shape[:2]
    groups = [experts] if shared is None else [shared, experts]
    neuron_S = torch.cat([group.neuron_EI.flatten() for group in groups])
    slots = (neuron_S >= 0).nonzero().squeeze(1)
    slot_F = slots[neuron_S[slots].argsort()]
    is_split = torch.equal(neuron_S[slot_F], torch.arange(d_ff))
    if not is_split or experts.up_scale != 1 or experts.down_scale != 1:
        raise UnsupportedError(
            "only the experts of a split make up one dense FFN; copies and slices of copies "
            "cannot be merged"
        )

    def joined(rows: list[torch.Tensor]) -> torch.Tensor:
        """Expansions of all groups, [E, M * I, ...] each, as [M, F, ...]."""
        split = [r.reshape(len(r), arity, -1, *r.shape[2:]).transpose(0, 1) for r in rows]
        return torch.cat([r.flatten(1, 2) for r in split], dim=1)[:, slot_F]

    biases = [group.up_bias_EG for group in groups if group.up_bias_EG is not None]
    columns = [group.down_EOI.transpose(0, 1).flatten(1) for group in groups]
    return FFNWeights(
        pointwise=ffn.pointwise,
        up_MFD=joined([group.up_EGD for group in groups]),
        up_bias_MF=joined(biases) if biases else None,
        down_OF=torch.cat(columns, dim=1)[:, slot_F],
        down_bias_O=ffn.down_bias_O,
    )
