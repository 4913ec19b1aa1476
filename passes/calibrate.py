"""Calibrate: show every FFN what it is given on calibration data, and convert it on the spot.

All batches go through the model together, in lockstep: when they have reached an FFN, its inputs of
all batches are there and nothing else is kept; the layer is made from them; and the batches go on,
with what the new layer gives (*sequential*) or with what the dense FFN gave. So one pass through
the model is enough, and at no time are the activations of two layers in memory.

Shape suffixes: T tokens, D d_model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from upcycle.activations import Activations
from upcycle.capture import ExampleInputs
from upcycle.errors import CaptureError, UsageError
from upcycle.modes import eval_mode
from upcycle.moe import MoE
from upcycle.passes.lockstep import Lockstep, Stop, in_lockstep
from upcycle.spec import MoESpec
from upcycle.weights import FFNWeights

Visit = Callable[[MoESpec, MoE, Activations], None]


def calibrate(
    model: nn.Module,
    layers: Sequence[tuple[MoESpec, MoE]],
    batches: Sequence[ExampleInputs],
    *,
    dense: Callable[[MoESpec], FFNWeights],
    visit: Visit,
    sequential: bool,
) -> None:
    """Call `visit` once for each layer, in the order in which the model runs them.

    Args:
        model: has the layers, which need no weights before they are visited.
        layers: each planned layer with its module in `model`.
        batches: inputs of the model, as `upcycle.calibration` makes them; a batch may have an
            ``attention_mask``, and padding is then left out.
        dense: the FFN that a layer replaces.
        visit: fills the layer, from what its FFN was given.
        sequential: later layers see what the converted ones give; else what the dense ones gave.

    An FFN that the model runs several times is visited at the last one, with the inputs of all.

    Raises:
        UsageError: an FFN is never reached by these inputs.
        CaptureError: the batches do not run the same FFNs in the same order.
    """
    if not batches:
        raise UsageError("there is no calibration data")
    probes = {spec.ffn.path: _Probe(spec, layer, dense) for spec, layer in layers}
    try:
        with torch.no_grad(), eval_mode(model):
            for probe in probes.values():
                probe.install(_Counting(probe))
            _run(model, batches[:1], Lockstep(1))
            unseen = [path for path, probe in probes.items() if probe.calls == 0]
            if unseen:
                raise UsageError(
                    f"{unseen[0]}: the calibration data never reaches this FFN; leave it out with "
                    "`layers.exclude`, or give other data"
                )
            passing = _Pass(probes, batches, visit, sequential=sequential)
            for probe in probes.values():
                probe.install(passing.at(probe))
            _run(model, batches, passing.lockstep)
    finally:
        for probe in probes.values():
            probe.remove()


def _run(model: nn.Module, batches: Sequence[ExampleInputs], lockstep: Lockstep) -> None:
    # Grad mode belongs to a thread, so the model of each one has to be told.
    with torch.no_grad():
        in_lockstep(_NoGrad(model), batches, lockstep)


class _NoGrad(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)


class _Probe:
    """Stands in for `MoE.tokens` of one layer."""

    def __init__(self, spec: MoESpec, layer: MoE, dense: Callable[[MoESpec], FFNWeights]) -> None:
        self.spec, self.layer, self._dense = spec, layer, dense
        self.calls = 0

    def install(self, tokens: Callable[[torch.Tensor], torch.Tensor]) -> None:
        vars(self.layer)["tokens"] = tokens

    def remove(self) -> None:
        vars(self.layer).pop("tokens", None)

    def dense(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self._dense(self.spec)(x_TD)


class _Counting:
    """How often the model runs an FFN."""

    def __init__(self, probe: _Probe) -> None:
        self._probe = probe

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        self._probe.calls += 1
        return self._probe.dense(x_TD)


class _Pass:
    """One run of all batches, which visits the layers."""

    def __init__(
        self,
        probes: dict[str, _Probe],
        batches: Sequence[ExampleInputs],
        visit: Visit,
        *,
        sequential: bool,
    ) -> None:
        self.lockstep = Lockstep(len(batches))
        self._masks = [_mask(batch) for batch in batches]
        self._ids = [_ids(batch) for batch in batches]
        self._visit, self._sequential = visit, sequential
        self._left = sum(probe.calls for probe in probes.values())
        self._seen: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self._here: list[str] = []

    def at(self, probe: _Probe) -> Callable[[torch.Tensor], torch.Tensor]:
        path = probe.spec.ffn.path
        met = 0

        def tokens(x_TD: torch.Tensor) -> torch.Tensor:
            i = self.lockstep.current
            self._seen.setdefault(path, []).append(self._kept(i, x_TD))
            self._here.append(path)
            self.lockstep.meet(everyone)
            if self._left == 0 and not self._sequential:
                raise Stop
            is_made = met == probe.calls and self._sequential
            y_TO = MoE.tokens(probe.layer, x_TD) if is_made else probe.dense(x_TD)
            if self._left == 0:
                raise Stop
            return y_TO

        def everyone() -> None:
            nonlocal met
            if len(set(self._here)) > 1:
                raise CaptureError(
                    "the calibration batches do not run the same FFNs in the same order: "
                    f"one is at {self._here[0]} while another is at {self._here[-1]}"
                )
            self._here.clear()
            self._left -= 1
            met += 1
            if met == probe.calls:
                x, ids = zip(*self._seen.pop(path), strict=True)
                known = [id_T for id_T in ids if id_T is not None]
                id_T = torch.cat(known) if len(known) == len(ids) else None
                self._visit(probe.spec, probe.layer, Activations(x, id_T=id_T))

        return tokens

    def _kept(self, i: int, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens that are no padding, and their ids, where they are the tokens of the input."""
        mask, ids = self._masks[i], self._ids[i]
        if ids is not None and len(ids) != len(x_TD):
            ids = None
        if mask is None or len(mask) != len(x_TD):
            return x_TD, ids
        return x_TD[mask], None if ids is None else ids[mask]


def _mask(batch: ExampleInputs) -> torch.Tensor | None:
    mask = None if isinstance(batch, tuple) else batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.flatten().bool()


def _ids(batch: ExampleInputs) -> torch.Tensor | None:
    ids = None if isinstance(batch, tuple) else batch.get("input_ids")
    return ids.flatten() if isinstance(ids, torch.Tensor) else None
