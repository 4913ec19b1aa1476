"""What an MoE layer and its router are: frozen data, which every checkpoint carries as JSON.

The fields are the keys of the JSON, in its order. Those with a default may be missing there, as
earlier versions did not write all of them.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_args

from upcycle.pointwise import Pointwise, Table

# Kinds of routers that upcycle has; those of others are in OTHER_KINDS, with their classes.
RouterKind = Literal["linear", "mlp", "neurons", "cosine", "noisy", "table", "oracle"]
SelectRule = Literal["top_k", "top_p", "entropy", "null", "expert_choice", "all"]
WeightRule = Literal["renormalised", "softmax", "one", "renorm_detach", "gain"]
TokenKey = Literal["token", "type", "domain"]
OTHER_KINDS = Table()
Options = dict[str, Any]  # JSON

# Value of the first field -> fields that are there beside it alone.
Special = Mapping[str, tuple[str, ...]]
# What the rules of `upcycle.layers.selection` take besides k.
SELECT_ARGUMENTS: Special = {
    "top_p": ("mass",),
    "entropy": ("mass", "above", "q"),
    "null": ("nulls",),
}
_NOTHING = Pointwise(0, ())  # where no neuron is run


@dataclass(frozen=True)
class Settings:
    """Fields that are also JSON."""

    _special: ClassVar[Special] = {}
    _if_true: ClassVar[tuple[str, ...]] = ()  # later fields: JSON without them says what it did

    @classmethod
    def from_json(cls, data: Any, where: str = "layer") -> Self:
        """The settings that `to_json` wrote, in this or an earlier version.

        Args:
            data: parsed JSON.
            where: what an error calls them.

        Raises:
            ValueError: `data` is no object, a key is unknown or missing, or a value is of another
                type.
        """
        if not isinstance(data, Mapping):
            raise _misfit(where, f"is {data!r:.60} and no object")
        optional = cls._fields(data.get(fields(cls)[0].name))
        for name in data:
            if name not in optional:
                raise _misfit(where, f"has `{name}`, which is unknown")
        for name, is_optional in optional.items():
            if not is_optional and name not in data:
                raise _misfit(where, f"has no `{name}`")
        types = {field.name: field.type for field in fields(cls)}
        return cls(**{n: _checked(types[n], value, f"{where}.{n}") for n, value in data.items()})

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        first = getattr(self, fields(self)[0].name)
        values = {name: getattr(self, name) for name in self._fields(first)}
        values = {n: v for n, v in values.items() if v or n not in self._if_true}
        return {n: v.to_json() if hasattr(v, "to_json") else v for n, v in values.items()}

    @classmethod
    def _fields(cls, first: object) -> dict[str, bool]:
        """The fields beside that value of the first one -> whether they may be missing."""
        present = cls._special.get(str(first), ())
        special = {name for names in cls._special.values() for name in names}
        return {
            f.name: f.name not in special
            and not (f.default is MISSING and f.default_factory is MISSING)
            for f in fields(cls)
            if f.name in present or f.name not in special
        }


def _checked(kind: Any, value: Any, where: str) -> Any:
    if kind is Pointwise:
        try:
            return Pointwise.from_json(value)
        except (KeyError, TypeError, ValueError) as error:
            raise _misfit(where, f"is {value!r:.60} and no known function") from error
    if kind is Options:
        if type(value) is dict and all(type(name) is str for name in value):
            return value
        raise _misfit(where, f"is {value!r:.60} and no object")
    choices = get_args(kind)
    if not choices and issubclass(kind, Settings):
        return kind.from_json(value, where)
    # A whole number is a float, too; a bool is no number.
    if value in choices or type(value) is kind or (kind is float and type(value) is int):
        return value
    if kind == RouterKind and isinstance(value, str) and OTHER_KINDS.has(value):
        return value
    wanted = f"one of {', '.join(choices)}" if choices else f"of type {kind.__name__}"
    if kind == RouterKind:
        wanted += ", and no package that is installed brings it"
    raise _misfit(where, f"is {value!r:.60} and not {wanted}")


def _misfit(where: str, what: str) -> ValueError:
    return ValueError(f"{where} {what}; read it with the version of upcycle that wrote it")


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Settings):
    """Which experts a token visits; the functions in `upcycle.layers.selection` say what it means.

    Attributes:
        rule: a key of `SELECT`.
        k: how many experts, in the sense of the rule.
        mass, above, q, nulls: what only some rules read.
    """

    _special: ClassVar[Special] = SELECT_ARGUMENTS

    rule: SelectRule
    k: int
    mass: float = 0.0
    above: float = 0.0
    q: float = 1.0
    nulls: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """What the function of the rule takes besides the scores."""
        return {name: getattr(self, name) for name in ("k", *self._special.get(self.rule, ()))}


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Settings):
    """What `upcycle.layers.router.Router`, which says what the words mean, is made of.

    Attributes:
        kind: a key of `ROUTER_KINDS`.
        num_experts, d_model: E and D.
        select, weights, scale: the experts of a token, and their weights.
        bias, tied, frozen, balance: what there is besides the rows, and what changes those.
        nulls: rows that stand for doing nothing.
        hidden: mlp, cosine: the width between the two maps.
        entries, by: table: its rows, and what it is read by.
        pointwise, up_bias: neurons: what a neuron computes, and whether it has biases.
        extended: the last expert was added by `upcycle.extend`.
        options: what a kind in OTHER_KINDS is made of, besides.
    """

    _special: ClassVar[Special] = {
        "mlp": ("hidden",),
        "cosine": ("hidden",),
        "table": ("entries", "by"),
        "neurons": ("pointwise", "up_bias"),
    }
    _if_true: ClassVar[tuple[str, ...]] = ("extended", "options")

    kind: RouterKind
    num_experts: int
    d_model: int
    select: SelectConfig
    weights: WeightRule
    scale: float
    bias: bool = False
    tied: bool = False
    frozen: bool = False
    balance: bool = False
    nulls: int = 0
    hidden: int = 0
    entries: int = 0
    by: TokenKey = "token"
    pointwise: Pointwise = _NOTHING
    up_bias: bool = False
    extended: bool = False
    options: Options = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether a token visits the best `k` of linear scores, which alone weigh the experts."""
        is_linear = self.kind == "linear" and self.select.rule == "top_k"
        return is_linear and self.weights != "gain" and not self.balance and not self.nulls


@dataclass(frozen=True, kw_only=True)
class LayerConfig(Settings):
    """What `upcycle.layers.moe.MoE` is made of.

    Attributes:
        num_experts: routed experts.
        width: neurons of one of them.
        shared: neurons of the shared expert; 0 if there is none.
        low_rank: of the linear map that every token gets; 0 if there is none.
        d_model, d_out: widths of a token and of the output.
        axis: of the input that is D: -1, or 1 for convolutions.
        pointwise: what stands between the expansions and the contraction.
        up_bias, output_bias: whether the expansions and the output have biases.
        expert_bias: whether each expert has an output bias of its own, which its weight multiplies.
        router: how tokens find their experts.
        hidden_dropout, output_dropout: probabilities in training.
    """

    _if_true: ClassVar[tuple[str, ...]] = ("expert_bias",)

    num_experts: int
    width: int
    shared: int = 0
    low_rank: int = 0
    d_model: int
    d_out: int
    axis: int = -1
    pointwise: Pointwise
    up_bias: bool
    output_bias: bool
    router: RouterConfig
    hidden_dropout: float
    output_dropout: float
    expert_bias: bool = False
