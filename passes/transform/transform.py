"""Make the weights of one MoE layer, and take a split back.

Shape suffixes: E experts, I neurons of an expert, F neurons of the FFN, D d_model, M expansions,
O d_out.
"""

from dataclasses import replace

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, MoEWeights
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
