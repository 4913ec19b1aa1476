"""ONNX Runtime (1.29): it runs the graph that is written beside the checkpoint."""

from upcycle.ir.spec import Plan
from upcycle.targets.onnx.forms.choose import CUDA_SWIGLU, needs_new_cuda
from upcycle.targets.runtimes.support import Config, Support, loads, refuses


def judge(target: str, config: Config, plan: Plan) -> Support:
    """Whether ONNX Runtime can run ``model.onnx``; the form of the checkpoint does not matter."""
    if config.get("dtype") == "float64":
        return refuses("dtype", "its graph computes in float32; convert with `dtype=float32`")
    onnx = plan.recipe.onnx
    is_new = any(needs_new_cuda(spec.ffn.pointwise, onnx) for spec in plan.specs)
    release = ".".join(map(str, CUDA_SWIGLU))
    limit = f"on CUDA from {release} on: before, its kernel there computes another SwiGLU"
    return loads("the file of `targets=onnx`", limit if is_new else None)
