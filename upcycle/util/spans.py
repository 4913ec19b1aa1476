"""Rows of numbers in few characters."""

from collections.abc import Sequence
from itertools import pairwise


def span(numbers: Sequence[int]) -> str:
    """``0..3`` for 0, 1, 2 and 3; ``0,2..8`` where the step is 2; else all of them, ``2,6``."""
    if len(numbers) == 1:
        return str(numbers[0])
    step = numbers[1] - numbers[0]
    is_even = all(b - a == step for a, b in pairwise(numbers))
    if not is_even or step < 1 or (len(numbers) == 2 and step > 1):
        return ",".join(map(str, numbers))
    return f"{numbers[0]}{'' if step == 1 else f',{numbers[1]}'}..{numbers[-1]}"
