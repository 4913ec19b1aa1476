"""Concrete values in a graph of fake tensors: those that follow from small integer inputs.

On fake tensors a model cannot ask ``if mask.all()`` or call ``lengths.tolist()``. But such values
depend on token ids, masks and sizes alone, never on a float weight or a float input. They are
worked out beside the fake tensors, by running the same call on the real ones.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

_LIMIT = 2**20  # elements of a tensor whose values are kept
_UNSET = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class UnknownValueError(Exception):
    """A value depends on weights, on float inputs or on chance."""


class ConcreteValues:
    """The real tensor of each fake one whose value is known; views stay views."""

    def __init__(self) -> None:
        self._real: dict[int, torch.Tensor] = {}

    def learn(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """`fake`, which must stay alive, has the value of `real`, unless that is too large."""
        if self.small([fake]):
            self._real[id(fake)] = real

    def small(self, fakes: Iterable[torch.Tensor]) -> bool:
        """Whether values of these sizes are worth keeping."""
        return all(fake.numel() <= _LIMIT for fake in fakes)

    def forget(self, fakes: Iterable[torch.Tensor]) -> None:
        """Their memory was written with something unknown."""
        for fake in fakes:
            self._real.pop(id(fake), None)

    def run(
        self, func: Callable[..., Any], args: Any, kwargs: Any, *, shape_only: bool = False
    ) -> Any:
        """The real result of a call; a call that writes has written to the real tensors.

        With `shape_only` float arguments need not be known: zeros stand in for them. That gives the
        shape of ``x[mask]``, whose size follows from the mask alone.

        Raises:
            UnknownValueError: an argument is not known, or the call draws random numbers.
        """
        real = self._stand_in if shape_only else self._known
        args, kwargs = pytree.tree_map_only(torch.Tensor, real, (args, kwargs))
        with unset_fake_temporarily():
            chance = torch.default_generator.get_state()
            try:
                out = func(*args, **kwargs)
                if getattr(func, "__name__", "") in _UNSET:
                    out.zero_()  # a model writes to it before it reads
                draws = not torch.equal(torch.default_generator.get_state(), chance)
            except Exception as error:  # as a real tensor it has another fault: not a value
                raise UnknownValueError from error
            if draws:
                torch.default_generator.set_state(chance)
                raise UnknownValueError
        return out

    def with_numbers(self, args: Any, kwargs: Any) -> Any:
        """The arguments of a call with numbers in place of known tensors of one integer."""

        def number(leaf: Any) -> Any:
            if isinstance(leaf, slice):
                return slice(number(leaf.start), number(leaf.stop), number(leaf.step))
            real = self._real.get(id(leaf))
            if real is None or real.dim() or real.is_floating_point():
                return leaf
            with unset_fake_temporarily():
                return real.item()

        return pytree.tree_map(number, (args, kwargs))

    def knows(self, fakes: Iterable[torch.Tensor]) -> bool:
        """Whether the values of all of these are known."""
        return all(id(fake) in self._real for fake in fakes)

    def content(self, fake: torch.Tensor) -> bytes | None:
        """The bytes of the value of `fake`, to compare it by; None if it is not known."""
        real = self._real.get(id(fake))
        if real is None:
            return None
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            return bytes(real.contiguous().flatten().view(torch.uint8).numpy())

    def _known(self, fake: torch.Tensor) -> torch.Tensor:
        try:
            return self._real[id(fake)]
        except KeyError:
            raise UnknownValueError from None

    def _stand_in(self, fake: torch.Tensor) -> torch.Tensor:
        if id(fake) in self._real or not fake.is_floating_point():
            return self._known(fake)
        with unset_fake_temporarily():
            return torch.zeros(fake.shape, dtype=fake.dtype)
