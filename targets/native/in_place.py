"""A converted model with the numbers that a native checkpoint holds, for files that share them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from upcycle.ir.layer_weights import weights_of
from upcycle.ir.spec import MoESpec
from upcycle.layers.experts import Activation
from upcycle.layers.moe import MoE
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.fold_layer import router_on_disk, scaled, shared_on_disk
from upcycle.targets.native.fold_router import Fold, fold_of
from upcycle.util.modules import set_within


@contextmanager
def as_on_disk(
    layers: Iterable[tuple[MoESpec, MoE]], target: NativeTarget | None
) -> Iterator[None]:
    """Within it the layers hold the tensors of the checkpoint, and compute what they did.

    Down projections are scaled as there, and the weights of the experts divided; the shared expert
    is as wide, as doubled and as cut into matrices as there, and its output halved. Outputs change
    by rounding only. Memory: the scaled projections and the shared experts. Without a `target`
    nothing changes.
    """
    with ExitStack() as undo:
        for spec, layer in layers if target is not None else ():
            assert target is not None
            made = fold_of(target, spec)
            shared = _shared(layer, target, spec)
            if made.down not in (0, 1):
                down = layer.experts.down_proj
                set_within(undo, down, "data", scaled(down.data, made.down))
                set_within(undo, layer.router, "scale", layer.router.scale / made.down)
            if _only_order_counts(spec):
                _router(undo, layer, made, spec)
            if shared is not None:
                set_within(undo, layer, "shared_expert", shared)
        yield


def _only_order_counts(spec: MoESpec) -> bool:
    """Whether a router times a power of two, or of zeros where all are chosen, does the same."""
    router = spec.router_config()
    is_one = router.select.k == 1 and router.weights == "renormalised"
    has_even_weights = router.weights == "one" or is_one
    return has_even_weights and router.kind == "linear" and not router.balance


def _router(undo: ExitStack, layer: MoE, made: Fold, spec: MoESpec) -> None:
    router = layer.router
    written = router_on_disk(router.state_dict(), made, spec)
    for name, before in (("weight", router.weight), ("bias", router.bias)):
        if before is not None:
            after = written[name] if name in written else torch.zeros_like(before)
            set_within(undo, before, "data", after.to(before))


def _shared(layer: MoE, target: NativeTarget, spec: MoESpec) -> nn.Module | None:
    if layer.shared_expert is None or target.shared is None:
        return None
    weights = shared_on_disk(weights_of(layer), target, spec)
    assert weights is not None
    ups = weights.up_EGD[0].chunk(len(target.shared.matrices) - 1)
    factor = 0.5 if target.shared.gate else 1.0  # the sigmoid of its gate
    return _SharedOnDisk(ups, weights.down_EOI[0], layer.shared_expert.act_fn, factor)


class _SharedOnDisk(nn.Module):
    """A shared expert in the matrices of a checkpoint, which software multiplies by `factor`."""

    def __init__(
        self,
        ups: tuple[torch.Tensor, ...],
        down_OS: torch.Tensor,
        act_fn: Activation,
        factor: float,
    ) -> None:
        super().__init__()
        self.up_proj = nn.ModuleList(_linear(weight_GD) for weight_GD in ups)
        self.down_proj = _linear(down_OS)
        self.act_fn = act_fn
        self.factor = factor

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The sum over the shared neurons, [T, D] -> [T, O]."""
        arity = self.act_fn.pointwise.arity
        z = [z_TS for up in self.up_proj for z_TS in up(x_TD).chunk(arity // len(self.up_proj), -1)]
        y_TO: torch.Tensor = self.down_proj(self.act_fn(*z))
        return y_TO if self.factor == 1 else y_TO * self.factor


def _linear(weight: torch.Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
