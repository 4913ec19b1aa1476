"""Copies that are changed on purpose, and experts that add nothing yet."""

import math
from dataclasses import replace

import numerics
import pytest
import small_models
import torch

import upcycle
from upcycle.errors import PlanError
from upcycle.ir.report import Report
from upcycle.ir.weights import ExpertWeights, FFNWeights
from upcycle.passes.experts.matrices import matrices

ROUTER: dict[str, object] = {
    "method": "normal",
    "top_k": 2,
    "weights": "renormalised",
    "std": 0.2,
}


def experts_of(ffn: FFNWeights, method: str, *, count: int = 4, **more: object) -> ExpertWeights:
    recipe = numerics.make_recipe({"method": method, "count": count, **more}, ROUTER)
    return numerics.convert(ffn, recipe)[1].experts


def rows(experts: ExpertWeights) -> list[torch.Tensor]:
    """Every matrix [E, F, X] of the experts."""
    return [weight_EFX for weight_EFX, _ in matrices(experts)]


def same(one: ExpertWeights, other: ExpertWeights) -> bool:
    equal = [torch.equal(a, b) for a, b in zip(rows(one), rows(other), strict=True)]
    return all(equal) and torch.equal(one.neuron_EI, other.neuron_EI)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("method", "nothing"),
    [("noise", {"noise": 0.0}), ("svd", {"noise": 0.0}), ("drop", {"ratio": 0.0})],
)
def test_changing_nothing_is_copying(name: str, method: str, nothing: dict[str, object]) -> None:
    ffn = numerics.random_ffn(name, dtype=torch.float32)
    copies = experts_of(ffn, "copy")
    assert same(experts_of(ffn, method, **nothing), copies)
    assert not same(experts_of(ffn, method), copies)


