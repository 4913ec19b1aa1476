"""The implementations of MoE experts that `gpu.py` compares, and the experts and tokens it uses.

Shape suffixes: T tokens, D d_model, E experts, K chosen experts, I expert width.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from upcycle.kernels.triton import why_unfused

Shape = tuple[int, int, int, int]  # experts, chosen, d_model, width
Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x_TD, index_TK, weights_TK
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SETS = 4
DEVICE = "cuda"
OF_TRANSFORMERS = ("upcycle_triton", "grouped_mm", "eager", "sonicmoe", "deepgemm")


def experts_of(shape: Shape) -> MixtralExperts:
    """Experts of transformers with normal weights, in bfloat16."""
    count, _, d_model, width = shape
    config = SimpleNamespace(
        num_local_experts=count,
        hidden_size=d_model,
        intermediate_size=width,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with torch.device(DEVICE):
        experts = MixtralExperts(config).to(torch.bfloat16).requires_grad_(False)
    experts.gate_up_proj.normal_(std=d_model**-0.5)
    experts.down_proj.normal_(std=width**-0.5)
    return experts


def samples(shape: Shape, tokens: int) -> list[Sample]:
    """Tokens that choose their experts evenly and at random."""
    count, chosen, d_model, _ = shape
    draw = torch.Generator(DEVICE).manual_seed(tokens)
    found = []
    for _ in range(SETS):
        x_TD = torch.randn(tokens, d_model, device=DEVICE, generator=draw).bfloat16()
        scores_TE = torch.randn(tokens, count, device=DEVICE, generator=draw).softmax(-1)
        weights_TK, index_TK = scores_TE.topk(chosen)
        found.append((x_TD, index_TK, weights_TK / weights_TK.sum(-1, keepdim=True)))
    return found


def of_transformers(name: str, experts: MixtralExperts) -> Run:
    """One implementation of the experts interface."""
    if name == "upcycle_triton" and (why := why_unfused(experts)):
        raise RuntimeError(why)
    if name != "eager":
        ALL_EXPERTS_FUNCTIONS.get_interface(name, None)  # says if there is none

    def run(x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        experts.config._experts_implementation = name
        return experts(x_TD, index_TK, weights_TK)

    return run


def dense(experts: MixtralExperts, chosen: int) -> Run:
    """One FFN of the active width, from the first experts."""
    gate_KID, up_KID = experts.gate_up_proj[:chosen].chunk(2, dim=1)
    up = torch.cat([gate_KID.flatten(0, 1), up_KID.flatten(0, 1)])
    down = experts.down_proj[:chosen].transpose(0, 1).flatten(1).contiguous()

    def run(x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        gate, z = F.linear(x_TD, up).chunk(2, -1)
        return F.linear(F.silu(gate) * z, down)

    return run


def vllm(experts: MixtralExperts, chosen: int) -> Run:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_experts

    config = VllmConfig()

    def run(x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        with set_current_vllm_config(config):
            return fused_experts(
                x_TD, experts.gate_up_proj, experts.down_proj, weights_TK, index_TK.int()
            )

    return run


def sglang(experts: MixtralExperts, chosen: int) -> Run:
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    def run(x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        chosen_ones = StandardTopKOutput(weights_TK, index_TK.int(), None)
        config = MoeRunnerConfig(inplace=False)
        return fused_experts(x_TD, experts.gate_up_proj, experts.down_proj, chosen_ones, config)

    return run


def megablocks(experts: MixtralExperts, chosen: int) -> Run:
    """Its own router and weights, so that it is timed only."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    count, d_model, width = experts.down_proj.shape
    arguments = Arguments(
        hidden_size=d_model,
        ffn_hidden_size=width,
        moe_num_experts=count,
        moe_top_k=chosen,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=F.silu,
        bf16=True,
        fp16=False,
        bias=False,
    )
    layer = dMoE(arguments).cuda().bfloat16().eval()

    def run(x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        out = layer(x_TD[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    return run


def implementations(experts: MixtralExperts, chosen: int) -> dict[str, Run | str]:
    """What can be tried here; a reason for what cannot."""
    makers: dict[str, Callable[[], Run]] = {
        name: (lambda name=name: of_transformers(name, experts)) for name in OF_TRANSFORMERS
    }
    for maker in (dense, vllm, sglang, megablocks):
        makers[maker.__name__] = lambda maker=maker: maker(experts, chosen)
    found: dict[str, Run | str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            found[name] = reason(error)
    return found


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
