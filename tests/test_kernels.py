"""Every way to run experts computes the same, with the same gradients, and the slots matter."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numerics
import pytest
import torch
import transformers
from kernel_case import COUNT, D_MODEL, Routed, expected, made, routed
from torch.autograd.gradcheck import GradcheckError

import upcycle.kernels
from upcycle.kernels import run_experts, weights_of
from upcycle.kernels import torch_cpu as expert_kernels
from upcycle.kernels.torch_cpu import KernelWeights
from upcycle.layers.experts import Experts
from upcycle.util.quiet import quiet_transformers

pytestmark = pytest.mark.usefixtures("one_thread")
t: Any = transformers

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CHUNKS = (1, 2, 4, COUNT)
KERNELS = ["chosen", "dense", *(f"chunks of {n}" for n in CHUNKS)]


def run(kernel: str, w: KernelWeights, *given: torch.Tensor) -> torch.Tensor:
    x_TD, index_TK, weights_TK = given
    visits = expert_kernels._visits(index_TK, weights_TK, len(w.up_EGD))
    if kernel == "chosen":
        return expert_kernels.visit(w, *given)
    if kernel == "dense":
        return expert_kernels.dense(w, *given)
    if kernel == "one token":
        return expert_kernels.one_token(w, *given)
    return expert_kernels.in_chunks(w, x_TD, visits, weights_TK, int(kernel.split()[-1]))


CASES = [("swiglu", False, D_MODEL), ("gelu", True, 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "bias", "d_out"), CASES)
@pytest.mark.parametrize("gaps", [False, True], ids=["full", "gaps"])
@pytest.mark.parametrize("kernel", [*KERNELS, "one token"])
def test_every_kernel_computes_the_experts(
    kernel: str, gaps: bool, name: str, bias: bool, d_out: int, dtype: torch.dtype
) -> None:
    ffns, experts = made(name, dtype, bias=bias, d_out=d_out)
    for tokens in (1,) if kernel == "one token" else (2, 9, 40):
        given = routed(tokens, dtype, gaps=gaps)
        if tokens == 1 and gaps:
            given[2][0, 2], given[1][0, 2] = 0.75, 3
        y_TO, bound_TO = expected(ffns, dtype, given)
        got_TO = run(kernel, weights_of(experts), *given)
        numerics.assert_equal_up_to_rounding(got_TO, y_TO, bound_TO)
        assert torch.equal(run(kernel, weights_of(experts), *given), got_TO), "each time the same"


@pytest.mark.parametrize("kernel", [*KERNELS, "one token"])
def test_a_wrong_order_of_slots_is_noticed(kernel: str) -> None:
    ffns, experts = made("swiglu", torch.float32)
    x_TD, index_TK, weights_TK = routed(
        1 if kernel == "one token" else 9, torch.float32, gaps=False
    )
    y_TO, bound_TO = expected(ffns, torch.float32, (x_TD, index_TK, weights_TK))
    wrong = [(index_TK.roll(1, 1), weights_TK), (index_TK, weights_TK.roll(1, 1))]
    if len(x_TD) > 1:
        wrong.append((index_TK.roll(1, 0), weights_TK))
    for index, weights in wrong:
        got_TO = run(kernel, weights_of(experts), x_TD, index, weights)
        with pytest.raises(AssertionError, match="rounding explains"):
            numerics.assert_equal_up_to_rounding(got_TO, y_TO, bound_TO)


def test_rows_in_a_wrong_place_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ffns, experts = made("swiglu", torch.float32)
    given = routed(9, torch.float32, gaps=True)
    rows = expert_kernels._rows

    def shifted(load_E: Any, chunk: int) -> Any:
        first_row_E, most = rows(load_E, chunk)
        return first_row_E[::-1], most

    monkeypatch.setattr(expert_kernels, "_rows", shifted)
    got_TO = run("chunks of 6", weights_of(experts), *given)
    with pytest.raises(AssertionError, match="rounding explains"):
        numerics.assert_equal_up_to_rounding(got_TO, *expected(ffns, torch.float32, given))


@pytest.mark.parametrize("kernel", ["chunks of 1", "one token"])
def test_what_has_weight_zero_is_not_run(kernel: str) -> None:
    _, experts = made("swiglu", torch.float32)
    x_TD, _, _ = routed(1, torch.float32, gaps=False)
    experts.up_EGD[4] = math.nan
    weights_1K = torch.tensor([[0.5, 0.0]])
    y_TO = run(kernel, weights_of(experts), x_TD, torch.tensor([[2, 4]]), weights_1K)
    assert y_TO.isfinite().all()
    visits = expert_kernels._visits(torch.tensor([[2, 4]]), weights_1K, COUNT)
    assert visits.load_E.tolist() == [0, 0, 1, 0, 0, 0]
    nobody = run_experts(experts, x_TD, torch.tensor([[2, 4]]), torch.zeros(1, 2))
    assert torch.equal(nobody, torch.zeros(1, D_MODEL))


def leaves(experts: Experts, given: Routed) -> list[torch.Tensor]:
    x_TD, _, weights_TK = given
    parameters = [experts.up_EGD, experts.up_bias_EG, experts.down_proj]
    found = [x_TD, weights_TK, *(p for p in parameters if p is not None)]
    return [tensor.detach().clone().requires_grad_() for tensor in found]


def of_leaves(kernel: str, experts: Experts, given: Routed) -> Callable[..., torch.Tensor]:
    """A kernel, or the operation, as a function of what it has a gradient by."""
    _, index_TK, _ = given

    def call(x: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, *rest: Any) -> torch.Tensor:
        up_bias, down = rest if len(rest) == 2 else (None, *rest)
        if kernel == "operation":
            parameters = (up, up_bias, down, experts.program)
            out: torch.Tensor = torch.ops.upcycle.moe(x, index_TK, weights, *parameters)
            return out
        w = KernelWeights(up, up_bias, down, None, weights_of(experts).activate, None, None)
        return run(kernel, w, x, index_TK, weights)

    return call


@pytest.mark.parametrize(("name", "bias", "d_out"), CASES)
@pytest.mark.parametrize("kernel", [*KERNELS, "one token", "operation"])
def test_gradients(kernel: str, name: str, bias: bool, d_out: int) -> None:
    _, experts = made(name, torch.float64, bias=bias, d_out=d_out)
    given = routed(1 if kernel == "one token" else 3, torch.float64, gaps=False)
    function = of_leaves(kernel, experts, given)
    assert torch.autograd.gradcheck(function, leaves(experts, given), fast_mode=True)


def test_a_wrong_gradient_is_noticed() -> None:
    _, experts = made("swiglu", torch.float64)
    given = routed(3, torch.float64, gaps=False)
    function = of_leaves("chunks of 2", experts, given)

    def wrong(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return function(x.detach(), *rest) + 0 * x.sum()

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(wrong, leaves(experts, given), fast_mode=True)


# torch 2.14 asks for the gradients of tensors that are no leaves while it checks
@pytest.mark.filterwarnings("ignore:.*is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("bias", [False, True])
def test_the_operation_keeps_the_rules_of_torch(bias: bool) -> None:
    _, experts = made("gelu", torch.float32, bias=bias)
    given = routed(5, torch.float32, gaps=True)
    x, weights, up, *rest = leaves(experts, given)
    up_bias, down = rest if bias else (None, *rest)
    arguments = (x, given[1], weights, up, up_bias, down, experts.program)
    torch.library.opcheck(torch.ops.upcycle.moe.default, arguments)


@pytest.mark.parametrize("chosen", [("dense", 1), ("in_chunks", 1), ("in_chunks", 2)])
def test_gradients_lie_as_a_compiler_was_promised(
    chosen: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_kernels, "choose", lambda *_: chosen)
    _, experts = made("swiglu", torch.float64)
    x, index, weights = routed(3, torch.float64, gaps=False)
    up, up_bias, down = (t.detach() for t in leaves(experts, (x, index, weights))[2:])
    grad = torch.ones(3, down.shape[1], dtype=torch.float64)
    given = (grad, x, index, weights, up, up_bias, down, experts.program)
    for gradient in torch.ops.upcycle.moe_backward(*given):
        assert gradient.is_contiguous()
    torch.library.opcheck(
        torch.ops.upcycle.moe_backward.default, given, test_utils="test_faketensor"
    )


def test_the_operation_refuses_an_activation_that_is_none() -> None:
    _, experts = made("gelu", torch.float32, bias=False)
    x, index, weights = routed(2, torch.float32, gaps=False)
    program = experts.program.replace('"gelu"', '"exec"')
    with pytest.raises(KeyError, match="exec"):
        torch.ops.upcycle.moe(x, index, weights, experts.up_EGD, None, experts.down_proj, program)


def test_compilation_and_export_see_one_node() -> None:
    _, experts = made("swiglu", torch.float64)
    given = routed(9, torch.float64, gaps=True)
    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    compiled = torch.compile(experts, backend=backend, fullgraph=True)
    assert torch.equal(compiled(*given), experts(*given))
    assert seen == ["upcycle.moe"]
    tokens = {
        "hidden_states": {0: torch.export.Dim.AUTO},
        "top_k_index": {0: torch.export.Dim.AUTO},
    }
    shapes = {**tokens, "top_k_weights": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(experts, given, dynamic_shapes=shapes)
    nodes = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [name for name in nodes if "sym" not in name and "assert" not in name] == [
        "upcycle.moe.default"
    ]
    more = routed(23, torch.float64, gaps=False)
    assert torch.equal(program.module()(*more), experts(*more))
    torch.compiler.reset()


def test_a_compiled_layer_trains_as_it_does_without() -> None:
    _, experts = made("swiglu", torch.float64)
    given = routed(9, torch.float64, gaps=True)
    experts.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    found = []
    for module in (experts, compiled):
        experts.zero_grad()
        module(*given).square().sum().backward()
        found.append([p.grad for p in experts.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.compiler.reset()


# What is chosen: by size, loads and number of tokens.


def large(count: int, width: int) -> KernelWeights:
    up_EGD, down_EOI = torch.empty(count, 2 * width, 576), torch.empty(count, 576, width)
    return KernelWeights(up_EGD, None, down_EOI, None, torch.relu, None, None)


def choice(w: KernelWeights, loads: list[int], tokens: int) -> tuple[str, int]:
    return expert_kernels.choose(w, expert_kernels.numpy.array(loads), tokens)


def test_the_choice_follows_the_loads() -> None:
    assert expert_kernels.one_by_one(large(16, 96), 4)
    assert not expert_kernels.one_by_one(large(64, 2), 64), "all experts for one token"
    assert choice(large(64, 24), [2] * 64, 16) == ("in_chunks", 64)
    assert choice(large(16, 96), [256] + [0] * 15, 256) == ("in_chunks", 1), "one takes all"
    assert choice(large(64, 24), [256] * 64, 256)[0] == "dense", "all experts for all"


# The experts of other models.


def tiny(name: str) -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
    sizes |= {"intermediate_size": 24, "moe_intermediate_size": 24}
    kind = {"mixtral": t.MixtralConfig, "qwen3_moe": t.Qwen3MoeConfig, "gpt_oss": t.GptOssConfig}
    experts = "num_experts" if name == "qwen3_moe" else "num_local_experts"
    torch.manual_seed(0)
    with quiet_transformers():
        model = t.AutoModelForCausalLM.from_config(kind[name](**sizes, **{experts: 4}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_models_of_transformers_run_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss has biases and transposed matrices, and an activation of its own."""
    model = tiny(name)
    for tokens, chosen in itertools.product((1, 7), ("eager", "dense", "in_chunks", None)):
        if tokens == 1 and chosen in ("dense", "in_chunks"):
            continue
        ids = torch.arange(tokens)[None]
        model.set_experts_implementation("eager")
        logits = model(ids).logits.double()
        model.set_experts_implementation("upcycle")
        monkeypatch.undo()
        if chosen == "in_chunks" or (chosen == "dense" and name != "gpt_oss"):
            way = (chosen, 2)
            monkeypatch.setattr(expert_kernels, "choose", lambda *_, way=way: way)
        # Sums of at most 24 terms in some ten products after each other, of numbers as large as
        # the logits.
        bound = 24 * 10 * torch.finfo(torch.float32).eps * logits.abs().max()
        assert (model(ids).logits.double() - logits).abs().max() <= bound
    monkeypatch.undo()
    assert upcycle.kernels.run_experts is t.integrations.moe.ALL_EXPERTS_FUNCTIONS["upcycle"]


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(ValueError, match="upcycled"):
        tiny("mixtral").set_experts_implementation("upcycled")
    _, experts = made("swiglu", torch.float32)
    experts.config._experts_implementation = "upcycled"
    with pytest.raises(KeyError, match="`upcycled` is not a valid experts implementation"):
        experts(*routed(3, torch.float32, gaps=False))
