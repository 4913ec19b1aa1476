"""What is differentiated to learn which neurons matter to a model."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from upcycle.capture.capture import ExampleInputs
from upcycle.data.text import is_language_model
from upcycle.errors import UsageError
from upcycle.passes.calibrate.gradients import Objective


def objective_for(model: nn.Module, *, seed: int) -> Objective:
    """The loss of the next token for a language model, else a random projection of the outputs.

    With signs drawn anew for each output and batch, the expected square of the gradient of the
    projection is the diagonal of J'J, J being the derivative of the outputs: of the Gauss-Newton
    matrix, and of the Fisher information for outputs with normal errors of variance one. So it asks
    how much a neuron moves the outputs, without knowing what they are used for. It is the choice
    for encoders, for masked language models, whose texts have no gaps to fill here, for
    encoder-decoders and for anything else. `seed` draws the signs.
    """
    return next_token if is_language_model(model) else functools.partial(projection, seed=seed)


def next_token(outputs: Any, batch: ExampleInputs, number: int) -> torch.Tensor:
    """The negative log-likelihood of every token but the first, summed; padding is left out."""
    assert not isinstance(batch, tuple)
    ids_BL = batch["input_ids"][:, 1:]
    logits_BLV = outputs.logits[:, :-1].float()
    mask_BL = batch.get("attention_mask")
    if mask_BL is not None:
        ids_BL = ids_BL.masked_fill(~mask_BL[:, 1:].bool(), -100)
    loss: torch.Tensor = nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1), ids_BL.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss


def projection(outputs: Any, batch: ExampleInputs, number: int, *, seed: int) -> torch.Tensor:
    """The sum of all float outputs, each number with a random sign; padding is left out.

    Raises:
        UsageError: no output depends on the FFNs by a gradient.
    """
    mask = None if isinstance(batch, tuple) else batch.get("attention_mask")
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    leaves = [t for t in leaves if t.is_floating_point() and t.requires_grad]
    if not leaves:
        raise UsageError(
            "no output of the model has a gradient, which the recipe's methods look at; choose "
            "methods that need none"
        )
    generator = torch.Generator().manual_seed((seed + number) % 2**31)
    total = torch.zeros((), device=leaves[0].device)
    for leaf in leaves:
        sign = torch.randint(2, leaf.shape, generator=generator).to(leaf) * 2 - 1
        if mask is not None and leaf.shape[:2] == mask.shape:
            sign = sign * mask.reshape(*mask.shape, *[1] * (leaf.ndim - 2)).to(sign)
        total = total + (leaf.float() * sign).sum()
    return total
