"""The usual names of activations, recognised by what they compute.

A program is compared with each known function, so every spelling of one function gets one name:
Bloom's hand-written GELU and ``F.gelu(approximate="tanh")`` are the same.
"""

from dataclasses import replace

from upcycle.ir.same_function import same_function
from upcycle.kernels.activations import NAMED_POINTWISE
from upcycle.pointwise import BUILT_IN, Pointwise


def recognise(program: Pointwise) -> Pointwise:
    """The same program with its name, if it is a known one; the activated argument must be 0."""
    exact = _without_casts(program)
    for name, known in NAMED_POINTWISE.items():
        if same_function(exact, known):
            return replace(program, name=name)
    if len(program.steps) == 1 and (op := program.steps[0][0]) not in BUILT_IN:
        return replace(program, name=op)  # it was registered
    return program


def _without_casts(program: Pointwise) -> Pointwise:
    """A rounding on the way (an activation computed in float32) does not change the name."""
    steps = (
        ("add", (step[1][0], 0), {}) if step[0] in {"cast", "cast_like"} else step
        for step in program.steps
    )
    return Pointwise(program.arity, tuple(steps))


def swapped(program: Pointwise) -> Pointwise:
    """The same function with its two arguments exchanged."""
    flip = {"z0": "z1", "z1": "z0"}
    steps = []
    for op, args, kwargs in program.steps:
        renamed = (flip.get(arg, arg) if isinstance(arg, str) else arg for arg in args)
        steps.append((op, tuple(renamed), kwargs))
    return Pointwise(program.arity, tuple(steps))
