"""The fused experts against float64, on a GPU, or by Triton's interpreter on the CPU:

TRITON_INTERPRET=1 pytest tests/test_triton.py
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from numerics import ACTIVATIONS, assert_equal_up_to_rounding, bound
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from upcycle.errors import UnsupportedError
from upcycle.ir.weights import FFNWeights
from upcycle.kernels.activations import of_module
from upcycle.kernels.triton import fused_experts, why_unfused
from upcycle.kernels.triton.launch import choose_tiles, fit_stages
from upcycle.layers.experts import Experts

HAS_TRITON = find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = HAS_TRITON and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
REASON = "needs Triton, and a GPU or the variable TRITON_INTERPRET=1 from the start"
needs_triton = pytest.mark.skipif(not CAN_RUN, reason=REASON)

E, K, D, W = 5, 2, 24, 20  # widths that are no multiple of a tile
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # which the interpreter multiplies as integers


def make_experts(name: str, dtype: torch.dtype, *, bias: bool = True) -> Experts:
    made = Experts(E, D, W, D, pointwise=ACTIVATIONS[name], bias=bias)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return made.to(dtype)


def route(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(tokens, D, generator=generator).to(dtype)
    index_TK = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]
    return x_TD, index_TK, torch.rand(tokens, K, generator=generator)


def run(experts: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """`experts` with the kernels, on the GPU if there is one; the result on the CPU."""
    experts.config._experts_implementation = "upcycle_triton"
    moved = experts.to(DEVICE)
    with torch.no_grad():
        assert why_unfused(moved, *args) is None
        return moved(*(arg.to(DEVICE) for arg in args)).cpu()


def ffns(experts: Experts) -> list[FFNWeights]:
    arity = experts.act_fn.pointwise.arity
    return [
        FFNWeights(
            pointwise=experts.act_fn.pointwise,
            up_MFD=experts.up_EGD[e].detach().view(arity, W, D),
            up_bias_MF=None
            if not experts.has_bias
            else experts.up_bias_EG[e].detach().view(arity, W),
            down_OF=experts.down_proj[e].detach(),
            down_bias_O=None,
        )
        for e in range(E)
    ]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu", "bilinear", "gelu_tanh", "relu2"])
def test_equal_to_one_expert_after_the_other(name: str, tokens: int, dtype: torch.dtype) -> None:
    experts = make_experts(name, dtype)
    x_TD, index_TK, weights_TK = route(tokens, dtype)
    weights_TK[-1, 0] = 0
    reference = make_experts(name, dtype).double().requires_grad_(False)
    expected = reference.eager_forward(x_TD.double(), index_TK, weights_TK.double())
    actual = run(experts, x_TD, index_TK, weights_TK)
    assert actual.dtype == dtype
    weights_TE = torch.zeros(tokens, E).double().scatter_(1, index_TK, weights_TK.double())
    limit = bound(ffns(reference), x_TD, dtype, weights_TN=weights_TE, experts=K)
    assert_equal_up_to_rounding(actual, expected, limit)


@needs_triton
def test_the_same_bits_every_time() -> None:
    experts = make_experts("swiglu", torch.float32)
    x_TD, index_TK, weights_TK = route(40, torch.float32)
    first = run(experts, x_TD, index_TK, weights_TK)
    assert torch.equal(first, run(experts, x_TD, index_TK, weights_TK))


@needs_triton
def test_all_tokens_may_go_to_one_expert_and_there_may_be_none() -> None:
    experts = make_experts("swiglu", torch.float32, bias=False)
    x_TD, index_TK, weights_TK = route(40, torch.float32)
    same = torch.full_like(index_TK[:, :1], 3)
    expected = experts.expert(3, x_TD).detach().double() * weights_TK[:, :1]
    weights_TE = torch.zeros(40, E).double()
    weights_TE[:, 3] = weights_TK[:, 0]
    limit = bound(ffns(experts), x_TD, torch.float32, weights_TN=weights_TE)
    actual = run(experts, x_TD, same, weights_TK[:, :1])
    assert_equal_up_to_rounding(actual, expected, 2 * limit)  # both sides are rounded
    assert run(experts, x_TD[:0], index_TK[:0], weights_TK[:0]).shape == (0, D)


@needs_triton
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_of_other_processes_and_zero_weights_add_nothing(tokens: int) -> None:
    """Rows that are not finite would show: nothing multiplies them by zero."""
    experts = make_experts("swiglu", torch.float32)
    experts.down_proj.data[4] = torch.inf
    x_TD, index_TK, weights_TK = route(tokens, torch.float32)
    index_TK[:, 0], index_TK[:, 1] = 4, E
    weights_TK[:, 0] = 0
    assert torch.equal(run(experts, x_TD, index_TK, weights_TK), torch.zeros(tokens, D))


class Foreign(nn.Module):
    """Experts as transformers has them; `use_experts_implementation` adds the rest."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = E
        draw = torch.Generator().manual_seed(2)
        self.gate_up_proj = nn.Parameter(torch.randn(E, D, 2 * W, generator=draw) / 4)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(E, 2 * W, generator=draw))
        self.down_proj = nn.Parameter(torch.randn(E, W, D, generator=draw) / 4)
        self.down_proj_bias = nn.Parameter(torch.randn(E, D, generator=draw))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(x_TD)
        for k in range(index_TK.shape[1]):
            e = index_TK[:, k]
            z = torch.einsum("td,tdg->tg", x_TD, self.gate_up_proj[e]) + self.gate_up_proj_bias[e]
            gate, up = z.chunk(2, -1)
            h = self.act_fn(gate) * up
            y = torch.einsum("ti,tio->to", h, self.down_proj[e]) + self.down_proj_bias[e]
            out = out + y * weights_TK[:, k, None]
        return out


