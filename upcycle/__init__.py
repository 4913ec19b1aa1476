"""upcycle: a compiler that turns dense neural networks into sparse Mixtures of Experts.

Names are imported when they are first used, so that ``upcycle --help`` does not wait for torch.
With it imported, the Auto classes of transformers load converted models without a trust flag.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any

from upcycle.auto_classes import register as _register
from upcycle.version import __version__

if _TYPE_CHECKING:
    from upcycle.conversion.api import Conversion, convert, locate
    from upcycle.conversion.export import export
    from upcycle.drawing.api import graph
    from upcycle.drawing.write import write_graph
    from upcycle.errors import (
        CaptureError,
        PlanError,
        RecipeError,
        ResourceError,
        UnsupportedError,
        UpcycleError,
        UsageError,
        VerificationError,
    )
    from upcycle.ir.activations import register_activation
    from upcycle.ir.ffn import FFN, Located, Miss
    from upcycle.ir.spec import MoESpec, Plan
    from upcycle.layers.moe import MoE, all_experts
    from upcycle.operations.adapters import adapters
    from upcycle.operations.contrast import SelfContrast
    from upcycle.operations.expert_adapter import ExpertAdapter
    from upcycle.operations.extend import extend
    from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts
    from upcycle.passes.extend import set_new_bias
    from upcycle.passes.plugins import register_expert_method, register_router
    from upcycle.passes.routers.method import RouterMethod
    from upcycle.recipe.reader import load_recipe
    from upcycle.recipe.schema import Recipe
    from upcycle.routing.override import override
    from upcycle.routing.steering import Steering
    from upcycle.routing.trace import Trace, trace
    from upcycle.targets.load import load
    from upcycle.verification.whole_model import verify

__all__ = [
    "FFN",
    "CaptureError",
    "Conversion",
    "DenseLayer",
    "ExpertAdapter",
    "ExpertMethod",
    "Located",
    "Miss",
    "MoE",
    "MoESpec",
    "Parts",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "ResourceError",
    "RouterMethod",
    "SelfContrast",
    "Steering",
    "Trace",
    "UnsupportedError",
    "UpcycleError",
    "UsageError",
    "VerificationError",
    "__version__",
    "adapters",
    "all_experts",
    "convert",
    "export",
    "extend",
    "graph",
    "load",
    "load_recipe",
    "locate",
    "override",
    "register_activation",
    "register_expert_method",
    "register_router",
    "set_new_bias",
    "trace",
    "verify",
    "write_graph",
]

_HOMES = {
    "conversion.api": ("Conversion", "convert", "locate"),
    "conversion.export": ("export",),
    "drawing.api": ("graph",),
    "drawing.write": ("write_graph",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "ir.activations": ("register_activation",),
    "ir.ffn": ("FFN", "Located", "Miss"),
    "targets.load": ("load",),
    "layers.moe": ("MoE", "all_experts"),
    "operations.extend": ("extend",),
    "passes.extend": ("set_new_bias",),
    "passes.experts.method": ("DenseLayer", "ExpertMethod", "Parts"),
    "passes.plugins": ("register_expert_method", "register_router"),
    "passes.routers.method": ("RouterMethod",),
    "recipe.schema": ("Recipe",),
    "routing.override": ("override",),
    "routing.steering": ("Steering",),
    "routing.trace": ("Trace", "trace"),
    "operations.adapters": ("adapters",),
    "operations.contrast": ("SelfContrast",),
    "operations.expert_adapter": ("ExpertAdapter",),
    "recipe.reader": ("load_recipe",),
    "ir.spec": ("MoESpec", "Plan"),
    "verification.whole_model": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

_register()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'upcycle' has no attribute {name!r}")
    return getattr(_import_module(f"upcycle.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
