"""The compiled kernels, under the name by which files that were written earlier import them."""

from upcycle.kernels.compiled import run_compiled as run_compiled
from upcycle.kernels.compiled import run_routed as run_routed
