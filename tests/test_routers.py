"""Every kind of router: what it scores, that it is stored, and what it does to the function.

Shape suffixes: T tokens, D d_model, E experts.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numerics
import pytest
import small_models
import torch
from test_remote_code import without_upcycle
from torch import nn

from upcycle.conversion.api import convert
from upcycle.errors import PlanError, UnsupportedError
from upcycle.ir.ffn import Located
from upcycle.layers.moe import MoE
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.passes.routers.contributions import contributions, regress
from upcycle.passes.routers.kmeans_lsq import clusters, fit
from upcycle.passes.routers.mlp import captured_mass
from upcycle.targets.onnx.layers import layers_of

SPLIT: dict[str, object] = {"method": "cluster", "count": 6}
COPIES: dict[str, object] = {"method": "copy", "count": 6}
SLICES: dict[str, object] = {"method": "granular", "count": 3, "granularity": 2}
F32 = torch.float32


def made(method: str, experts: dict[str, object] | None = None, **router: object) -> Any:
    """FFN, weights and layer of 6 experts, of which a token visits 2."""
    ffn = numerics.random_ffn("swiglu", dtype=F32)
    routing = {"method": method, "top_k": 2, "weights": "one", **router}
    kind = SLICES if method == "virtual_group" else SPLIT
    _, weights, layer = numerics.convert(ffn, numerics.make_recipe(experts or kind, routing))
    return ffn, weights, layer


def tokens(count: int = 50) -> torch.Tensor:
    return numerics.random_tokens(count, 16, F32)


def logits(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    layer.router.stand_in(len(x_TD))
    with torch.no_grad():
        found: torch.Tensor = layer.router(x_TD)[0]
    return found


@pytest.mark.parametrize("method", ROUTER_METHODS)
def test_a_router_is_deterministic_and_leaves_the_global_generator_alone(method: str) -> None:
    state = torch.get_rng_state()
    first, again = made(method)[1].router, made(method)[1].router
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert tensor.dtype in (F32, torch.int64)
        assert not tensor.requires_grad


@pytest.mark.parametrize("method", sorted(set(ROUTER_METHODS) - {"noisy_topk"}))
def test_training_mode_does_not_change_scores(method: str) -> None:
    layer = made(method)[2]
    before = logits(layer, tokens())
    assert torch.equal(logits(layer.train(), tokens()), before)


@pytest.mark.parametrize(
    "method", sorted(set(ROUTER_METHODS) - {"hash", "assigned", "oracle", "zero"})
)
def test_renumbered_experts_give_the_same_output(method: str) -> None:
    """Rows of the router and experts together; a table is renumbered by its content, and where all
    scores are equal the numbers decide."""
    layer, x_TD = made(method)[2], tokens()
    y_TO = layer(x_TD)
    order_E = torch.tensor([3, 1, 5, 0, 2, 4])
    state = layer.state_dict()
    for name, tensor in state.items():
        last = name.rpartition(".")[2]
        axis = 1 if method == "representative" and name.startswith("router") else 0
        if name.startswith("experts.") or (
            name.startswith("router.") and last not in ("reduce", "weight_in")
        ):
            state[name] = tensor.index_select(axis, order_E)
    other = MoE(layer.config).eval()
    other.load_state_dict(state)
    # The sum over two experts is in another order at most; outputs are below 10.
    torch.testing.assert_close(other(x_TD), y_TO, rtol=0, atol=10 * 100 * 2**-24)


PRESERVED = {  # weights -> is the layer the dense FFN, for copies and for splits with K = N
    "renormalised": (True, False),
    "renorm_detach": (True, False),
    "softmax": (False, False),
    "one": (False, True),
    "gain": (False, True),
}


@pytest.mark.parametrize("weights", PRESERVED)
@pytest.mark.parametrize("method", sorted(ROUTER_METHODS))
def test_function_preservation(method: str, weights: str) -> None:
    gate = ROUTER_METHODS[method]
    if method == "oracle" and weights != "one":
        pytest.skip("refused: an oracle has no probabilities")
    ffn, x_TD = numerics.random_ffn("swiglu", dtype=F32), tokens()
    bound_TO = numerics.bound([ffn] * 2, x_TD, F32, experts=6) * 6
    is_exact = PRESERVED[weights]
    if "copies" in gate.kinds:
        routing = {"method": method, "top_k": 2, "weights": weights}
        layer = numerics.convert(ffn, numerics.make_recipe(COPIES, routing))[2]
        layer.router.stand_in(len(x_TD))
        off_TO = (layer(x_TD) - ffn(x_TD)).abs()
        # A table gives its experts all of the probability, so there softmax is renormalised.
        sums_to_one = is_exact[0] or (method in ("hash", "assigned") and weights == "softmax")
        assert bool((off_TO <= bound_TO).all()) is sums_to_one
    if "split" in gate.kinds:
        routing = {"method": method, "top_k": "all", "weights": weights}
        layer = numerics.convert(ffn, numerics.make_recipe(SPLIT, routing))[2]
        layer.router.stand_in(len(x_TD))
        off_TO = (layer(x_TD) - ffn(x_TD)).abs()
        assert bool((off_TO <= bound_TO).all()) is is_exact[1]


# Linear ones


def test_uniform_is_centred_bounded_and_as_wide_as_asked_for() -> None:
    ffn = numerics.random_ffn("gelu", d_model=512, d_ff=16)
    routing = {"method": "uniform", "top_k": 2, "weights": "one", "std": 0.05}
    experts = {"method": "copy", "count": 32}
    weight_ED = numerics.convert(ffn, numerics.make_recipe(experts, routing))[1].router["weight"]
    assert weight_ED.abs().max() <= 3**0.5 * 0.05
    assert abs(float(weight_ED.std()) / 0.05 - 1) < 0.03  # five times the error of 16384 draws
    assert abs(float(weight_ED.mean())) < 5 * 0.05 / 16384**0.5


def test_zero_is_zero_and_a_tiny_std_spreads_the_tokens() -> None:
    assert not made("zero", COPIES)[1].router["weight"].any()
    layer = made("normal", COPIES, std=1e-6, weights="softmax")[2]
    _, weights_TK, index_TK = layer.router(tokens(500))
    torch.testing.assert_close(weights_TK, torch.full_like(weights_TK, 1 / 6), rtol=0, atol=1e-5)
    assert (torch.bincount(index_TK.flatten(), minlength=6) > 0).all()


def test_null_rows_are_copies_of_the_true_ones() -> None:
    weights = made("random_fixed", COPIES, select="null", nulls=8, top_k=3)[1]
    for tensor in weights.router.values():
        assert torch.equal(tensor[6:], tensor[[0, 1, 2, 3, 4, 5, 0, 1]])


def test_copied_nulls_keep_the_function_at_the_start() -> None:
    more = {"select": "null", "nulls": 6, "top_k": 3, "weights": "renormalised"}
    ffn, _, layer = made("normal", COPIES, **more)
    off_TO = (layer(tokens()) - ffn(tokens())).abs()
    assert (off_TO <= numerics.bound([ffn] * 2, tokens(), F32, experts=6)).all()
    assert layer.router(tokens())[1].count_nonzero(1).unique().tolist() == [2]


def test_a_fixed_router_is_not_trained_and_no_optimizer_knows_it(tmp_path: Path) -> None:
    layer = made("random_fixed")[2].train()
    assert {n for n, _ in layer.router.named_buffers()} == {"weight", "bias"}
    assert not list(layer.router.parameters())
    before = copy.deepcopy(layer.router.state_dict())
    assert before["bias"].any()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(tokens()).square().sum().backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(layer.parameters()))
    assert all(torch.equal(before[name], t) for name, t in layer.router.state_dict().items())
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert not list(again.router.parameters())


def test_a_bias_is_on_where_the_method_makes_one() -> None:
    for method in ("ridge", "kmeans_lsq", "random_fixed"):
        assert made(method)[1].router["bias"].any()
        assert "bias" not in made(method, bias=False)[1].router
    assert "bias" not in made("normal")[1].router


def test_ridge_is_least_squares_with_a_bias_and_stays_so_far_from_zero() -> None:
    x_TD = numerics.random_tokens(400, 5, torch.float64)
    t_TE = numerics.random_tokens(400, 3, torch.float64, seed=7)
    ones = torch.cat([x_TD, torch.ones(400, 1).double()], 1)
    expected = torch.linalg.lstsq(ones, t_TE).solution
    for offset in (0.0, 1e6):
        pairs = zip((x_TD + offset).split(150), t_TE.split(150), strict=True)
        weight_ED, bias_E = regress(pairs, penalty=1e-12)
        # The penalty moves the solution by a part of 1e-12, tokens at 1e6 are off by 1e-10.
        torch.testing.assert_close(weight_ED, expected[:-1].t(), rtol=0, atol=1e-8)
        moved_E = bias_E + offset * weight_ED.sum(1)
        torch.testing.assert_close(moved_E, expected[-1], rtol=0, atol=1e-8)


def test_ridge_of_equal_tokens_predicts_the_mean() -> None:
    t_TE = numerics.random_tokens(20, 3, torch.float64)
    weight_ED, bias_E = regress([(torch.full((20, 4), 2.0), t_TE)], penalty=0.01)
    assert not weight_ED.any()
    torch.testing.assert_close(bias_E, t_TE.mean(0), rtol=0, atol=1e-14)


def mass(method: str, top_k: int = 2) -> float:
    ffn, weights, layer = made(method, top_k=top_k)
    pairs = list(contributions(ffn, weights.experts.neuron_EI, numerics.seen(ffn, 512, seed=99)))
    x_TD, size_TE = torch.cat([x for x, _ in pairs]), torch.cat([size for _, size in pairs])
    return captured_mass(logits(layer, x_TD), size_TE, top_k)


def test_fitted_routers_capture_more_on_new_tokens_than_blind_ones() -> None:
    blind = max(mass("normal"), mass("zero"))
    for method in ("ridge", "mlp", "kmeans_lsq"):
        assert mass(method) > blind + 0.01, method
    assert mass("mlp") > mass("cosine") + 0.02


def test_no_router_adds_more_to_the_output_than_the_oracle() -> None:
    layer, x_TD = made("oracle")[2], tokens()
    _, _, best_TK = layer.router(x_TD)
    with torch.no_grad():
        size_TE = torch.stack([layer.experts.expert(e, x_TD).norm(dim=-1) for e in range(6)], -1)
    assert torch.equal(best_TK, size_TE.topk(2).indices)
    assert not list(layer.router.state_dict())
    assert len(dict(layer.named_parameters())) == len(list(layer.experts.parameters())) + 1
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.experts.down_proj[0] *= 100
    assert (twin.router(x_TD)[2] == 0).any(-1).all(), "a copy reads its own experts"
    assert not (layer.router(x_TD)[2] == 0).any(-1).all()


# k-means and least squares


def cloud(centres: torch.Tensor, each: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    label_T = torch.arange(len(centres)).repeat_interleave(each)
    noise = 0.1 * numerics.random_tokens(len(label_T), centres.shape[1], F32)
    return centres[label_T] + noise, label_T


def accuracy(x_TD: torch.Tensor, label_T: torch.Tensor, fitted: Any) -> float:
    weight_ED, bias_E = fitted
    return float(((x_TD.double() @ weight_ED.t() + bias_E).argmax(1) == label_T).float().mean())


def test_separable_clusters_are_told_apart() -> None:
    x_TD, label_T = cloud(torch.eye(5) * 3)
    assert accuracy(x_TD, label_T, fit(x_TD, label_T, 5, penalty=0.01)) == 1
    found_T = clusters(x_TD, 5, generator=torch.Generator().manual_seed(0))
    assert len({(int(a), int(b)) for a, b in zip(found_T, label_T, strict=True)}) == 5


def test_clusters_in_a_row_are_told_apart_where_least_squares_cannot() -> None:
    x_TD, label_T = cloud(torch.arange(3.0)[:, None] * torch.ones(3, 4))
    wanted_TE = nn.functional.one_hot(label_T, 3).float()
    assert accuracy(x_TD, label_T, regress([(x_TD, wanted_TE)], penalty=0.01)) < 0.9
    assert accuracy(x_TD, label_T, fit(x_TD, label_T, 3, penalty=0.01)) == 1


def test_fewer_distinct_tokens_than_clusters() -> None:
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 1)
    group_T = clusters(x_TD, 4, generator=torch.Generator().manual_seed(0))
    assert len(set(group_T.tolist())) == 2
    weight_ED, bias_E = fit(x_TD, group_T, 4, penalty=0.01)
    assert weight_ED.isfinite().all()
    assert bias_E.isfinite().all()


# The others


def test_cosine_scores_do_not_see_lengths() -> None:
    layer = made("cosine", COPIES)[2]
    reduce_RD = layer.router.reduce.detach()
    torch.testing.assert_close(reduce_RD @ reduce_RD.t(), torch.eye(3), rtol=0, atol=1e-6)
    logits_TE = logits(layer, tokens())
    assert logits_TE.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(logits(layer, 100 * tokens()), logits_TE, rtol=0, atol=1e-6)
    layer.router(tokens())[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() < 100 for p in layer.router.parameters())


def test_noise_has_its_size_in_training_and_is_absent_in_evaluation() -> None:
    layer, x_TD = made("noisy_topk", COPIES)[2], tokens(4000)
    quiet_TE = logits(layer, x_TD)
    assert torch.equal(logits(layer, x_TD), quiet_TE)
    torch.manual_seed(0)
    noise_TE = logits(layer.train(), x_TD) - quiet_TE
    assert abs(float(noise_TE.std()) - (0.693147 + 0.01)) < 0.02  # 24000 draws: five times 0.0045


def test_mlp_reads_directions_and_the_representative_is_a_neuron() -> None:
    layer = made("mlp")[2]
    torch.testing.assert_close(
        logits(layer, 8 * tokens()), logits(layer, tokens()), rtol=0, atol=1e-5
    )
    ffn, weights, layer = made("representative")
    hidden_TF, logits_TE = ffn.hidden(tokens()).abs(), logits(layer, tokens())
    for e, neurons in enumerate(weights.experts.neuron_EI.tolist()):
        far_N = (hidden_TF[:, neurons] - logits_TE[:, e, None]).abs().amax(0)
        assert far_N.min() < 1e-5


@pytest.mark.parametrize(("top_k", "entries"), [(1, 600), (2, 601), (6, 7)])
def test_a_hash_is_even_and_distinct(top_k: int, entries: int) -> None:
    expert_NK = made("hash", COPIES, top_k=top_k, entries=entries)[1].router["expert"]
    assert expert_NK.shape == (entries, top_k)
    assert all(len(set(row)) == top_k for row in expert_NK.tolist())
    load_E = torch.bincount(expert_NK.flatten(), minlength=6)
    assert load_E.max() - load_E.min() <= top_k
    if top_k == 1:
        assert len(set(expert_NK[:6].flatten().tolist())) == 6


REFUSED = [
    ({"mass": 0.5}, "`router.mass` is of no use with `select: top_k`; leave it out"),
    ({"nulls": 2}, "`router.nulls` is of no use with `select: top_k`"),
    ({"select": "top_p", "above": 0.5}, "`router.above` is of no use with `select: top_p`"),
    ({"select": "top_p", "balance": True}, "`router.balance` is of no use with `select: top_p`"),
    ({"hidden": 4}, "`router.hidden` is of no use with `method: normal`"),
    ({"method": "ridge", "std": 0.1}, "`router.std` is of no use with `method: ridge`"),
    ({"ridge": 0.1}, "set `router.method` to `ridge` or `kmeans_lsq`"),
    ({"by": "type"}, "`router.by` is of no use with `method: normal`"),
    ({"select": "null"}, "`select: null` needs experts that do nothing; set `router.nulls`"),
    ({"select": "null", "nulls": 2, "method": "mlp"}, "`method: mlp` scores no null experts"),
    ({"select": "all"}, "visits every expert, so `router.top_k` has to be `all`"),
    ({"method": "cosine", "bias": True}, "has no bias; leave `router.bias` out"),
    ({"method": "hash", "select": "top_p"}, "leave `router.select` and `router.balance` out"),
    ({"method": "oracle", "weights": "softmax"}, "set `select: top_k` and `weights: one`"),
    ({"method": "oracle", "experts": COPIES}, "copies all add the same"),
    ({"method": "mlp", "experts": COPIES}, "copies all add the same"),
    ({"method": "representative", "experts": COPIES}, "copies all have the same"),
    ({"method": "kmeans_lsq", "experts": COPIES}, "copies are all as good"),
    ({"method": "cosine", "experts": SLICES}, "tears the slices of a copy apart"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=lambda part: str(part)[:60])
def test_senseless_routers_are_refused(changes: dict[str, Any], sentence: str) -> None:
    routing = {"method": "normal", "top_k": 2, "weights": "one", **changes}
    experts = routing.pop("experts", SPLIT)
    found = Located(ffns=(numerics.site(numerics.random_ffn("gelu")),))
    with pytest.raises(PlanError) as error:
        make_plan(found, numerics.make_recipe(experts, routing))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_oracle_is_refused_in_onnx() -> None:
    layer = made("oracle")[2]
    with pytest.raises(UnsupportedError, match="an oracle runs every expert"):
        layers_of(nn.Sequential(layer))


METHODS = ("mlp", "representative", "cosine", "noisy_topk", "hash", "assigned", "random_fixed")
ELSEWHERE = """
import json, sys
from pathlib import Path
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "upcycle":
            raise ImportError("upcycle is not installed here")
