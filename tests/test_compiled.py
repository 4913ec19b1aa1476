"""The compiled experts against float64, for every width of registers that this machine can run."""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numerics
import onnx_case
import pytest
import torch
from kernel_case import COUNT, D_MODEL, Routed, expected, made, routed

from upcycle.kernels import (
    activations,
    compiled,
    library_file,
    run_experts,
    visit_by_all,
    weights_of,
)
from upcycle.kernels import torch_cpu as expert_kernels
from upcycle.kernels.compiled import library, run_compiled
from upcycle.layers.experts import Experts, SharedExpert

HAS_COMPILER = library() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no GCC 12 or Clang")
DTYPES = [torch.float32, torch.bfloat16]
CAPABILITY = torch.backends.cpu.get_cpu_capability()
# Registers of 16 floats where there are such, of 8 and of 4.
MACHINES = ["native", "x86-64-v3", "x86-64"]


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: Any) -> Iterator[str]:
    """The library as it is compiled for such a machine."""
    if request.param != "native" and os.uname().machine != "x86_64":
        pytest.skip("not an x86-64")
    if request.param == "x86-64-v3" and CAPABILITY not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2")
    with pytest.MonkeyPatch.context() as patch:
        flags = [flag.replace("native", request.param) for flag in library_file.FLAGS]
        patch.setattr(library_file, "FLAGS", tuple(flags))
        library.cache_clear()
        yield request.param
    library.cache_clear()


def run(experts: Experts, given: Routed) -> torch.Tensor:
    w = weights_of(experts)
    y_TO = run_compiled(*w[:4], w.activation, *given)
    assert y_TO is not None
    return y_TO


# Fewer rows than a register has, tails of every length, several depths and tiles.
SIZES = [(16, 8, 16), (30, 10, 26), (2100, 14, 34), (24, 34, 100)]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", numerics.ACTIVATIONS)
def test_computes_the_experts(machine: str, name: str, dtype: torch.dtype) -> None:
    for (d_model, width, d_out), bias in zip(SIZES, (True, False, True, False), strict=True):
        sizes: dict[str, Any] = {"d_model": d_model, "width": width, "d_out": d_out}
        ffns, experts = made(name, dtype, bias=bias, **sizes)
        for tokens, gaps in ((1, False), (2, True), (9, True), (41, False)):
            given = routed(tokens, dtype, gaps=gaps, d_model=d_model)
            got_TO = run(experts, given)
            assert got_TO.dtype == dtype
            numerics.assert_equal_up_to_rounding(got_TO, *expected(ffns, dtype, given))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_slot_weight_or_activation_is_noticed(machine: str, dtype: torch.dtype) -> None:
    ffns, experts = made("swiglu", dtype)
    x_TD, index_TK, weights_TK = given = routed(9, dtype, gaps=False)
    y_TO, bound_TO = expected(ffns, dtype, given)
    w = weights_of(experts)
    for activation, index, weights in (
        ("silu", index_TK.roll(1, 0), weights_TK),
        ("silu", index_TK, weights_TK.roll(1, 1)),
        ("gelu", index_TK, weights_TK),
    ):
        got_TO = run_compiled(*w[:4], activation, x_TD, index, weights)
        assert got_TO is not None
        with pytest.raises(AssertionError, match="rounding explains"):
            numerics.assert_equal_up_to_rounding(got_TO, y_TO, bound_TO)


def large() -> tuple[Experts, Routed]:
    """Enough for a second thread."""
    _, experts = made("swiglu", torch.float32, d_model=256, width=64, d_out=256)
    return experts, routed(64, torch.float32, gaps=True, d_model=256)


@needs_compiler
def test_threads_do_not_change_a_bit() -> None:
    experts, given = large()
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found += [run(experts, given) for _ in range(5)]
    torch.set_num_threads(before)
    assert all(torch.equal(y_TO, found[0]) for y_TO in found)


@needs_compiler
def test_callers_at_the_same_time_do_not_mix() -> None:
    experts, given = large()
    y_TO = run(experts, given)
    found: list[torch.Tensor] = []
    callers = [
        threading.Thread(target=lambda: found.extend(run(experts, given) for _ in range(20)))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 80
    assert all(torch.equal(other, y_TO) for other in found)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_computes_the_same() -> None:
    experts, given = large()
    y_TO = run(experts, given)  # the helpers exist
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(torch.equal(run(experts, given), y_TO)))
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
    assert queue.get()


@needs_compiler
def test_what_has_weight_zero_is_not_run(machine: str) -> None:
    _, experts = made("swiglu", torch.float32)
    x_TD, _, _ = routed(1, torch.float32, gaps=False)
    experts.up_EGD[4] = float("nan")
    y_TO = run(experts, (x_TD, torch.tensor([[2, 4]]), torch.tensor([[0.5, 0.0]])))
    assert y_TO.isfinite().all()
    nobody = run(experts, (x_TD, torch.tensor([[2, 4]]), torch.zeros(1, 2)))
    assert torch.equal(nobody, torch.zeros(1, D_MODEL))