@pytest.mark.parametrize("method", ["noise", "svd", "drop"])
def test_experts_differ_and_a_seed_gives_the_same_ones(method: str) -> None:
    ffn = numerics.random_ffn("swiglu", dtype=torch.float32)
    one, again = experts_of(ffn, method, rank=4), experts_of(ffn, method, rank=4)
    assert same(one, again)
    for weight_EFX in rows(one):
        assert all(not torch.equal(weight_EFX[0], other) for other in weight_EFX[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_is_relative_to_the_mean_magnitude(dtype: torch.dtype) -> None:
    ffn = numerics.random_ffn("swiglu", d_model=64, d_ff=128, d_out=64, dtype=dtype)
    experts = experts_of(ffn, "noise", noise=0.5)
    dense = [*ffn.up_MFD, ffn.down_OF.t()]
    for weight_EFX, dense_FX in zip(rows(experts), dense, strict=True):
        off = (weight_EFX.double() - dense_FX.double()) / dense_FX.double().abs().mean()
        # 32768 draws: their standard deviation is off by 1 / sqrt(2 n) = 0.4 %, their mean by
        # 0.5 / sqrt(n) = 0.003; five of those.
        assert abs(float(off.std()) / 0.5 - 1) < 0.02
        assert abs(float(off.mean())) < 0.015
    assert (experts.neuron_EI == -2).all()


@pytest.mark.parametrize("index_set", ["neuron", "matrix"])
def test_drop_redraws_exactly_so_many_neurons(index_set: str) -> None:
    ffn = numerics.random_ffn("swiglu", d_ff=50, dtype=torch.float32)
    experts = experts_of(ffn, "drop", ratio=0.58, index_set=index_set)
    dense = [*ffn.up_MFD, ffn.down_OF.t()]
    changed = torch.stack(
        [(w != d).any(-1) for w, d in zip(rows(experts), dense, strict=True)]
    )  # [matrix, E, F]
    assert (changed.sum(-1) == 29).all()  # 0.58 * 50 is 28.999... in floating point
    assert torch.equal(changed.any(0), experts.neuron_EI == -2)
    kept_EI = experts.neuron_EI[experts.neuron_EI != -2]
    assert (kept_EI >= 0).all()
    is_shared = (changed == changed[0]).all()
    assert is_shared if index_set == "neuron" else not is_shared


def test_drop_keeps_mean_and_standard_deviation_of_what_it_redraws() -> None:
    """A matrix whose mean is not zero; a part whose spread is not that of the rest."""
    ffn = numerics.random_ffn("gelu", d_model=64, d_ff=256, d_out=64, dtype=torch.float32)
    up_MFD = 3 * ffn.up_MFD + 1
    ffn = FFNWeights(ffn.pointwise, up_MFD, ffn.up_bias_MF, ffn.down_OF, ffn.down_bias_O)
    experts = experts_of(ffn, "drop", ratio=0.5, count=2)
    for expert, neuron_I in enumerate(experts.neuron_EI):
        some = neuron_I == -2
        for weight_EFX, dense_FX in zip(rows(experts), [*up_MFD, ffn.down_OF.t()], strict=True):
            old, new = dense_FX[some], weight_EFX[expert, some]
            n = old.numel()
            std = float(old.std())
            assert abs(float(new.mean() - old.mean())) < 5 * std / math.sqrt(n)
            assert abs(float(new.std()) / std - 1) < 5 / math.sqrt(2 * n)


@pytest.mark.parametrize(
    ("ratio", "index_set", "cosine"),
    [(0.1, "neuron", 0.9), (0.5, "neuron", 0.5), (0.1, "matrix", 0.73), (0.5, "matrix", 0.125)],
)
def test_drop_leaves_the_expected_cosine(ratio: float, index_set: str, cosine: float) -> None:
    """Of a gated expert about ``1 - r`` stays, and ``(1 - r)^3`` if each matrix has its own rows.

    Redrawn neurons are independent of the old ones, so their terms add to the length and not to
    the product. 0.05: a finite width, and a mean of the output that all neurons share.
    """
    ffn = numerics.random_ffn("swiglu", d_model=128, d_ff=512, d_out=128, bias=False)
    recipe = numerics.make_recipe(
        {"method": "drop", "count": 1, "ratio": ratio, "index_set": index_set},
        {**ROUTER, "top_k": 1},
    )
    _, _, layer = numerics.convert(ffn, recipe)
    x_TD = numerics.random_tokens(256, 128, torch.float64)
    with torch.no_grad():
        found = torch.cosine_similarity(layer(x_TD), ffn(x_TD), dim=-1).mean()
    assert abs(float(found) - cosine) < 0.05


def test_svd_keeps_the_directions_that_matter_most() -> None:
    ffn = numerics.random_ffn("swiglu", d_model=24, d_ff=40, d_out=24)
    experts = experts_of(ffn, "svd", rank=8, noise=0.3)
    for weight_EFX, dense_FX in zip(rows(experts), [*ffn.up_MFD, ffn.down_OF.t()], strict=True):
        u_FR, s_R, v_RX = torch.linalg.svd(dense_FX, full_matrices=False)
        off_ERR = u_FR.t() @ (weight_EFX - dense_FX) @ v_RX.t()
        values_ER = off_ERR.diagonal(dim1=1, dim2=2)
        # Everything but the rest of the diagonal is rounding: 40 products of about the norm.
        rounding = 40 * 40 * torch.finfo(torch.float64).eps * float(s_R[0])
        assert (off_ERR - torch.diag_embed(values_ER)).abs().max() < rounding
        assert values_ER[:, :8].abs().max() < rounding
        rest = values_ER[:, 8:] / s_R[8:].mean()
        assert abs(float(rest.std()) / 0.3 - 1) < 5 / math.sqrt(2 * rest.numel())


def test_a_rank_beyond_the_matrices_changes_nothing() -> None:
    ffn = numerics.random_ffn("gelu")
    made, copies = experts_of(ffn, "svd", rank=99), experts_of(ffn, "copy")
    assert all(torch.equal(a, b) for a, b in zip(rows(made), rows(copies), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_a_permanent_copy_is_averaged_with_the_chosen_ones(name: str, dtype: torch.dtype) -> None:
    ffn = numerics.random_ffn(name, dtype=dtype)
    recipe = numerics.make_recipe(
        {"method": "copy", "count": 5, "shared": 1},
        {"method": "cosine", "top_k": 2, "weights": "renormalised"},
    )
    spec, _, layer = numerics.convert(ffn, recipe)
    assert (spec.promise, spec.shared, spec.num_experts) == ("exact", 48, 4)
    x_TD = numerics.random_tokens(33, 16, dtype)
    bound_TO = numerics.bound([ffn], x_TD, dtype)
    expected_TO = ffn.to(torch.float64)(x_TD.double())
    with torch.no_grad():
        numerics.assert_equal_up_to_rounding(layer(x_TD), expected_TO, bound_TO)
        layer.shared_expert.down_proj.weight.zero_()
        bias_O = 0 if ffn.down_bias_O is None else ffn.down_bias_O.double()
        half_TO = (expected_TO - bias_O) / 2 + bias_O
        numerics.assert_equal_up_to_rounding(layer(x_TD), half_TO, bound_TO)


ANY_ROUTER: list[dict[str, object]] = [
    {"top_k": 1, "weights": "softmax"},
    {"top_k": 3, "weights": "one", "scale": 2.0},
    {"top_k": 4, "weights": "renormalised", "select": "top_p"},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", [1, 5])  # 48 neurons in 5 slices: padding
@pytest.mark.parametrize("routing", ANY_ROUTER, ids=lambda r: str(r["weights"]))
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_zero_routed_is_exact_behind_every_router(
    name: str, routing: dict[str, object], granularity: int, dtype: torch.dtype
) -> None:
    ffn = numerics.random_ffn(name, dtype=dtype)
    recipe = numerics.make_recipe(
        {"method": "zero_routed", "count": 4, "granularity": granularity},
        {"method": "normal", "std": 0.2, **routing},
    )
    spec, weights, layer = numerics.convert(ffn, recipe)
    assert (spec.promise, spec.shared, spec.width) == ("exact", 48, -(-48 // granularity))
    x_TD = numerics.random_tokens(33, 16, dtype)
    bound_TO = numerics.bound([ffn], x_TD, dtype)
    expected_TO = ffn.to(torch.float64)(x_TD.double())
    with torch.no_grad():
        numerics.assert_equal_up_to_rounding(layer(x_TD), expected_TO, bound_TO)
        layer.experts.down_proj.normal_()
        with pytest.raises(AssertionError):
            numerics.assert_equal_up_to_rounding(layer(x_TD), expected_TO, bound_TO)
    slices = weights.experts.neuron_EI[: min(granularity, 4)]
    assert len({tuple(row) for row in slices.tolist()}) == len(slices)


def test_only_the_contractions_of_zero_experts_learn_at_first() -> None:
    ffn = numerics.random_ffn("swiglu", dtype=torch.float32)
    recipe = numerics.make_recipe(
        {"method": "zero_routed", "count": 4}, {**ROUTER, "weights": "softmax"}
    )
    _, _, layer = numerics.convert(ffn, recipe)
    x_TD = numerics.random_tokens(64, 16, torch.float32)

    def gradients() -> list[float]:
        layer.zero_grad()
        layer(x_TD).square().sum().backward()
        tensors = (layer.experts.down_proj, layer.experts.up_EGD, layer.router.weight)
        return [float(tensor.grad.abs().max()) for tensor in tensors if tensor.grad is not None]

    down, up, router = gradients()
    assert down > 0
    assert (up, router) == (0, 0)
    with torch.no_grad():
        layer.experts.down_proj -= 0.01 * layer.experts.down_proj.grad
    assert all(gradient > 0 for gradient in gradients())


def test_slices_that_do_not_fit_are_refused() -> None:
    recipe = numerics.make_recipe(
        {"method": "zero_routed", "count": 2, "granularity": 49}, {**ROUTER, "top_k": 1}
    )
    with pytest.raises(PlanError, match="48 neurons cannot be cut into 49 slices"):
        numerics.convert(numerics.random_ffn("gelu"), recipe)


@pytest.mark.parametrize(
    ("method", "changed"), [("noise", 1.0), ("svd", 1.0), ("drop", 0.5), ("zero_routed", 0.0)]
)
def test_the_report_says_which_rows_were_changed_on_purpose(method: str, changed: float) -> None:
    recipe = numerics.make_recipe(
        {"method": method, "count": 4}, ROUTER, verify={"max_relative_error": 9.0}
    )
    done = upcycle.convert(small_models.build("llama"), recipe)
    for row in done.report.layers:
        assert row.untraced_rows == 0
        assert (row.redrawn_rows or 0) == changed * 4 * 64
    said = done.report.checks[0].what
    assert ("drawn anew" in said) == (changed > 0)
    if changed < 1:  # the others are still held against the dense ones
        layer = next(m for m in done.model.modules() if isinstance(m, upcycle.MoE))
        kept = done.provenance["model.layers.0.mlp"].expert_EI[1].argmax()
        with torch.no_grad():
            layer.experts.up_EGD[1, kept] += 1
        assert verified_again(done).layers[0].untraced_rows == 1


def verified_again(done: upcycle.Conversion) -> Report:
    return done.opened.verify_module(replace(done.measured, checks=()), done.made)


def test_top_one_softmax_shrinks_the_output_as_documented() -> None:
    """SEPIT and MedPLIB: with logits of 0.577, as of a default `nn.Linear`, 0.41 and 0.65 is left.

    The mean of 4096 tokens, whose weights spread by less than 0.1, is off by less than 0.01.
    """
    ffn = numerics.random_ffn("swiglu", d_model=256, d_ff=8)
    x_TD = numerics.random_tokens(4096, 256, torch.float64)
    for count, left in ((4, 0.41), (2, 0.648)):
        found = []
        for weights in ("softmax", "renorm_detach"):
            routing = {**ROUTER, "top_k": 1, "weights": weights, "std": (3 * 256) ** -0.5}
            recipe = numerics.make_recipe({"method": "copy", "count": count}, routing)
            _, _, layer = numerics.convert(ffn, recipe)
            _, weights_TK, _ = layer.router(x_TD)
            found.append(float(weights_TK.detach().mean()))
            layer(x_TD[:64]).sum().backward()
            assert layer.router.weight.grad.abs().max() > 0
        assert abs(found[0] - left) < 0.03
        assert abs(found[1] - 1) < 1e-12
