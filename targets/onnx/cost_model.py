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
        """What takes time: experts, those that are visited, their weights that are read, and
        arranged for a product of matrices, products, numbers of tokens that are carried to experts
        and back, activations that are no GELU, and those that are. The dense form is one expert
        that everybody visits.
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
    "fused": (0, 1220, 0.13, 0.231, 0.00847, 0.842, 10.9, 19.2),
    "unrolled": (182, 9080, 0.126, 0.0391, 0.00847, 1.38, 0.961, 0),
    "dense": (0, 0, 0.0743, 0.142, 0.0093, 1.4, 0.461, 0),
    "int8": (0, 3440, 0.161, 0.0386, 0.00992, 0.691, 7.86, 17),
    "int8 blocks": (0, 4510, 0.0348, 0, 0.00758, 1.42, 10.1, 17),
    "int4": (0, 2400, 0.17, 0.0717, 0.0103, 0.662, 6.75, 16.3),
    "int4 blocks": (58.5, 5080, 0.0484, 0.161, 0.00931, 0.778, 7.25, 15.7),
}


def seconds(kind: str, work: Work) -> float:
    """How long a layer takes in the form `kind`, a key of `NANOSECONDS`."""
    figures = zip(NANOSECONDS[kind], work.features(kind), strict=True)
    return 1e-9 * sum(each * count for each, count in figures)
