"""The places of a model where calibration looks: what reaches a planned layer in a forward.

Shape suffixes: B sequences (or images) of a batch, L places of a sequence, T tokens, D d_model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UsageError
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.layers.moe import MoE
from upcycle.util.copies import buffers_restored, state_restored
from upcycle.util.modules import eval_mode

# Arguments with a token at each place, and the mask that says which of them are padding.
_TEXTS = (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))


@dataclass(eq=False)
class Site:
    """A planned layer in the model.

    `shape` is that of the tensor that its tokens came from last, without its features.
    """

    spec: MoESpec
    layer: MoE
    shape: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        """What errors call it."""
        return self.spec.ffn.path or "the model"

    def replace_tokens(self, tokens: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Run `tokens`, [T, D] -> [T, O], in the place of `MoE.tokens`."""
        vars(self.layer)["tokens"] = tokens

    def note_shape(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A hook; the tensor is the input of the FFN, or the hidden one, with D or F at `axis`."""
        shape = list(args[0].shape)
        del shape[self.layer.axis]
        self.shape = tuple(shape)


@contextmanager
def sites_of(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """The sites note shapes; `model` is in eval mode and draws the same in every forward.

    What its forward writes into buffers and attributes does not stay.
    """
    layers = [site.layer for site in sites]
    with (
        buffers_restored(model, but=layers),
        state_restored(model, but=layers),
        ExitStack() as stack,
        eval_mode(model),
        torch.random.fork_rng(devices=[]),
    ):
        for site in sites:
            stack.enter_context(site.layer.register_forward_pre_hook(site.note_shape))
            stack.callback(vars(site.layer).pop, "tokens", None)
        torch.manual_seed(0)
        yield


def run_batch(model: nn.Module, batch: ExampleInputs) -> Any:
    """The outputs of `model`, which may write into its inputs."""
    batch = pytree.tree_map_only(torch.Tensor, torch.clone, batch)
    return model(*batch) if isinstance(batch, tuple) else model(**batch)


def tokens_of(
    batch: ExampleInputs, x_TD: torch.Tensor, shape: tuple[int, ...], domain_B: torch.Tensor | None
) -> FFNInputs:
    """The tokens of one batch that are no padding.

    Args:
        batch: the inputs of the model.
        x_TD: what an FFN was given.
        shape: of the tensor that the tokens are from, without its features: [B, L], [L, B] or [T].
            Anything else has no padding and no ids.
        domain_B: of each sequence.
    """
    named = {} if isinstance(batch, tuple) else batch
    texts = [(named.get(ids), named.get(mask)) for ids, mask in _TEXTS]
    shaped = [(mask if ids is None else ids, ids, mask) for ids, mask in texts]
    fitting = [(of, ids, mask) for of, ids, mask in shaped if of is not None and _fits(of, shape)]
    if len(fitting) > 1:
        raise UsageError(
            "the calibration data has as many places for the decoder as for the encoder, so their "
            "tokens cannot be told apart; give `decoder_input_ids` another length"
        )
    if not fitting:
        domain_T = None
        if domain_B is not None and len(x_TD) % len(domain_B) == 0:
            domain_T = domain_B.to(x_TD.device).repeat_interleave(len(x_TD) // len(domain_B))
        return FFNInputs((x_TD,), None, domain_T)
    of_BL, ids_BL, mask_BL = fitting[0]
    domain_BL = None if domain_B is None else domain_B[:, None].expand(of_BL.shape).to(of_BL.device)
    kept_T = None if mask_BL is None else _laid_out(mask_BL.bool(), shape)

    def kept(values_T: torch.Tensor) -> torch.Tensor:
        return values_T if kept_T is None or bool(kept_T.all()) else values_T[kept_T]

    def maybe(values_BL: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_BL is None else kept(_laid_out(values_BL, shape))

    return FFNInputs((kept(x_TD),), maybe(ids_BL), maybe(domain_BL))


def _fits(of_BL: torch.Tensor, shape: tuple[int, ...]) -> bool:
    sizes = tuple(of_BL.shape)
    return of_BL.ndim == 2 and shape in (sizes, sizes[::-1], (of_BL.numel(),))


def _laid_out(of_BL: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """In the order of the tokens: some models put the sequences second."""
    is_turned = shape != tuple(of_BL.shape) and len(shape) == 2
    return (of_BL.t() if is_turned else of_BL).flatten()
