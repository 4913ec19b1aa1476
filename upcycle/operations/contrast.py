"""Decoding by the contrast of a model with itself under another routing.

Shape suffixes: B sequences, S tokens up to now, V vocabulary.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from upcycle.errors import UnsupportedError, UsageError
from upcycle.routing.contract import routed_layers
from upcycle.routing.override import override
from upcycle.targets.traced.cache import cache_argument


class SelfContrast(LogitsProcessor):
    """Scores that are high with the usual experts and low with others: ``(1 + b) z - b z'``.

    z are the logits of the model as it is, z' those with the experts of other ranks. Tokens whose
    probability is below `alpha` of the best one are out. With ``alpha=1``, with ``beta=0`` and with
    experts that are all equal this is greedy decoding, ties and rounding aside.

        model.generate(**inputs, logits_processor=[SelfContrast(model, inputs)], do_sample=False)

    The other logits are those of a second pass with a cache of its own, so a token costs about
    twice as much. An object serves one call of ``generate``.

    Args:
        model: a decoder of transformers with MoE layers.
        inputs: what ``generate`` gets, for its attention mask; None if nothing is padded.
        ranks: of the experts of the second pass, as for `override`.
        alpha: 0 to 1.
        beta: not negative.

    Raises:
        UsageError: alpha, beta or ranks is out of range.
        UnsupportedError: the model is no decoder with a cache.

    Source:
        Shi et al., "Unchosen Experts Can Contribute Too", 2024, https://arxiv.org/abs/2405.14507
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        ranks: Sequence[int] = (2,),
        alpha: float = 0.1,
        beta: float = 0.5,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha: {alpha} is no part of the best probability; choose 0 to 1")
        if not 0 <= beta < math.inf:
            raise UsageError(f"beta: {beta} is no weight of a contrast; choose 0 or more")
        if model.config.is_encoder_decoder or not model.can_generate():
            raise UnsupportedError(
                f"{type(model).__name__} is no decoder that generates; contrast one that does"
            )
        routed_layers(model)
        with override(model, ranks=ranks):
            pass  # says what is wrong with the ranks before text is generated
        mask = (inputs or {}).get("attention_mask")
        self.model, self.ranks, self.alpha, self.beta = model, tuple(ranks), alpha, beta
        self._mask_BS = mask
        self._argument = cache_argument(model)
        self._cache = DynamicCache(config=model.config.get_text_config())
        self._read = 0
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens [B, S] and the logits [B, V] of the usual pass -> the contrast, [B, V]."""
        if input_ids.shape[1] <= self._read:
            raise UsageError(
                "a SelfContrast serves one call of generate; make another for the next"
            )
        with override(self.model, ranks=self.ranks):
            out = self.model(**self._new(input_ids))
        self._read = input_ids.shape[1]
        weak_BV = out.logits[:, -1].to(scores)
        best_B1 = scores.max(-1, keepdim=True).values
        log_alpha = math.log(self.alpha) if self.alpha else -math.inf
        contrast_BV = (1 + self.beta) * scores - self.beta * weak_BV
        is_out_BV = scores < best_B1 + log_alpha
        return torch.where(is_out_BV, -math.inf, contrast_BV)

    def _new(self, input_ids: Tensor) -> dict[str, Any]:
        """The arguments of the second pass: tokens that it has not read yet."""
        mask_BS = self._mask_BS
        if mask_BS is None:
            mask_BS = torch.ones_like(input_ids)
        more = input_ids.shape[1] - mask_BS.shape[1]
        if len(mask_BS) != len(input_ids) or more < 0:
            raise UsageError(
                f"the attention mask is {list(mask_BS.shape)} and the tokens are "
                f"{list(input_ids.shape)}; beams and several returned sequences are not contrasted"
            )
        mask_BS = torch.nn.functional.pad(mask_BS, (0, more), value=1)
        given: dict[str, Any] = {"input_ids": input_ids[:, self._read :], "attention_mask": mask_BS}
        if self._takes_positions:
            positions_BS = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)
            given["position_ids"] = positions_BS[:, self._read :]
        return {**given, self._argument: self._cache, "use_cache": True}
