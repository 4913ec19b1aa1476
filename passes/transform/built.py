"""Call a method of a recipe, and hold what a method of others returns against the plan."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from upcycle.errors import PlanError, UpcycleError, one_line
from upcycle.ir.weights import ExpertWeights
from upcycle.layers.moe import MoE
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.passes.routers.method import linear
from upcycle.util.registry import Registry


def build_experts(dense: DenseLayer) -> Parts:
    """The experts that the method of the recipe makes.

    Raises:
        PlanError: a method that upcycle does not have failed, or made another layer than planned.
    """
    name = dense.spec.experts.method
    if name in EXPERTS.reserved:
        return EXPERTS[name].build(dense)
    what = f"`experts.method: {name}`"
    build = _entry(EXPERTS, name, dense, what).build
    parts = _called(build, what, dense)
    if isinstance(parts, ExpertWeights):
        parts = Parts(parts)
    if not isinstance(parts, Parts):
        raise _misfit(dense, what, f"returned {type(parts).__name__}; return `Parts`")
    for problem in _misshapen(parts, dense):
        raise _misfit(dense, what, problem)
    return parts


def build_router(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """The tensors of the router that the method of the recipe makes; raises as `build_experts`."""
    spec, name = dense.spec, dense.spec.router.method
    if name in ROUTER_METHODS.reserved:
        return dict(ROUTER_METHODS[name].build(dense, parts))
    what = f"`router.method: {name}`"
    build = _entry(ROUTER_METHODS, name, dense, what).build
    made = _called(build, what, dense, parts)
    if isinstance(made, torch.Tensor):
        made = linear(made, spec)
    if not isinstance(made, Mapping):
        problem = f"returned {type(made).__name__}; return a tensor [E, D], or tensors by name"
        raise _misfit(dense, what, problem)
    with torch.device("meta"):
        router = MoE(spec.layer_config()).router
    ours = {"selection_bias", "gain"}
    wanted = {n: tuple(t.shape) for n, t in router.state_dict().items() if n not in ours}
    shapes = {n: tuple(t.shape) for n, t in made.items()}
    if shapes != wanted:
        raise _misfit(dense, what, f"made the tensors {shapes}, and the router has {wanted}")
    return dict(made)


def _entry(registry: Registry[Any], name: str, dense: DenseLayer, what: str) -> Any:
    if not registry.knows(name):  # as in another process than the one that registered it
        problem = "is not known in this process; a package with an entry point is known in all"
        raise _misfit(dense, what, problem)
    return registry[name]


def _called(build: Callable[..., Any], what: str, dense: DenseLayer, *more: Any) -> Any:
    try:
        return build(dense, *more)
    except UpcycleError:
        raise
    except Exception as error:  # code of others may fail in any way
        problem = f"failed with {type(error).__name__}: {one_line(error)}"
        raise _misfit(dense, what, problem) from error


def _misfit(dense: DenseLayer, what: str, problem: str) -> PlanError:
    return PlanError(f"{what} {problem}", site=dense.spec.ffn.path)


def _misshapen(parts: Parts, dense: DenseLayer) -> Iterator[str]:
    spec, ffn = dense.spec, dense.ffn
    arity, d_model = ffn.up_MFD.shape[0], dense.d_model
    groups = [("", parts.experts, spec.num_experts, spec.width)]
    if parts.shared is not None and spec.shared:
        groups.append(("shared ", parts.shared, 1, spec.shared))
    elif parts.shared is not None or spec.shared:
        yield f"made {'no' if spec.shared else 'a'} shared expert, against the plan"
    for kind, made, count, width in groups:
        biased = ffn.up_bias_MF is not None
        wanted = {
            "up_EGD": (count, arity * width, d_model),
            "up_bias_EG": (count, arity * width) if biased else None,
            "down_EOI": (count, len(ffn.down_OF), width),
            "neuron_EI": (count, width),
        }
        for name, shape in wanted.items():
            tensor = getattr(made, name)
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                yield (
                    f"made {kind}experts whose `{name}` has the shape {found}, and the plan, for "
                    f"the kind `{EXPERTS[spec.experts.method].kind}`, says {shape}"
                )
            elif tensor is not None and name != "neuron_EI" and tensor.dtype != ffn.up_MFD.dtype:
                yield f"made `{name}` in {tensor.dtype}; keep the dtype {ffn.up_MFD.dtype}"
