"""How large an error of rounding can be."""

import torch

# The largest relative error that counts as rounding, for the dtype of the computation. A residual
# stack of L layers with sums of n products errs by about sqrt(L * n) eps; 84 eps in float32 and
# float64 and 2.5 eps in the half types (whose products are summed in float32) cover L * n up to
# 7000 at the typical error of 1 eps and leave a wrong expert, at 1e-2 and more, far outside.
ROUNDING = {
    torch.float64: 2e-14,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}


def is_rounding(relative: float, dtype: str) -> bool:
    """Whether a relative error is no more than rounding in `dtype`, such as ``float32``."""
    return relative <= ROUNDING[getattr(torch, dtype)]
