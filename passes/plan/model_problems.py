"""What keeps a model from running the routers of a plan; a plan knows FFNs and no model."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from upcycle.errors import UnsupportedError
from upcycle.ir.spec import MoESpec, Plan
from upcycle.layers.token_context import ARGUMENTS, hooked_module


def check_model(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan whose routers `model` cannot serve; no weight is read.

    Raises:
        UnsupportedError: a router looks at an argument that no module around the FFN has, or lets a
            token depend on later ones in a model that writes text.
    """
    for spec in plan.specs:
        for problem in _problems(model, spec):
            raise UnsupportedError(f"{spec.ffn.path}: {problem}")


def _problems(model: nn.Module, spec: MoESpec) -> Iterator[str]:
    router = spec.router_config()
    if router.kind == "table" and hooked_module(model, spec.ffn.path, router.by) is None:
        yield (
            f"the router looks at {ARGUMENTS[router.by]}, and no module around this FFN is called "
            "with them; set another `router.by`, or choose another `router.method`"
        )
    if router.select.rule == "expert_choice" and _writes_text(model, spec.ffn.path):
        yield (
            "with `select: expert_choice` what a token gets depends on later tokens, which a "
            "decoder does not have yet; set `router.select: top_k`, or leave this FFN out with "
            "`layers.exclude`"
        )


def _writes_text(model: nn.Module, path: str) -> bool:
    """Whether the FFN at `path` is in a decoder that makes one token after the other."""
    if not isinstance(model, PreTrainedModel):
        return False
    if getattr(model.config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
        inside = [name for name, module in model.named_modules() if module is encoder]
        return not any(path.startswith(f"{name}.") for name in inside if name)
    return bool(model.can_generate() or getattr(model.config, "is_decoder", False))
