"""Every check of a verification: its words in reports, and how it is judged.

- T0 each row of each expert is traced to the dense row that it came from, bit for bit.
- T1 each converted layer against its dense FFN; for split methods also with all experts at weight
  one, which must be exact; and its routing, on a copy whose experts differ, against a plain loop.
- T2 the whole model against the dense one: outputs, predictions and perplexity.
- T3 the written files, loaded as a user would load them; of a GGUF file, every tensor.
- T4 ONNX files in ONNX Runtime, and programs of torch.export, against PyTorch.
"""

from collections.abc import Mapping, Sequence

from upcycle.errors import VerificationError
from upcycle.ir.measured import Check
from upcycle.ir.report import Report

# T0
TRACED = "weights changed in conversion"
NEURONS = "dense neurons missing from the layer, or in it twice"
# T1
LAYER = "layer"
ALL_EXPERTS = "layer with all experts active"
DISTINCT = "routing of tokens to experts"
NODES = "nodes of a layer against the layer"
# T2
END_TO_END = "end to end"
# T3
RELOADED = "files loaded again"
EXPERTS = "experts found in the model against its own"
TIES = "near ties of experts, files loaded again"
GREEDY = "greedy text differs from the dense model's"
TEMPERED = "weights of a tempered router"
ELSEWHERE = "tokens at other experts, by a tempered router"
MISNAMED = "tensors of the file that are missing or that the model does not have"
UNEQUAL = "tensors of the file that are not those of the model, rounded to its type"
STEPS = "8-bit weights of the file against those of the model, in half steps of their scales"
# T4
ONNX = "ONNX Runtime against PyTorch"
ONNX_TIES = "near ties of experts, ONNX Runtime against PyTorch"
PROGRAM = "exported program loaded again against the model"
CHECKER = "complaints of the ONNX checker"
ROUNDED_WEIGHTS = "rounded weights against float ones, in half steps of their scales"
ROUNDED_KERNEL = "rounded experts in ONNX Runtime against PyTorch"
ROUNDED_LAYER = "rounded experts against float ones, rms over what independent errors give"

ROOT = "(root)"  # a layer that is the model itself
HALF_STEP = 1 + 2 * 127 * 2**-11  # a scale in float16 is off by 2^-11, and is taken 127 times


def check(what: str, error: float, allowed: float) -> Check:
    """A comparison; an error that is NaN fails."""
    return Check(what, error, allowed, passed=bool(error <= allowed))


def worst_at(what: str, errors: Mapping[str, float], allowed: float) -> Check:
    """The largest of the errors by path, and where it is."""
    path = max(errors, key=errors.__getitem__)
    return check(f"{what}, worst at {path or ROOT}", errors[path], allowed)


def raise_if_failed(report: Report) -> None:
    """Raise VerificationError, naming the worst failure, if a check of the report did not pass."""
    layer, where = report.worst_layer, ""
    if layer is not None:
        where = f" (of the layers {layer.path} is furthest off, by {layer.relative:.3g})"
    raise_if_any_failed(report.checks, where)


def raise_if_any_failed(checks: Sequence[Check], where: str = "") -> None:
    """The same for checks by themselves; `where` says more of the place."""
    failed = [found for found in checks if not found.passed]
    if not failed:
        return
    worst = max(failed, key=lambda found: found.error - found.allowed)
    advice = "the converted model is wrong, please report it"
    if worst.what == END_TO_END:
        advice = "the recipe's verify.max_relative_error sets what is allowed"
    raise VerificationError(
        f"verification failed: {worst.what}: error {worst.error:.3g}, allowed "
        f"{worst.allowed:.3g}{where}; {advice}"
    )
