"""How far two computations of one number may be apart, and the check that they are not further.

Shape suffixes: T tokens, D d_model, F neurons, M expansions, O d_out.
"""

from collections.abc import Sequence

import torch

from upcycle.ir.ffn import FFN, Located, Projection
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.layer_weights import load_weights
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, MoEWeights
from upcycle.layers.moe import MoE
from upcycle.passes.plan.plan import make_plan, needs
from upcycle.passes.transform.transform import transform
from upcycle.pointwise import Pointwise
from upcycle.recipe.schema import Experts, Recipe, Router

ACTIVATIONS: dict[str, Pointwise] = {
    "relu": Pointwise(1, (("relu", ("z0",), {}),), "relu"),
    "relu2": Pointwise(1, (("relu", ("z0",), {}), ("square", ("t0",), {})), "relu2"),
    "gelu": Pointwise(1, (("gelu", ("z0",), {}),), "gelu"),
    "gelu_tanh": Pointwise(1, (("gelu", ("z0",), {"approximate": "tanh"}),), "gelu_tanh"),
    "silu": Pointwise(1, (("silu", ("z0",), {}),), "silu"),
    "swiglu": Pointwise(2, (("silu", ("z0",), {}), ("mul", ("t0", "z1"), {})), "swiglu"),
    "geglu": Pointwise(2, (("gelu", ("z0",), {}), ("mul", ("t0", "z1"), {})), "geglu"),
    "reglu": Pointwise(2, (("relu", ("z0",), {}), ("mul", ("t0", "z1"), {})), "reglu"),
    "bilinear": Pointwise(2, (("mul", ("z0", "z1"), {}),), "bilinear"),
}

# Rounding errors are of either sign. A sum of n of them exceeds LAMBDA times its root mean square
# with a probability below 2 exp(-LAMBDA^2 / 2): 3e-8 for each number that is compared.
LAMBDA = 6.0

# Numbers of the storage dtype that lie between the weights and the output, on one path: both
# rescaled matrices and bias, pre-activation (product, bias), activation, gate, expert output,
# routing weight, their product, the sum over experts, output bias.
ROUNDINGS = 12


def bound(
    ffns: Sequence[FFNWeights],
    x_TD: torch.Tensor,
    dtype: torch.dtype,
    *,
    weights_TN: torch.Tensor | None = None,
    experts: int = 1,
) -> torch.Tensor:
    """How far ``sum_n w_n FFN_n(x)`` in `dtype` may be from the same sum in real arithmetic.

    One FFN is ``y_o = sum_j v_oj h_j`` with ``h_j = f(z_0j, ...)`` and ``z_mj = sum_d u_mjd x_d``.
    Let u be the unit roundoff of `dtype`, a that of the accumulator (float32 for the 16-bit
    types, else `dtype`), and let an error in z move h by its derivative, to first order.

    1. *Sums.* A sum of n products has an error of at most n a times the sum of their magnitudes,
       in any order. So with ``Z_mj = sum_d |u_mjd x_d| + |b_mj|``
       ``A_o = sum_j |v_oj| (|h_j| + sum_m |df/dz_m| Z_mj)`` bounds the error of y_o by ``n a A_o``,
       where n counts all summed products: D for each expansion, F for the contraction, one for
       each expert, and twice D for the logits, whose error moves a softmax by at most twice that
       (for logits whose terms sum to about one in magnitude).
    2. *Storage.* Each number that is kept in `dtype` is off by a relative error of at most u. As
       these errors are independent of each other, their squares add up: with R_o the
       root-sum-square in place of each sum of A_o, the error is below ``LAMBDA sqrt(r) u R_o`` for
       r stored numbers on the way from a weight to the output (`ROUNDINGS`, and one for each
       expert summed).

    In float32 and float64, u = a, and 1 is far above 2: nothing there relies on chance. In
    bfloat16 2 is what counts, and keeps the bound small enough to notice an error of 10 %.

    Args:
        ffns: N FFNs; their values as they are, in float64.
        x_TD: tokens.
        dtype: of the computation that is checked.
        weights_TN: weights of the sum; ones if not given.
        experts: how many expert outputs are added up for one token.

    Returns:
        [T, O] float64.
    """
    u = torch.finfo(dtype).eps / 2
    a = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    square_TO, sum_TO = torch.zeros(()).double(), torch.zeros(()).double()
    products = 0
    for n, ffn in enumerate(ffns):
        one_square_TO, one_sum_TO = _magnitudes(ffn.to(torch.float64), x_TD.double())
        w_T1 = torch.ones(1, 1).double() if weights_TN is None else weights_TN[:, n, None].abs()
        square_TO = square_TO + w_T1**2 * one_square_TO
        sum_TO = sum_TO + w_T1 * one_sum_TO
        arity, d_ff, d_model = ffn.up_MFD.shape
        products = d_model * (arity + 2) + d_ff + experts + ROUNDINGS
    storage_TO: torch.Tensor = LAMBDA * (ROUNDINGS + experts) ** 0.5 * u * square_TO.sqrt()
    return storage_TO + products * a * sum_TO


