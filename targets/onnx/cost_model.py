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
        """What takes time: experts, those that are visited, their weights that are read, and
        arranged for a product of matrices, products, numbers of tokens that are carried to experts
        and back, activations that are no GELU, and those that are.
        """
        count, k = self.num_experts, self.top_k
        visited = count * (1 - (1 - k / count) ** self.tokens)
        weights = (self.arity + 1) * self.d_model * self.width
        pairs = self.tokens * k
        hidden = pairs * self.width
        return (
            count,
            visited,
            visited * weights,
            visited * weights * max(0.0, 1 - visited / pairs),
            pairs * weights,
            pairs * self.d_model,
            hidden * (not self.gelu),
            hidden * self.gelu,
        )


# Nanoseconds for each of `Work.features`.
NANOSECONDS: Final[dict[str, tuple[float, ...]]] = {
    "fused": (79.7, 0, 0.0967, 0.221, 0.00888, 1.32, 8.49, 15.6),
    "unrolled": (914, 2030, 0.11, 0.0357, 0.00795, 1.58, 1.5, 0),
    "int8": (82.6, 1800, 0.145, 0.0405, 0.00903, 0.982, 7.92, 15.5),
    "int8 blocks": (260, 1720, 0.0285, 0.00621, 0.00692, 1.66, 9.29, 15.8),
    "int4": (0, 1400, 0.153, 0.0746, 0.00942, 0.893, 7.14, 15.1),
    "int4 blocks": (411, 1830, 0.0481, 0.155, 0.00853, 1.09, 7.21, 14.6),
}


def seconds(kind: str, work: Work) -> float:
    """How long a layer takes in the form `kind`, a key of `NANOSECONDS`."""
    figures = zip(NANOSECONDS[kind], work.features, strict=True)
    return 1e-9 * sum(each * count for each, count in figures)
