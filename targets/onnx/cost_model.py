"""Which form of an MoE layer is the fastest on a CPU: figures that were measured, and their sum.

``benchmarks/onnx_forms.py`` measures the forms and fits the figures; ``docs/onnx-forms.md`` has the
table. They are those of one thread of one machine, so they tell which form is faster, and not how
long it takes elsewhere.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Work:
    """What a layer is asked to do.

    Attributes:
        tokens: of one call.
        num_experts, top_k, d_model, width, arity: of the layer.
        gelu: its activation is a GELU, which the kernel computes one number at a time.
    """

    tokens: int
    num_experts: int
    top_k: int
    d_model: int
    width: int
    arity: int = 1
    gelu: bool = False

    @property
    def features(self) -> tuple[float, ...]:
        """What takes time: a call, experts, weights that are read, products, activations."""
        count, k = self.num_experts, self.top_k
        touched = count * (1 - (1 - k / count) ** self.tokens)
        weights = (self.arity + 1) * self.d_model * self.width
        pairs = self.tokens * k
        hidden = pairs * self.width
        return (
            1.0,
            count,
            touched * weights,
            pairs * weights,
            hidden * (not self.gelu),
            hidden * self.gelu,
        )


# Nanoseconds for each of `Work.features`.
NANOSECONDS: Final[dict[str, tuple[float, ...]]] = {
    "fused": (5e4, 2e3, 0.2, 0.03, 1.0, 8.0),
    "unrolled": (5e4, 1e4, 0.2, 0.02, 1.0, 1.0),
    "int8": (5e4, 2e3, 0.2, 0.03, 1.0, 8.0),
    "int8 blocks": (5e4, 2e3, 0.1, 0.03, 1.0, 8.0),
    "int4": (5e4, 2e3, 0.2, 0.03, 1.0, 8.0),
    "int4 blocks": (5e4, 2e3, 0.2, 0.03, 1.0, 8.0),
}


def seconds(kind: str, work: Work) -> float:
    """How long a layer takes in the form `kind`, a key of `NANOSECONDS`."""
    figures = zip(NANOSECONDS[kind], work.features, strict=True)
    return 1e-9 * sum(each * count for each, count in figures)