def _magnitudes(ffn: FFNWeights, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R_o squared and A_o of `bound`, [T, O] each."""
    arity = len(ffn.up_MFD)
    bias_MF = torch.zeros(arity, 1).double() if ffn.up_bias_MF is None else ffn.up_bias_MF
    z_MTF = torch.einsum("mfd,td->mtf", ffn.up_MFD, x_TD) + bias_MF[:, None]
    z_MTF = z_MTF.detach().requires_grad_()
    h_TF = ffn.pointwise(*z_MTF)
    (slope_MTF,) = torch.autograd.grad(h_TF.sum(), z_MTF)
    h_TF = h_TF.detach()
    sums_MTF = torch.einsum("mfd,td->mtf", ffn.up_MFD.abs(), x_TD.abs()) + bias_MF.abs()[:, None]
    squares_MTF = torch.einsum("mfd,td->mtf", ffn.up_MFD**2, x_TD**2) + bias_MF[:, None] ** 2
    a_TF = h_TF.abs() + (slope_MTF.abs() * sums_MTF).sum(0)
    r_TF = h_TF**2 + (slope_MTF**2 * (squares_MTF + z_MTF.detach() ** 2)).sum(0)
    bias_O = torch.zeros(1).double() if ffn.down_bias_O is None else ffn.down_bias_O
    return r_TF @ (ffn.down_OF.t() ** 2) + bias_O**2, a_TF @ ffn.down_OF.t().abs() + bias_O.abs()


def assert_equal_up_to_rounding(
    actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor
) -> None:
    """Fail, naming the worst element, unless ``|actual - expected| <= bound`` everywhere."""
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected.double()).abs()
    excess = error / bound.expand_as(error)
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    got, want, off = (float(tensor[place]) for tensor in (actual, expected, error))
    explained = float(bound.expand_as(error)[place])
    message = (
        f"at {place}: {got:.9g} is {off:.3g} from {want:.9g}, rounding explains {explained:.3g}"
    )
    assert (excess <= 1).all(), message


def random_ffn(
    name: str,
    *,
    d_model: int = 16,
    d_ff: int = 48,
    d_out: int = 16,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> FFNWeights:
    """A dense FFN with pre-activations and outputs of about one, in `dtype`."""
    pointwise = ACTIVATIONS[name]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return FFNWeights(
        pointwise=pointwise,
        up_MFD=draw(pointwise.arity, d_ff, d_model) / d_model**0.5,
        up_bias_MF=draw(pointwise.arity, d_ff) / 2 if bias else None,
        down_OF=draw(d_out, d_ff) / d_ff**0.5,
        down_bias_O=draw(d_out) if bias else None,
    ).to(dtype)


def site(ffn: FFNWeights, path: str = "mlp") -> FFN:
    """A located FFN of the shapes of `ffn`."""
    arity, d_ff, d_model = ffn.up_MFD.shape

    def projection(name: str, rows: int, has_bias: bool) -> Projection:
        bias = f"{path}.{name}.bias" if has_bias else None
        return Projection(f"{path}.{name}", f"{path}.{name}.weight", bias, False, (0, rows, 1))

    return FFN(
        path=path,
        kind="ffn",
        placement="module",
        expansions=tuple(
            projection(f"up{i}", d_ff, ffn.up_bias_MF is not None) for i in range(arity)
        ),
        contraction=projection("down", len(ffn.down_OF), ffn.down_bias_O is not None),
        pointwise=ffn.pointwise,
        d_model=d_model,
        d_ff=d_ff,
        d_out=len(ffn.down_OF),
    )


def convert(ffn: FFNWeights, recipe: Recipe) -> tuple[MoESpec, MoEWeights, MoE]:
    """The decision, the weights and the running layer for one FFN; experts in its dtype."""
    (spec,) = make_plan(Located(ffns=(site(ffn),)), recipe).specs
    weights = transform(ffn, spec, seen(ffn) if needs(recipe) else None)
    return spec, weights, run_layer(spec, weights)


def seen(ffn: FFNWeights, count: int = 512, seed: int = 5) -> FFNInputs:
    """What `ffn` might be given in calibration: random tokens, of 7 ids and 2 domains."""
    _, d_ff, d_model = ffn.up_MFD.shape
    generator = torch.Generator().manual_seed(seed)
    return FFNInputs(
        x=random_tokens(count, d_model, torch.float32, seed=seed).split(200),
        id_T=torch.randint(7, (count,), generator=generator),
        domain_T=torch.arange(count) % 2,
        importance_NF=torch.rand(2, d_ff, generator=generator),
    )


def run_layer(spec: MoESpec, weights: MoEWeights) -> MoE:
    """A layer in evaluation mode that holds `weights`; the router is never below float32."""
    dtype = weights.experts.up_EGD.dtype
    layer = MoE(spec.layer_config()).to(dtype).eval()
    layer.router.to(torch.promote_types(dtype, torch.float32))
    load_weights(layer, weights)
    return layer


def random_tokens(count: int, d_model: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Normal tokens [count, d_model]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d_model, generator=generator, dtype=torch.float64).to(dtype)


def make_recipe(experts: dict[str, object], router: dict[str, object], **rest: object) -> Recipe:
    """A recipe from two small dicts."""
    return Recipe.model_validate(
        {
            "experts": Experts.model_validate(experts),
            "router": Router.model_validate(router),
            **rest,
        }
    )