@needs_compiler
@pytest.mark.parametrize("name", numerics.ACTIVATIONS)
def test_not_a_number_stays_so(machine: str, name: str) -> None:
    for dtype in DTYPES:
        _, experts = made(name, dtype, bias=False)
        x_TD, index_TK, weights_TK = routed(3, dtype, gaps=False)
        x_TD[1, 5] = float("nan")
        y_TO = run(experts, (x_TD, index_TK, weights_TK))
        assert y_TO[1].isnan().all()
        assert y_TO[[0, 2]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("wrong", [COUNT, -1])
def test_an_index_of_no_expert_is_refused(wrong: int) -> None:
    _, experts = made("swiglu", torch.float32)
    x_TD, index_TK, weights_TK = routed(3, torch.float32, gaps=False)
    index_TK[2, 1] = wrong
    with pytest.raises(IndexError, match=r"not in \[0, 6\)"):
        run(experts, (x_TD, index_TK, weights_TK))


@needs_compiler
def test_the_layer_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, experts = made("swiglu", torch.float32)
    given = routed(9, torch.float32, gaps=True)
    y_TO = run(experts, given)
    monkeypatch.setattr(expert_kernels, "choose", None)
    monkeypatch.setattr(expert_kernels, "one_token", None)
    assert torch.equal(run_experts(experts, *given), y_TO)
    assert torch.equal(torch.compile(experts, backend="eager")(*given), y_TO)
    torch.compiler.reset()
    monkeypatch.setattr(expert_kernels, "run_compiled", None)
    with pytest.raises(TypeError):
        run_experts(experts, *given)


def test_what_it_cannot_compute_is_left_to_torch() -> None:
    _, experts = made("swiglu", torch.float32)
    x_TD, index_TK, weights_TK = routed(3, torch.float32, gaps=False)
    up, up_bias, down, down_bias, _, name, _ = weights_of(experts)
    given = (index_TK, weights_TK)
    assert run_compiled(up, up_bias, down, down_bias, None, x_TD, *given) is None
    wanted = x_TD.clone().requires_grad_()
    assert run_compiled(up, up_bias, down, down_bias, name, wanted, *given) is None
    wide = [t.double() for t in (up, down)]
    assert run_compiled(wide[0], None, wide[1], None, name, x_TD.double(), *given) is None
    turned = down.mT.contiguous().mT
    assert run_compiled(up, up_bias, turned, down_bias, name, x_TD, *given) is None
    odd = [t.bfloat16() for t in (torch.zeros(6, 6, 16), torch.zeros(6, 16, 3))]
    assert run_compiled(odd[0], None, odd[1], None, name, x_TD.bfloat16(), *given) is None


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
def test_an_expert_that_all_visit(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (ffn, *_), experts = made("swiglu", torch.float32, bias=bias)
    shared = SharedExpert(D_MODEL, 8, D_MODEL, pointwise=ffn.pointwise, bias=bias)
    shared.requires_grad_(False)
    shared.up.weight.copy_(experts.up_EGD[0])
    shared.down_proj.weight.copy_(experts.down_proj[0])
    if bias:
        assert experts.up_bias_EG is not None
        shared.up.bias.copy_(experts.up_bias_EG[0])
    x_TD, _, _ = routed(9, torch.float32, gaps=False)
    y_TO = shared(x_TD)
    bound_TO = numerics.bound([ffn], x_TD, torch.float32)
    numerics.assert_equal_up_to_rounding(y_TO, ffn.to(torch.float64)(x_TD.double()), bound_TO)
    assert torch.equal(y_TO, visit_by_all(shared, x_TD))
    # An adapter or a hook is seen.
    handle = shared.down_proj.register_forward_hook(lambda *_: torch.zeros(9, D_MODEL))
    assert not shared(x_TD).any()
    handle.remove()
    monkeypatch.setattr(shared.up, "forward", lambda x_TD: torch.zeros(len(x_TD), 16))
    assert not shared(x_TD).any()


def test_a_router_of_few_tokens_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = onnx_case.moe("relu").eval(), []
    choose = layer.router.choose

    def watched(logits_TE: torch.Tensor) -> Any:
        seen.append(torch.get_num_threads())
        if len(logits_TE) == 3:
            raise RuntimeError("broken")
        return choose(logits_TE)

    monkeypatch.setattr(layer.router, "choose", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer(torch.zeros(5, 16))
        layer.router_size = 2**23
        layer(torch.zeros(5, 16))
        layer.router_size = 1
        with pytest.raises(RuntimeError, match="broken"):
            layer(torch.zeros(3, 16))
        assert (seen, torch.get_num_threads()) == ([1, 2, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_names_of_activations() -> None:
    assert activations.of_pointwise("swiglu", 2) == "silu"
    assert activations.of_pointwise("silu", 2) is None
    assert activations.of_pointwise("custom", 1) is None
    assert set(compiled.ACTIVATIONS) >= set(activations._OF_CLASS.values())
    _, experts = made("swiglu", torch.float32)
    assert activations.of_module(experts) == "silu"
    experts.act_fn.dropout = 0.1
    assert activations.of_module(experts.train()) is None


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_torch_does_it(
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, experts = made("swiglu", torch.float32)
    given = routed(9, torch.float32, gaps=False)
    monkeypatch.setenv("UPCYCLE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(library_file, "COMPILERS", ())
    library.cache_clear()
    with caplog.at_level(logging.WARNING):
        y_TO = run_experts(experts, *given)
    assert "slower" in caplog.text
    assert not list(tmp_path.iterdir())
    caplog.clear()
    monkeypatch.setenv("UPCYCLE_COMPILE", "0")
    library.cache_clear()
    assert torch.equal(run_experts(experts, *given), y_TO)
    assert not caplog.text
    library.cache_clear()
