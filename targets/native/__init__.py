"""MoE architectures that other software knows, for dense models that fit them exactly.

A checkpoint in such an architecture needs no code of ours. One file per architecture, each a
`NativeTarget`: data, and the one question that data cannot answer (does this config fit?).
"""

from upcycle.targets.native.mixtral import MIXTRAL
from upcycle.targets.native.native import NativeTarget, build_config, choose, fit
from upcycle.targets.native.qwen3_moe import QWEN3_MOE
from upcycle.targets.native.tensors import entries

__all__ = ["NATIVE", "NativeTarget", "build_config", "choose", "entries", "fit"]

# In the order in which they are tried.
NATIVE: dict[str, NativeTarget] = {
    MIXTRAL.model_type: MIXTRAL,
    QWEN3_MOE.model_type: QWEN3_MOE,
}
