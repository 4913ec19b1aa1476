"""What a conversion should do, as the user writes it: a short YAML file, or these objects.

Every field has a default except what defines the method, so a recipe says only what is special
about it. `upcycle.recipe_file` reads YAML and reports every mistake at once.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from upcycle.ffn import Kind
from upcycle.moe import WeightRule


class Section(BaseModel):
    """Base of all parts of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Layers(Section):
    """Which of the located FFNs are converted, counted in the order in which they run."""

    include: str | tuple[str, ...] = Field("*", description="glob patterns of FFN paths")
    exclude: tuple[str, ...] = Field((), description="glob patterns of FFN paths to leave dense")
    kinds: tuple[Kind, ...] = Field(
        ("ffn",),
        min_length=1,
        description="kinds of FFN to convert: ffn (hidden wider than the input), bottleneck "
        "(adapter, squeeze and excitation), head (classifier, pooler, plain MLP that narrows)",
    )
    every: int = Field(1, ge=1, description="convert every n-th of the remaining FFNs")
    skip_first: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="leave the first n FFNs dense; below 1, that fraction of them"
    )
    skip_last: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="leave the last n FFNs dense; below 1, that fraction of them"
    )


class Experts(Section):
    """How experts are made from a dense FFN."""

    method: Literal["copy", "granular", "contiguous", "random", "cluster"] = Field(
        description="copy: whole FFNs; granular: slices of copies; others: parts of one FFN"
    )
    count: int = Field(ge=1, description="experts; for granular, copies of the FFN")
    granularity: int = Field(1, ge=1, description="granular: slices that each copy is cut into")
    scale: Literal["down", "up_down", "even"] = Field(
        "down", description="granular: which matrices carry the factor that undoes the averaging"
    )
    features: Literal["gate", "up", "both"] = Field(
        "gate", description="cluster: which rows describe a neuron; a plain FFN has only one kind"
    )


class Router(Section):
    """How tokens find their experts."""

    method: Literal["normal", "virtual_group", "avg_key", "centroid"] = Field(
        description="random rows; the same for the slices of a copy; or made from the experts"
    )
    top_k: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        description="experts that a token visits"
    )
    weights: WeightRule = Field(description="how the outputs of the visited experts are weighted")
    std: float = Field(0.02, ge=0, description="normal, virtual_group: standard deviation")
    bias: bool = Field(False, description="add a bias, which starts at zero")
    tied: bool = Field(
        False, description="avg_key: recompute the rows from the experts in training"
    )
    scale: float | Literal["n_over_k"] = Field(1.0, description="factor on the expert weights")


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
    verify: Verify = Verify()
    seed: int = Field(0, ge=0, description="seed of every random draw")
