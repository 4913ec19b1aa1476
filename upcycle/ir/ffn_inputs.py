"""What one FFN was given on the calibration set.

Shape suffixes: T tokens, D d_model, F neurons, N domains.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from upcycle.ir.weights import FFNWeights

CHUNK = 2048  # tokens at a time
# Methods read the hidden activations several times: up to this many numbers are cached.
CACHED = 2**27


@dataclass(frozen=True)
class FFNInputs:
    """The inputs of one FFN, without padding, in the dtype of the model.

    Attributes:
        x: the tokens in chunks [t, D], as they came.
        id_T: the vocabulary id of each token, int64, or None.
        domain_T: the domain of each token, int64, or None.
        importance_NF: mean over the tokens of a domain of ``|h dL/dh|`` for each neuron, float32;
            None unless gradients were computed.
    """

    x: tuple[torch.Tensor, ...]
    id_T: torch.Tensor | None = None
    domain_T: torch.Tensor | None = None
    importance_NF: torch.Tensor | None = None
    _cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(map(len, self.x))

    def chunks(self) -> Iterator[torch.Tensor]:
        """The tokens in float32, [t, D] with t at most 2048, always in the same order."""
        for x_TD in self.x:
            for some_TD in torch.split(x_TD, CHUNK):
                yield some_TD.float()

    def hidden(self, ffn: FFNWeights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens [t, D] with the hidden activations of `ffn` on them [t, F], float32.

        They may be cached, so they must not be changed.
        """
        if self._cache.get("rows") is not ffn.up_MFD:
            self._cache.clear()
            if len(self) * ffn.up_MFD.shape[1] <= CACHED:
                self._cache.update(hidden=list(self._hidden(ffn)), rows=ffn.up_MFD)
        yield from zip(self.chunks(), self._cache.get("hidden") or self._hidden(ffn), strict=True)

    def _hidden(self, ffn: FFNWeights) -> Iterator[torch.Tensor]:
        ffn = ffn.to(torch.float32)
        for x_TD in self.chunks():
            yield ffn.hidden(x_TD)

    def cpu(self) -> "FFNInputs":
        """The same in host memory; itself if it is there already."""
        others = (self.id_T, self.domain_T, self.importance_NF)
        if all(tensor is None or tensor.is_cpu for tensor in (*self.x, *others)):
            return self
        x = tuple(x_TD.cpu() for x_TD in self.x)
        return FFNInputs(x, *(None if tensor is None else tensor.cpu() for tensor in others))

    def of_neurons(self, neuron_F: torch.Tensor) -> "FFNInputs":
        """The same for an FFN that has only some of the neurons."""
        if self.importance_NF is None:
            return self
        return replace(self, importance_NF=self.importance_NF[:, neuron_F])
