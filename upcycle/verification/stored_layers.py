"""Converted layers as they lie in the files of a checkpoint, for tiers T0 and T1."""

from collections.abc import Callable

from upcycle.ir.layer_weights import layer_around
from upcycle.ir.spec import MoESpec
from upcycle.targets.files.read_back import Read, read_layer
from upcycle.targets.native.architecture import NativeTarget
from upcycle.verification.layers import LayerCase


def stored_layers(target: NativeTarget | None, read: Read) -> Callable[[MoESpec], LayerCase]:
    """A function that reads one layer for `upcycle.verification.layers.verify_layers`.

    Args:
        target: the native architecture of the checkpoint, if it is one.
        read: a tensor, or a stack of them, by its name in the files.
    """

    def case(spec: MoESpec) -> LayerCase:
        return LayerCase(layer_around(spec.layer_config(), read_layer(target, spec, read)))

    return case