TRANSPOSED = use_experts_implementation(is_transposed=True, has_bias=True)(
    type("Transposed", (Foreign,), {})
)


def foreign(act: str) -> nn.Module:
    config = type("Config", (), {"hidden_act": act, "_experts_implementation": "eager"})()
    made: nn.Module = TRANSPOSED(config)
    return made


@needs_triton
def test_experts_of_transformers_with_transposed_weights_and_all_biases() -> None:
    experts = foreign("silu").requires_grad_(False)
    x_TD, index_TK, weights_TK = route(7, torch.float32)
    expected = experts(x_TD, index_TK, weights_TK)
    actual = run(experts, x_TD, index_TK, weights_TK)
    # Two ways to add the same D + W + K products and biases, none above the largest.
    limit = torch.tensor(2 * (D + W + K + 4) * EPS * float(expected.detach().abs().max()))
    assert_equal_up_to_rounding(actual, expected, limit)


@needs_triton
def test_gradients_are_those_of_eager() -> None:
    """Recording them is not for the kernels; asking for them is no error."""
    x_TD, index_TK, weights_TK = route(7, torch.float32)
    found = []
    for dtype, implementation in ((torch.float32, "upcycle_triton"), (torch.float64, "eager")):
        experts = make_experts("swiglu", dtype)
        experts.config._experts_implementation = implementation
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x_TD, weights_TK)]
        assert "torch.no_grad()" in (why_unfused(experts.float(), *leaves) or "")
        experts.to(dtype)(leaves[0], index_TK, leaves[1]).square().sum().backward()
        found.append([leaf.grad for leaf in (*leaves, *experts.parameters())])
    for ours, exact in zip(*found, strict=True):
        # Sums over D, W, the expansions and the slots, there and back.
        terms = 2 * (2 * D + 2 * W + 7 * K)
        limit = torch.tensor(terms * EPS * float(exact.abs().max()))
        assert_equal_up_to_rounding(ours, exact, limit)


