"""What can be measured of a conversion, as plain data: the parts of a report."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator

# An infinite number is null in JSON.
Number = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]


@dataclass(frozen=True)
class Check:
    """One comparison of a verification.

    Attributes:
        what: what was compared, and where it is worst.
        allowed: the largest error that passes.
        tokens, elsewhere: for a check of near ties, the number of choices of experts, and how many
            of them differ.
    """

    what: str
    error: Number
    allowed: Number
    passed: bool
    tokens: int | None = None
    elsewhere: int | None = None


@dataclass(frozen=True)
class Distance:
    """Between a result and its reference.

    Attributes:
        max_abs: largest absolute difference.
        relative: `max_abs` over the largest absolute reference value.
        rms: norm of the difference over the norm of the reference.
        min_cosine, mean_cosine: of the two tensors as vectors along the last axis.
        top1_agreement: of scores, the part of the rows that have the same largest entry.
    """

    max_abs: Number
    relative: Number
    rms: Number
    min_cosine: Number
    mean_cosine: Number
    top1_agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerDistance(Distance):
    """Between one converted layer and its dense FFN, and what else was measured of the layer.

    Attributes:
        tokens_per_expert: load on the tokens that were compared.
        distinct_experts_relative: with other weights in every expert, against a plain loop.
        all_experts_relative: with all experts at weight one, for a split.
        untraced_rows: neurons that are not their dense neuron.
        redrawn_rows: neurons that were drawn anew.
        lost_neurons: dense neurons that are not exactly once in a split layer.
        inputs: what the layer was run on, if not the tokens it gets in the model.
        nodes_relative: from the layer in torch to its nodes in an ONNX file.
    """

    path: str
    promise: str
    tokens_per_expert: tuple[int, ...]
    distinct_experts_relative: Number
    all_experts_relative: Number | None = None
    untraced_rows: int | None = None
    redrawn_rows: int | None = None
    lost_neurons: int | None = None
    inputs: str | None = None
    nodes_relative: Number | None = None


@dataclass(frozen=True)
class LanguageModel:
    """Next-token predictions: KL divergence in nats per token, and both perplexities."""

    tokens: int
    kl: Number
    top1_agreement: float
    dense_perplexity: float
    converted_perplexity: float


@dataclass(frozen=True)
class ModelDistance:
    """Between two whole models.

    Attributes:
        inputs: what both were run on.
        outputs: the distance of each output.
        relative: the largest relative error of an output.
    """

    inputs: str
    outputs: dict[str, Distance]
    relative: Number
    language_model: LanguageModel | None = None


@dataclass(frozen=True)
class Usage:
    """How the calibration tokens use a layer; see `upcycle.passes.calibrate.usage`."""

    path: str
    tokens: int
    tokens_per_expert: tuple[int, ...]
    dead_experts: int
    load_entropy: float
    captured_mass: float
    compensation: dict[str, float] | None = None

    def cells(self) -> tuple[str, ...]:
        """For a table: path, tokens, load, dead experts, entropy, captured mass."""
        load = f"{min(self.tokens_per_expert)} to {max(self.tokens_per_expert)}"
        figures = (f"{self.load_entropy:.3f}", f"{self.captured_mass:.3f}")
        return (self.path, str(self.tokens), load, str(self.dead_experts), *figures)


@dataclass(frozen=True)
class Calibrated:
    """The calibration data, and how its tokens use each layer."""

    data: str
    batches: int
    sequential: bool
    domains: int | None = None
    layers: tuple[Usage, ...] = ()


@dataclass(frozen=True)
class Costs:
    """The size of a whole model before and after.

    Attributes:
        active_parameters: the parameters after that one token uses.
        flops_before, flops_after: per token, in the linear maps of the converted FFNs and in their
            routers; a multiply-add is two.
        compensation_parameters, compensation_flops: the part of those after from `compensate`.
        bytes_before, bytes_on_disk: of the dense and of the converted weights.
        peak_bytes: the dense model and the converted layers side by side.
        flops_left_dense: per token, in the FFNs that stay dense; earlier versions wrote none.
    """

    parameters_before: int
    parameters_after: int
    active_parameters: int
    flops_before: int
    flops_after: int
    compensation_parameters: int
    compensation_flops: int
    bytes_before: int
    bytes_on_disk: int
    peak_bytes: int
    flops_left_dense: int | None = None

    @property
    def work(self) -> float | None:
        """FLOPs of all FFNs over the dense ones, if they are known."""
        if self.flops_left_dense is None or not self.flops_before + self.flops_left_dense:
            return None
        rest = self.flops_left_dense
        return (self.flops_after + rest) / (self.flops_before + rest)

    def to_json(self) -> dict[str, int | None]:
        """Plain data for ``upcycle plan --json``."""
        return dict(vars(self))


@dataclass(frozen=True)
class Tempered:
    """What tempering the routers of a native file changed: choices of experts, and the outputs."""

    tokens: int
    elsewhere: int
    outputs: dict[str, Distance]


@dataclass(frozen=True)
class Rounded:
    """What rounding the experts of an ONNX file did to one layer.

    Attributes:
        weights_rms: error of each stack of matrices over its size.
        output_rms: error of the output over its size.
        half_steps: largest error of a weight in halves of its step.
        kernel_over_allowed: ONNX Runtime against torch, over what is allowed.
        rounding_over_expected: error of the output over what independent errors give.
    """

    path: str
    bits: int
    block: int | str
    weights_rms: dict[str, float]
    output_rms: float
    half_steps: Number
    kernel_over_allowed: Number
    rounding_over_expected: Number


@dataclass(frozen=True)
class Matrices:
    """The rounded matrices of ONNX files beside the experts: how many, and their bytes.

    Attributes:
        bytes_before: in the type of the graph.
        bytes_after: with their scales.
        half_steps: largest error of an element in halves of its step.
    """

    count: int
    bytes_before: int
    bytes_after: int
    half_steps: Number


@dataclass(frozen=True)
class OnnxFacts:
    """For files that are not float32: their distance from the model, or why they were not run.

    Attributes:
        relative: the largest relative error of an output.
        layers: rounded experts.
        matrices: what else is rounded.
        outputs: the files, as ONNX Runtime runs them, against the model in float32.
        bytes: of the files with rounded weights, on disk.
    """

    relative: Number | None = None
    layers: tuple[Rounded, ...] | None = None
    not_run: str | None = None
    matrices: Matrices | None = None
    outputs: ModelDistance | None = None
    bytes: int | None = None
