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
        """What takes time: a call, experts, weights that are read, and arranged, for a product of
        matrices, products, activations that are no GELU, and those that are.
        """
        count, k = self.num_experts, self.top_k
        touched = count * (1 - (1 - k / count) ** self.tokens)
        weights = (self.arity + 1) * self.d_model * self.width
        pairs = self.tokens * k
        hidden = pairs * self.width
        return (
            1.0,
            count,
            touched * weights,
            touched * weights * max(0.0, 1 - touched / pairs),
            pairs * weights,
            hidden * (not self.gelu),
            hidden * self.gelu,
        )


# Nanoseconds for each of `Work.features`.
NANOSECONDS: Final[dict[str, tuple[float, ...]]] = {
    "fused": (0, 213, 0.0903, 0.322, 0.00789, 16, 24.9),
    "unrolled": (0, 3370, 0.0956, 0.153, 0.00876, 5.09, 4.19),
    "int8": (0, 467, 0.143, 0.0989, 0.00789, 14.1, 22.9),
    "int8 blocks": (0, 694, 0.0288, 0.0243, 0.00755, 15.9, 24.4),
    "int4": (0, 282, 0.152, 0.111, 0.00809, 13.7, 22.7),
    "int4 blocks": (0, 808, 0.0488, 0.196, 0.00839, 13.1, 21.8),
}


def seconds(kind: str, work: Work) -> float:
    """How long a layer takes in the form `kind`, a key of `NANOSECONDS`."""
    figures = zip(NANOSECONDS[kind], work.features, strict=True)
    return 1e-9 * sum(each * count for each, count in figures)
