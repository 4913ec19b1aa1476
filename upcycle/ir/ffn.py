"""The dense FFNs of a model, and the places that only look like one. No tensors.

An FFN is a region of the graph with one input x, one or more expansions (linear maps of x to a
hidden width), only operations that are pointwise along the hidden axis between them, and one
contraction. For such a region ``FFN(x) = b2 + sum_j n_j(x)``, one term for each hidden neuron, so
neurons may be permuted, cut apart and copied without changing the function.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from upcycle.pointwise import Pointwise
from upcycle.recipe.schema import FFNKind

# How the reason of a miss begins where two FFNs overlap, of which one is found.
SHARES = "it shares a weight with the FFN"

Placement = Literal["module", "siblings", "inline", "region"]


@dataclass(frozen=True)
class Projection:
    """One linear map of an FFN, and where its numbers are stored.

    Attributes:
        module: path of the module that applies it.
        weight, bias: names in ``model.named_parameters(remove_duplicate=False)``.
        transposed: the weight is stored ``[in, out]`` (GPT-2's Conv1D) and not ``[out, in]``.
        rows: ``(start, stop, step)`` of the outputs that are this projection, one per neuron;
            a fused gate_up projection is two projections with different rows of one weight.
        columns: of a contraction: ``(start, stop)`` of the inputs that are neurons, where the
            others come from elsewhere; None where all are neurons.
    """

    module: str
    weight: str
    bias: str | None
    transposed: bool
    rows: tuple[int, int, int]
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Kept:
    """The part of a linear map that is not the FFN's, where the rest of it is.

    Attributes:
        name: of the parameter that holds it in the converted model.
        parameter: of the dense model.
        transposed: the weight is stored ``[in, out]``.
        columns: the FFN takes columns of it, not rows.
        taken: ``(start, stop)`` of the rows or columns that the FFN takes, in order.
    """

    name: str
    parameter: str
    transposed: bool
    columns: bool
    taken: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FFN:
    """A dense FFN of the model: ``contraction(pointwise(z_0, ...))`` of the `expansions` z_i of x.

    Attributes:
        path: the innermost module that holds the whole FFN; where it holds several, the module of
            the contraction. It is unique in the model.
        kind: ``ffn``; ``bottleneck`` (narrower than its input); ``head`` (a classifier or pooler).
        placement: ``module`` if `path` is exactly the FFN, so that it can be swapped; ``siblings``
            if the linear maps belong to different modules; ``inline`` if one forward applies them
            among other things; ``region`` if it is a part of a graph of torch.fx, between nodes.
        d_model, d_ff, d_out: widths of x, of the hidden tensor (neurons), and of the output.
        axis: the axis that the linear maps work along: -1, or 1 for convolutions with kernel size
            one.
        hidden_dropout, output_dropout: dropout probabilities in training.
        tap_widths: if the model reshapes the hidden tensor, so that a tap may not return an empty
            one: the output width of each module in `expansions`, each once; else empty.
        hidden_width: width of the input of the contraction where `shared`, else 0.
        shared: other rows of an expansion, or other columns of the contraction, compute something
            that the model uses; they stay, as `kept` lists.
        regions: where `placement` is ``region``, ``(x, output)`` for each place: names of nodes of
            the graph, between which it lies.
        holds_alone: of a region: nothing but the FFN is in the module at `path`.
    """

    path: str
    kind: FFNKind
    placement: Placement
    expansions: tuple[Projection, ...]
    contraction: Projection
    pointwise: Pointwise
    d_model: int
    d_ff: int
    d_out: int
    axis: int = -1
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    tap_widths: tuple[int, ...] = ()
    hidden_width: int = 0
    shared: bool = False
    regions: tuple[tuple[str, str], ...] = ()
    holds_alone: bool = False

    @property
    def place(self) -> str:
        """The path of the MoE layer that it may become: as `upcycle.layers.tap.place_of` a site."""
        if self.placement == "region" and self.holds_alone:
            return self.path
        return self.path if self.placement == "module" else self.contraction.module

    @property
    def has_up_bias(self) -> bool:
        """Whether any expansion has a bias."""
        return any(p.bias for p in self.expansions)

    def rows_of(self, module: str) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of the outputs of the expansion `module` that are neurons, in order."""
        rows = sorted({r for p in self.expansions if p.module == module for r in range(*p.rows)})
        starts = [r for i, r in enumerate(rows) if i == 0 or rows[i - 1] != r - 1]
        stops = [r + 1 for i, r in enumerate(rows) if i + 1 == len(rows) or rows[i + 1] != r + 1]
        return tuple(zip(starts, stops, strict=True))

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What stays of the linear maps; nothing unless they are `shared`."""
        kept = []
        modules = {p.module: p for p in self.expansions} if self.shared else {}
        for (module, p), width in zip(modules.items(), self.tap_widths, strict=self.shared):
            taken = self.rows_of(module)
            if taken != ((0, width),):
                kept.append(Kept(f"{module}.weight", p.weight, p.transposed, False, taken))
                if p.bias:
                    kept.append(Kept(f"{module}.bias", p.bias, False, False, taken))
        down = self.contraction
        if down.columns:
            name = f"{down.module}.kept_weight"
            kept.append(Kept(name, down.weight, down.transposed, True, (down.columns,)))
        return tuple(kept)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of every parameter that the FFN reads, each once."""
        projections = (*self.expansions, self.contraction)
        names = [p.weight for p in projections] + [p.bias for p in projections if p.bias]
        return tuple(dict.fromkeys(names))

    @property
    def num_weights(self) -> int:
        """Weights without biases, which is also the number of multiply-adds per token."""
        return self.d_ff * (len(self.expansions) * self.d_model + self.d_out)

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        biases = sum(self.d_ff for p in self.expansions if p.bias)
        return self.num_weights + biases + (self.d_out if self.contraction.bias else 0)

    def to_json(self) -> dict[str, Any]:
        """As ``upcycle inspect --json`` prints it."""
        return {
            "path": self.path,
            "kind": self.kind,
            "placement": self.placement,
            "activation": self.pointwise.name,
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "d_out": self.d_out,
            "expansions": [p.weight for p in self.expansions],
            "contraction": self.contraction.weight,
        }


@dataclass(frozen=True)
class Miss:
    """A place that looks like an FFN, and why it is none.

    Attributes:
        path: the module, which is the contraction where the linear maps lie in several.
        reason: one sentence.
        node: name of the node of the captured graph where it shows; in a block that repeats
            another, of the node there. Empty if it shows in the parameters alone.
        source: ``file.py:line`` of the model that made the node; empty if torch's code did.
    """

    path: str
    reason: str
    node: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    def to_json(self) -> dict[str, str]:
        """The miss as ``upcycle inspect --json`` prints it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Located:
    """Everything that `locate` found, in the order in which the model runs it."""

    ffns: tuple[FFN, ...] = ()
    misses: tuple[Miss, ...] = ()
