"""Which software runs a converted model: one file per runtime, and the matrix of all of them."""

from collections.abc import Mapping, Sequence

from upcycle.ir.spec import Plan
from upcycle.targets.runtimes import llama_cpp, onnx_runtime, sglang, transformers, vllm
from upcycle.targets.runtimes.support import Config, Judge, Support

__all__ = ["RUNTIMES", "Support", "matrix", "refusal"]

RUNTIMES: Mapping[str, Judge] = {
    "transformers": transformers.judge,
    "vllm": vllm.judge,
    "sglang": sglang.judge,
    "llama.cpp": llama_cpp.judge,
    "onnxruntime": onnx_runtime.judge,
}


def matrix(target: str, config: Config, plan: Plan) -> dict[str, Support]:
    """What each runtime does with the model; the arguments are those of a `Judge`."""
    return {name: judge(target, config, plan) for name, judge in RUNTIMES.items()}


def refusal(wanted: Sequence[str], target: str, config: Config, plan: Plan) -> str | None:
    """Why one of the `wanted` runtimes does not run it, or None."""
    for name in wanted:
        support = RUNTIMES[name](target, config, plan)
        if support.level == "no":
            return f"`runtimes={name}`: {support.field}: {support.why[0]}"
    return None
