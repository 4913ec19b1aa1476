"""Which form of an MoE layer is the fastest on a CPU: figures that were measured, and their sum.

``benchmarks/onnx_forms.py`` measures the forms and fits the figures; ``docs/onnx-forms.md`` has the
table. They are those of one thread of one machine, so they tell which form is faster, and not how
long it takes elsewhere.
"""

from dataclasses import dataclass, replace
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

    def features(self, kind: str) -> tuple[float, ...]:
        """What takes time.

        The number of experts, of visited ones, of their weights that are read, and of those that
        are arranged for a matrix product; of multiplications, of numbers carried to experts and
        back, of activations other than GELU, and of GELUs. The dense form is one expert that every
        token visits.
        """
        if kind == "dense":
            whole = replace(self, num_experts=1, top_k=1, width=self.num_experts * self.width)
            return whole.features("unrolled")
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
    "fused": (2380, 661, 0.211, 0.158, 0.00704, 0.631, 13.7, 24.1),
    "unrolled": (10500, 4110, 0.176, 0, 0.00798, 1.22, 2.06, 1.75),
    "dense": (121000, 0, 0.114, 0.0865, 0.0088, 1.68, 0.815, 0.707),
}


def seconds(kind: str, work: Work) -> float:
    """How long a layer takes in the form `kind`, a key of `NANOSECONDS`."""
    figures = zip(NANOSECONDS[kind], work.features(kind), strict=True)
    return 1e-9 * sum(each * count for each, count in figures)