sys.meta_path.insert(0, Blocked())
import torch, transformers
transformers.utils.logging.disable_progress_bar()
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    example = torch.load(str(folder) + "/example.pt")
    with torch.no_grad():
        y = model.eval()(**example["inputs"]).logits
    names = [n for n, _ in model.named_parameters() if ".router." in n]
    found[folder.name] = [(y - example["y"]).abs().max().item(), len(names)]
print(json.dumps(found))
"""


def test_every_kind_loads_where_upcycle_is_not_installed(tmp_path: Path) -> None:
    inputs = {
        "input_ids": torch.arange(24).reshape(2, 12),
        "token_type_ids": torch.tensor([[0] * 6 + [1] * 6] * 2),
    }
    parameters = {}
    for method in METHODS:
        more = {"by": "type", "entries": 2} if method == "assigned" else {}
        routing = {"method": method, "top_k": 2, "weights": "one", **more}
        recipe = numerics.make_recipe(
            {"method": "contiguous", "count": 4}, routing, verify={"max_relative_error": 9.0}
        )
        done = convert(small_models.build("bert"), recipe, verify=False)
        done.save(tmp_path / method, verify=False)
        with torch.no_grad():
            y = done.model(**inputs).logits
        torch.save({"inputs": inputs, "y": y}, tmp_path / method / "example.pt")
        named = [name for name, _ in done.model.named_parameters() if ".router." in name]
        parameters[method] = len(named)
    found = without_upcycle(ELSEWHERE, tmp_path)
    assert {method: count for method, (_, count) in found.items()} == parameters
    assert parameters["random_fixed"] == parameters["hash"] == 0
    for method, (error, _) in found.items():
        assert error < 1e-4, (method, json.dumps(found))  # logits are about 10
