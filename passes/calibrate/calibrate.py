"""Calibrate: show every FFN what it is given on calibration data, and convert it on the spot.

All batches go through the model together: when they have reached an FFN, its inputs of
all batches are there and nothing else is kept; the layer is made from them; and the batches go on,
with what the new layer gives (*sequential*) or with what the dense FFN gives. So one pass through
the model is enough, and there are never the activations, or dense weights, of two FFNs in memory.

Shape suffixes: B sequences (or images) of a batch, L places of a sequence, T tokens, D d_model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import CaptureError, UsageError
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.layers.moe import MoE
from upcycle.passes.calibrate.batch_barrier import BatchBarrier, Stop
from upcycle.passes.calibrate.sites import Site, run_batch, sites_of, tokens_of

Visit = Callable[[MoESpec, MoE, FFNWeights, FFNInputs], None]


def calibrate(
    model: nn.Module,
    layers: Sequence[tuple[MoESpec, MoE]],
    batches: Sequence[ExampleInputs],
    *,
    dense: Callable[[MoESpec], FFNWeights],
    visit: Visit,
    sequential: bool,
    domains: Sequence[torch.Tensor] | None = None,
) -> None:
    """Call ``visit(spec, layer, ffn, seen)`` once for each layer, in the order in which they run.

    Args:
        model: has the layers, which need no weights before they are visited.
        layers: each planned layer with its module in `model`.
        batches: inputs of the model. Padding, by ``attention_mask``, is left out; tokens get the
            ids of ``input_ids`` where there is one at the same place.
        dense: reads the FFN that a layer replaces.
        visit: makes the layer, from its FFN and what it was given. In *sequential* mode it has to
            fill the layer; all batches have passed a layer when the next one is visited.
        sequential: later layers see what the converted ones give; else what the dense ones gave.
        domains: the group of texts of each sequence, int64 [B], for each batch.

    An FFN that the model runs several times is visited at the last one, with the inputs of all;
    until then the dense one is run. Memory: one FFN, its inputs of all batches, what `visit`
    makes, and what the model itself holds between two FFNs for each batch. What a model draws in
    its forward is the same in every call.

    Raises:
        UsageError: there is no data, or an FFN is never reached by it.
        CaptureError: the batches do not run the same FFNs in the same order.
    """
    if not batches:
        raise UsageError("there is no calibration data")
    if domains is not None and any(getattr(m.router, "by", None) == "domain" for _, m in layers):
        pairs = zip(batches, domains, strict=True)
        batches = [{**dict(batch), "domain_ids": domain_B} for batch, domain_B in pairs]
    places = [_Place(Site(spec, layer)) for spec, layer in layers]
    one = _Pass(BatchBarrier(len(batches)), batches, domains, dense, visit, sequential)
    with sites_of(model, [place.site for place in places]):
        for place in places:
            place.site.replace_tokens(partial(one.count, place))
        BatchBarrier(1).run(partial(_forward, model, batches))
        for place in places:
            if not place.calls:
                raise UsageError(
                    f"{place.site.path}: the calibration data never reaches this FFN; leave it out "
                    "with `layers.exclude`, or give other data"
                )
            place.site.replace_tokens(partial(one.meet, place))
        one.left = sum(place.calls for place in places)
        one.barrier.run(partial(_forward, model, batches))
        if one.left:
            raise CaptureError(
                "with converted layers the model runs fewer FFNs than the dense one; set "
                "`calibration.sequential: false`"
            )


@torch.no_grad()  # here, as the grad mode belongs to a thread
def _forward(model: nn.Module, batches: Sequence[ExampleInputs], i: int) -> None:
    run_batch(model, batches[i])


@dataclass(eq=False)
class _Place:
    """A site, and how often its FFN was met."""

    site: Site
    calls: int = 0  # in one forward
    met: int = 0
    seen: list[FFNInputs] = field(default_factory=list)


@dataclass(eq=False)
class _Pass:
    """One run of all batches, which visits the layers."""

    barrier: BatchBarrier
    batches: Sequence[ExampleInputs]
    domains: Sequence[torch.Tensor] | None
    dense: Callable[[MoESpec], FFNWeights]
    visit: Visit
    sequential: bool
    left: int = 0  # meetings
    ffn: tuple[_Place, FFNWeights] | None = None
    here: list[_Place] = field(default_factory=list)

    def count(self, place: _Place, x_TD: torch.Tensor) -> torch.Tensor:
        place.calls += 1
        return self._ffn_of(place)(x_TD)

    def meet(self, place: _Place, x_TD: torch.Tensor) -> torch.Tensor:
        i = self.barrier.current
        domain_B = None if self.domains is None else self.domains[i]
        place.seen.append(tokens_of(self.batches[i], x_TD, place.site.shape, domain_B))
        self.here.append(place)
        self.barrier.wait(self._everyone)
        if not self.left:
            raise Stop
        if self.sequential and place.met == place.calls:
            return MoE.tokens(place.site.layer, x_TD)
        return self._ffn_of(place)(x_TD)

    def _everyone(self) -> None:
        here, self.here = self.here, []
        place = here[0]
        other = next((p.site.path for p in here if p is not place), "its end")
        if other != "its end" or len(here) < len(self.batches):
            raise CaptureError(
                "the calibration batches do not run the same FFNs in the same order: one is at "
                f"{place.site.path} while another is at {other}; give batches of one kind"
            )
        self.left -= 1
        place.met += 1
        if place.met == place.calls:
            seen, place.seen = joined(place.seen), []
            self.visit(place.site.spec, place.site.layer, self._ffn_of(place), seen)

    def _ffn_of(self, place: _Place) -> FFNWeights:
        """The dense FFN; read once for all batches, and one at a time."""
        if self.ffn is None or self.ffn[0] is not place:
            self.ffn = None
            self.ffn = place, self.dense(place.site.spec)
        return self.ffn[1]


def joined(parts: Sequence[FFNInputs]) -> FFNInputs:
    """What several batches gave to an FFN; ids and domains only if every batch has them."""

    def all_of(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        known = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(known) if len(known) == len(tensors) else None

    return FFNInputs(
        tuple(x_TD for part in parts for x_TD in part.x),
        id_T=all_of([part.id_T for part in parts]),
        domain_T=all_of([part.domain_T for part in parts]),
    )
