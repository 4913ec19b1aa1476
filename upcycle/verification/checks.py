"""Every check of a verification: its tier, its words, and how one is made and judged.

- T0 each row of each expert is traced to the dense row that it came from, bit for bit.
- T1 each converted layer against its dense FFN; for split methods also with all experts at weight
  one, which must be exact; and with distinct experts against a plain loop over them.
- T2 the whole model against the dense one: outputs, predictions and perplexity.
- T3 the written files, loaded as a user would load them.
- T4 ONNX files in ONNX Runtime against PyTorch.
"""

from dataclasses import dataclass
from typing import Final

from upcycle.errors import VerificationError
from upcycle.ir.measured import Check
from upcycle.ir.report import Report


@dataclass(frozen=True)
class CheckKind:
    """What is compared: the tier of the verification, and how reports call it."""

    tier: int
    words: str


TRACED = CheckKind(0, "rows that are not the dense rows they came from")
NEURONS = CheckKind(0, "dense neurons that are not exactly once in the layer")
LAYER = CheckKind(1, "layer")
ALL_EXPERTS = CheckKind(1, "layer with all experts (K = N)")
DISTINCT = CheckKind(1, "layer with distinct experts")
NODES = CheckKind(1, "nodes of a layer against the layer")
END_TO_END = CheckKind(2, "end to end")
RELOADED = CheckKind(3, "files loaded again")
TIES = CheckKind(3, "near ties of experts, files loaded again")
GREEDY = CheckKind(3, "greedy text differs from the dense model's")
TEMPERED = CheckKind(3, "weights of a tempered router")
ELSEWHERE = CheckKind(3, "tokens at other experts, by a tempered router")
ONNX = CheckKind(4, "ONNX Runtime against PyTorch")
ONNX_TIES = CheckKind(4, "near ties of experts, ONNX Runtime against PyTorch")
CHECKER = CheckKind(4, "complaints of the ONNX checker")
ROUNDED_WEIGHTS = CheckKind(4, "rounded weights against float ones, in half steps of their scales")
ROUNDED_KERNEL = CheckKind(4, "rounded experts in ONNX Runtime against PyTorch")
ROUNDED_LAYER = CheckKind(
    4, "rounded experts against float ones, rms over what independent errors give"
)

CHECKS: Final[tuple[CheckKind, ...]] = (
    *(TRACED, NEURONS, LAYER, ALL_EXPERTS, DISTINCT, NODES, END_TO_END),
    *(RELOADED, TIES, GREEDY, TEMPERED, ELSEWHERE),
    *(ONNX, ONNX_TIES, CHECKER, ROUNDED_WEIGHTS, ROUNDED_KERNEL, ROUNDED_LAYER),
)


def check(kind: CheckKind, error: float, allowed: float, *, more: str = "") -> Check:
    """A comparison; an error that is not a number fails. `more` follows the words, as a place."""
    return Check(f"{kind.words}{more}", error, allowed, passed=bool(error <= allowed))


def worst_at(kind: CheckKind, errors: dict[str, float], allowed: float) -> Check:
    """The largest of the errors by path, and where it is."""
    path = max(errors, key=lambda path: errors[path])
    return check(kind, errors[path], allowed, more=f", worst at {path}")


def raise_if_failed(report: Report) -> None:
    """Raise VerificationError, naming the worst failure, if a check of the report did not pass."""
    failed = [found for found in report.checks if not found.passed]
    if not failed:
        return
    worst = max(failed, key=lambda found: found.error - found.allowed)
    layer, where, advice = report.worst_layer, "", "the converted model is wrong, please report it"
    if layer is not None:
        where = f" (of the layers {layer.path} is furthest off, by {layer.relative:.3g})"
    if worst.what == END_TO_END.words:
        advice = "the recipe's verify.max_relative_error sets what is allowed"
    raise VerificationError(
        f"verification failed: {worst.what}: error {worst.error:.3g}, allowed "
        f"{worst.allowed:.3g}{where}; {advice}"
    )