@needs_triton
def test_one_operation_for_compilers() -> None:
    """Fake results agree with the real ones; no graph break."""
    experts = make_experts("swiglu", torch.float32).to(DEVICE).requires_grad_(False)
    x_TD, index_TK, weights_TK = (t.to(DEVICE) for t in route(7, torch.float32))
    args = (x_TD, index_TK, weights_TK, experts.up_EGD, experts.down_proj)
    torch.library.opcheck(fused_experts, (*args, None, None, "silu", True, False))
    experts.config._experts_implementation = "upcycle_triton"
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x_TD, index_TK, weights_TK), experts(x_TD, index_TK, weights_TK))


@needs_triton
def test_what_the_kernels_do_not_know_runs_unfused() -> None:
    experts = foreign("mish").to(DEVICE).requires_grad_(False)
    assert "do not know this activation: MishActivation" in (why_unfused(experts) or "")
    x_TD, index_TK, weights_TK = (t.to(DEVICE) for t in route(7, torch.float32))
    expected = experts(x_TD, index_TK, weights_TK)
    experts.config._experts_implementation = "upcycle_triton"
    limit = torch.tensor(2 * (D + W + K + 4) * EPS * float(expected.detach().abs().max()))
    actual = experts(x_TD, index_TK, weights_TK)
    assert_equal_up_to_rounding(actual.cpu(), expected.cpu(), limit)
    assert "no float64" in (why_unfused(make_experts("swiglu", torch.float64)) or "")


@pytest.mark.skipif(HAS_TRITON, reason="Triton is installed")
def test_without_triton_the_error_says_what_to_install() -> None:
    experts = make_experts("swiglu", torch.float32)
    experts.config._experts_implementation = "upcycle_triton"
    with pytest.raises(UnsupportedError, match="pip install triton"):
        experts(*route(1, torch.float32))


def test_dropout_in_training_and_own_gates_are_not_known() -> None:
    experts = Experts(E, D, W, D, pointwise=ACTIVATIONS["swiglu"], bias=False, dropout=0.5)
    assert of_module(experts.train()) is None
    assert of_module(experts.eval()) == "silu"
    assert of_module(foreign("gelu_pytorch_tanh")) == "gelu_tanh"
    own = type("Own", (TRANSPOSED,), {"_apply_gate": lambda self, z: z[..., ::2]})
    assert of_module(own(foreign("silu").config)) is None


@pytest.mark.parametrize("gated", [True, False])
def test_tiles_fit_into_shared_memory(gated: bool) -> None:
    for rows in (1, 16, 40, 1000):
        for dtype in (torch.bfloat16, torch.float32):
            tiles = choose_tiles(rows, dtype, gated=gated)
            for room in (227, 163, 99):  # KiB: H100, A100, cards for games
                less = fit_stages(tiles, dtype.itemsize, room * 1024, gated=gated)
                width = tiles.columns * (2 if gated else 1)
                assert (
                    tiles.rows + width
                ) * tiles.depth * dtype.itemsize * less.stages <= room * 1024


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from upcycle.kernels.triton import source
from upcycle.kernels.triton.launch import choose_tiles

def compile(kernel, types, constants, **options):
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    made = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(made, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared

lists = dict(index_S="*i64", weight_S="*fp32", router_S="*fp32", count_E="*i32", slot_R="*i32",
             expert_B="*i32", blocks="*i32")
data = dict.fromkeys(("a_XD", "weight_END", "bias_EN", "c_SN", "y_TN"), "*bf16")
compile(source.count_slots, lists, dict(STEP=4096))
compile(source.place_slots, lists, dict(POWER=128, STEP=4096, BM=128))
compile(source.sum_slots, lists | data, dict(K=8, BN=1024))
for rows, gated in ((1, True), (1000, False)):
    t = choose_tiles(rows, torch.bfloat16, gated=gated)
    shared = compile(
        source.grouped_gemm, lists | data,
        dict(stride_d=1, PER_ROW=8, ACT="gelu", GATED=gated, HAS_BIAS=True, WEIGHTED=True,
             PLACED=rows > 1, EVEN=gated, BM=t.rows, BN=t.columns, BD=t.depth, GROUP=t.group),
        num_warps=t.warps, num_stages=t.stages,
    )
    assert shared <= 227 * 1024, shared
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_compile_for_an_h100_without_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
