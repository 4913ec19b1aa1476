"""What one FFN was given on the calibration set.

Shape suffixes: T tokens, D d_model, F neurons, N domains.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from upcycle.ir.weights import FFNWeights

CHUNK = 2048  # tokens at a time
# Numbers of one FFN's hidden activations that are kept, because methods read them several times;
# where there are more they are computed again.
KEPT = 2**27


@dataclass(frozen=True)
class FFNInputs:
    """The inputs of one FFN, without padding, in the dtype of the model.

    Attributes:
        x: the tokens in chunks [t, D], as they came.
        id_T: the token of the vocabulary at each place, int64, or None where there is none.
        domain_T: the group of texts that each token belongs to, int64, or None.
        importance_NF: mean over the tokens of a domain of ``|h dL/dh|`` for each neuron, float32;
            None unless gradients were asked for.
    """

    x: tuple[torch.Tensor, ...]
    id_T: torch.Tensor | None = None
    domain_T: torch.Tensor | None = None
    importance_NF: torch.Tensor | None = None
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(map(len, self.x))

    def chunks(self) -> Iterator[torch.Tensor]:
        """The tokens in float32, [t, D] with t at most 2048, always in the same order."""
        for x_TD in self.x:
            for some_TD in torch.split(x_TD, CHUNK):
                yield some_TD.float()

    def hidden(self, ffn: FFNWeights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens [t, D] with the hidden activations of `ffn` on them [t, F], float32.

        They may be asked for again, so they must not be changed.
        """
        if self._kept.get("rows") is not ffn.up_MFD:
            self._kept.clear()
            if len(self) * ffn.up_MFD.shape[1] <= KEPT:
                self._kept.update(hidden=list(self._hidden(ffn)), rows=ffn.up_MFD)
        yield from zip(self.chunks(), self._kept.get("hidden") or self._hidden(ffn), strict=True)

    def _hidden(self, ffn: FFNWeights) -> Iterator[torch.Tensor]:
        ffn = ffn.to(torch.float32)
        for x_TD in self.chunks():
            yield ffn.hidden(x_TD)

    def cpu(self) -> "FFNInputs":
        """The same in the memory of the host; this one, if it is there."""
        values = (*self.x, self.id_T, self.domain_T, self.importance_NF)
        if all(tensor is None or tensor.device.type == "cpu" for tensor in values):
            return self
        id_T, domain_T, importance_NF = (None if t is None else t.cpu() for t in values[-3:])
        return FFNInputs(tuple(x_TD.cpu() for x_TD in self.x), id_T, domain_T, importance_NF)

    def of_neurons(self, neuron_F: torch.Tensor) -> "FFNInputs":
        """The same for an FFN that has only some of the neurons."""
        if self.importance_NF is None:
            return self
        return replace(self, importance_NF=self.importance_NF[:, neuron_F])
