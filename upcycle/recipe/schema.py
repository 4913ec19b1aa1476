"""What a conversion should do, as the user writes it: a short YAML file, or these objects.

Every field has a default except what defines the method, so a recipe says only what is special
about it. `upcycle.recipe.reader` reads YAML and reports every mistake at once.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from upcycle.layers.config import SelectRule, TokenKey, WeightRule
from upcycle.recipe.methods import (
    EXPERT_METHODS,
    ROUTER_METHODS,
    ExpertName,
    ExpertOptions,
    RouterName,
    RouterOptions,
    options_schemas,
)
from upcycle.recipe.onnx import Onnx, Section
from upcycle.util.registry import Registry

FFNKind = Literal["ffn", "bottleneck", "head"]
MOST = 2**24  # of anything that is counted: no model has a tenth of it
CountOrPart = Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, lt=1)]


def _with_options(registry: Registry[Any], section: str) -> ConfigDict:
    def add(schema: dict[str, Any]) -> None:
        if more := options_schemas(registry, f"/$defs/{section}"):
            schema["allOf"] = more

    return ConfigDict(json_schema_extra=add)


class Layers(Section):
    """Which of the located FFNs are converted, counted in the order in which they run, each stack
    (paths that differ in numbers alone) for itself."""

    include: str | tuple[str, ...] = Field("*", description="glob patterns of FFN paths")
    exclude: tuple[str, ...] = Field((), description="glob patterns of FFN paths to leave dense")
    kinds: tuple[FFNKind, ...] = Field(
        ("ffn",),
        min_length=1,
        description="kinds of FFN to convert: ffn (hidden wider than the input), bottleneck "
        "(adapter, squeeze and excitation), head (classifier, pooler, plain MLP that narrows)",
    )
    every: int = Field(1, ge=1, description="convert every n-th of the remaining FFNs")
    start: int | None = Field(
        None, ge=1, description="the first to convert of those that remain; null is the n-th"
    )
    skip_first: CountOrPart = Field(
        0, description="leave the first n FFNs dense; below 1, that fraction of them"
    )
    skip_last: CountOrPart = Field(
        0, description="leave the last n FFNs dense; below 1, that fraction of them"
    )


class Experts(Section):
    """How experts are made from a dense FFN."""

    model_config = _with_options(EXPERT_METHODS, "Experts")

    method: ExpertName = Field(
        description="whole FFNs, slices of copies, or parts of one FFN; see the methods"
    )
    count: int = Field(
        ge=1, le=MOST, description="experts, shared ones included; for granular, copies of the FFN"
    )
    shared: CountOrPart = Field(
        0,
        description="splits: how many of the experts become one that every token visits; below 1, "
        "that part of the neurons besides the experts; copy: 1 for a copy that every token visits",
    )
    shared_by: Literal[
        "norm", "rate", "contribution", "steady", "importance", "domains", "first"
    ] = Field("norm", description="splits: which neurons are shared, those with the largest ...")
    adaptive: bool = Field(
        False,
        description="more shared neurons, or wider experts if `width` is set, in the layers where "
        "they matter more; as many in all",
    )
    width: float | None = Field(
        None,
        gt=0,
        le=1,
        description="token_sets, *_overlap: neurons of one expert, as a part of all",
    )
    common: float = Field(
        0.0, ge=0, le=1, description="importance_overlap: part of an expert that all have in common"
    )
    granularity: int = Field(
        1, ge=1, le=MOST, description="granular, zero_routed: slices that each copy is cut into"
    )
    scale: Literal["down", "up_down", "even"] = Field(
        "down", description="granular: which matrices carry the factor that undoes the averaging"
    )
    features: Literal["gate", "up", "both"] = Field(
        "gate", description="cluster: which rows describe a neuron; a plain FFN has only one kind"
    )
    metric: Literal["cosine", "l2"] = Field(
        "cosine", description="cluster: compare the rows scaled to length one, or as they are"
    )
    markers: int = Field(
        10,
        ge=1,
        le=MOST,
        description="coactivation, activation_carve, shared_by rate, representative: neurons that "
        "are marked active in a token",
    )
    ratio: float = Field(
        0.5, ge=0, le=1, description="drop: part of the neurons that is drawn anew"
    )
    index_set: Literal["neuron", "matrix"] = Field(
        "neuron", description="drop: redraw the same neurons in every matrix, or others in each"
    )
    noise: float = Field(
        0.01,
        ge=0,
        description="noise, svd: standard deviation, relative to the mean |weight| or singular "
        "value",
    )
    rank: int = Field(
        64, ge=1, le=MOST, description="svd: directions of each matrix that stay as they are"
    )
    sources: tuple[str, ...] = Field(
        (), description="from_checkpoints: models, of one shape; `base` is the converted one"
    )
    merge: Literal["mean", "first"] | int = Field(
        "mean",
        description="from_checkpoints: all but the FFNs; a number is that of a source, from 0",
    )
    options: ExpertOptions = Field(
        None,
        validate_default=True,
        exclude_if=lambda options: options is None,
        description="what a method of another package, or of your own, reads besides",
    )


class Router(Section):
    """How tokens find their experts."""

    model_config = _with_options(ROUTER_METHODS, "Router")

    method: RouterName = Field(
        description="how the scores of the experts are made; see the methods"
    )
    top_k: Annotated[int, Field(ge=1, le=MOST)] | Literal["all"] = Field(
        description="experts that a token visits, besides the shared one"
    )
    weights: WeightRule = Field(description="how the outputs of the visited experts are weighted")
    select: SelectRule = Field(
        "top_k", description="which experts a token visits; most rules use `top_k` as a bound"
    )
    mass: float = Field(0.4, ge=0, le=1, description="top_p, entropy: probability to reach")
    above: float = Field(0.9, description="entropy: visit all experts above this entropy")
    q: float = Field(1.1, gt=0, le=2, description="entropy: index of the Tsallis entropy")
    nulls: int = Field(0, ge=0, le=MOST, description="null: experts that do nothing")
    balance: bool = Field(
        False, description="add a bias to the selection alone, which balances the load in training"
    )
    std: float = Field(
        0.02,
        ge=0,
        description="normal, uniform, virtual_group, noisy_topk, random_fixed: standard deviation; "
        "1e-6 makes a router that prefers no expert and still breaks ties",
    )
    hidden: int = Field(
        0,
        ge=0,
        le=MOST,
        description="mlp: width of the hidden layer, 0 is one per expert; cosine: of the small "
        "space, 0 is half as many",
    )
    by: TokenKey = Field(
        "token", description="hash, assigned: what the table of experts is read by"
    )
    entries: int = Field(
        65536,
        ge=1,
        le=MOST,
        description="hash, assigned: rows of the table; a larger id starts over",
    )
    ridge: float = Field(
        0.01,
        gt=0,
        description="ridge, kmeans_lsq: penalty, relative to the mean variance of the input",
    )
    bias: bool | None = Field(
        None, description="add a bias; null is yes where the method makes one, which is not zero"
    )
    tied: bool = Field(
        False, description="avg_key: recompute the rows from the experts in training"
    )
    scale: float | Literal["n_over_k"] = Field(1.0, description="factor on the expert weights")
    options: RouterOptions = Field(
        None,
        validate_default=True,
        exclude_if=lambda options: options is None,
        description="what a method of another package, or of your own, reads besides",
    )


class Compensate(Section):
    """What stands in for the neurons that a token does not visit; closed form, from calibration."""

    scale: bool = Field(False, description="one factor on the output")
    affine: bool = Field(False, description="a factor and an offset for each output")
    mean: bool = Field(False, description="the mean of what was dropped")
    low_rank: CountOrPart = Field(
        0, description="rank of a linear map of the input; below 1, that part of its width"
    )
    refit: bool = Field(False, description="fit the down projections again, on the chosen neurons")
    ridge: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.1, 0.5, 2.0),
        min_length=1,
        description="penalties to try, relative to the size of each input; held-out tokens decide",
    )

    @property
    def changes_down(self) -> bool:
        """Whether the down projections are no longer those of the dense FFN."""
        return self.scale or self.affine or self.refit

    @property
    def any(self) -> bool:
        """Whether anything is switched on."""
        return self.scale or self.affine or self.mean or self.refit or self.low_rank > 0


class Calibration(Section):
    """What the methods that look at activations are shown."""

    tokens: int = Field(
        16384, ge=1, le=2**40, description="tokens of text; or 256 times as many images"
    )
    length: int = Field(512, ge=1, le=MOST, description="tokens of one sequence")
    sequential: bool = Field(
        True, description="each layer sees what the converted layers before it give"
    )


class Verify(Section):
    """What the conversion must hold; beyond it the run fails."""

    max_relative_error: float = Field(
        1e-5, ge=0, description="largest |converted - dense| over the largest |dense|, end to end"
    )


class Recipe(Section):
    """A conversion: which FFNs, how experts are made, how tokens find them, what is promised."""

    version: Literal[1] = Field(1, description="of the recipe format")
    layers: Layers = Layers()
    experts: Experts
    router: Router
    compensate: Compensate = Compensate()
    calibration: Calibration = Calibration()
    onnx: Onnx = Onnx()
    verify: Verify = Verify()
    seed: int = Field(0, ge=0, description="seed of every random draw")
