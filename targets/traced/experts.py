"""The experts of a model in the form that they have in a graph."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import nn

from upcycle.models.moe_layers import own_experts
from upcycle.util.modules import set_within

Form = Literal["portable", "fused"]
_IMPLEMENTATIONS = {"portable": "portable", "fused": "one_node"}


@contextmanager
def experts_as(model: nn.Module, form: Form) -> Iterator[None]:
    """Within it the `Experts` of `model` are traced in this form.

    - ``portable``: operations of ATen alone; each expert runs on its own tokens.
    - ``fused``: one node a layer, ``upcycle::moe``.
    """
    with ExitStack() as undo:
        for experts in own_experts(model).values():
            set_within(undo, experts.config, "_experts_implementation", _IMPLEMENTATIONS[form])
        yield
