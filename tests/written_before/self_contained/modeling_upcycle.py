"""Made by upcycle 0.1.0; needs transformers and torch."""

import inspect
import json
import math
import numpy
import re
import threading
import torch
from collections.abc import Callable
from collections.abc import Callable, Mapping
from collections.abc import Iterator
from collections.abc import Iterator, Mapping
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from functools import wraps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers.integrations import moe as _interface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM
from transformers.models.bert.modeling_bert import BertForMultipleChoice
from transformers.models.bert.modeling_bert import BertForNextSentencePrediction
from transformers.models.bert.modeling_bert import BertForPreTraining
from transformers.models.bert.modeling_bert import BertForQuestionAnswering
from transformers.models.bert.modeling_bert import BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertForTokenClassification
from transformers.models.bert.modeling_bert import BertLMHeadModel
from transformers.models.bert.modeling_bert import BertModel
from types import SimpleNamespace
from typing import Any
from typing import Any, Literal
from typing import Any, NamedTuple


Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def _cast(x: torch.Tensor, dtype: str) -> torch.Tensor:
    return x.to(getattr(torch, dtype))


def _cast_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.to(like.dtype)


def _comparison(compare: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Ones and zeros in the dtype of the data: a step has no other type than a float."""
    return lambda x, y: compare(x, y).to(x.dtype)


def _where(condition: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
    return torch.where(condition != 0, x, y)


# Every operation that is known to be pointwise. `tests/test_pointwise.py` perturbs one element and
# checks for each entry that no other element moves.
OPS: dict[str, Callable[..., torch.Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "add": torch.add,
    "asin": torch.asin,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "cast": _cast,
    "cast_like": _cast_like,
    "ceil": torch.ceil,
    "celu": F.celu,
    "clamp": torch.clamp,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "div": torch.div,
    "elu": F.elu,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "floor": torch.floor,
    "ge": _comparison(torch.ge),
    "gelu": F.gelu,
    "gt": _comparison(torch.gt),
    "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "le": _comparison(torch.le),
    "leaky_relu": F.leaky_relu,
    "log": torch.log,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "logical_and": lambda x, y: x * y,
    "logical_not": lambda x: 1 - x,
    "logical_or": torch.maximum,
    "logsigmoid": F.logsigmoid,
    "lt": _comparison(torch.lt),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mish": F.mish,
    "mul": torch.mul,
    "neg": torch.neg,
    "pow": torch.pow,
    "reciprocal": torch.reciprocal,
    "relu": F.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "rsqrt": torch.rsqrt,
    "rsub": torch.rsub,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "sub": torch.sub,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "threshold": F.threshold,
    "trunc": torch.trunc,
    "where": _where,
}


@dataclass(frozen=True)
class Pointwise:
    """``f(z_0, ..., z_{arity-1})``, pointwise; its result is the last step.

    `name` is the activation's usual name where it is a known one, else ``"custom"``.
    """

    arity: int
    steps: tuple[Step, ...]
    name: str = "custom"

    def __call__(self, *z: torch.Tensor) -> torch.Tensor:
        """Apply to `arity` tensors of one shape, any float dtype; returns that shape."""
        done: list[torch.Tensor] = []

        def value(arg: Any) -> Any:
            if isinstance(arg, str) and arg[0] in "zt" and arg[1:].isdigit():
                return (z if arg[0] == "z" else done)[int(arg[1:])]
            return arg

        for op, args, kwargs in self.steps:
            done.append(OPS[op](*(value(arg) for arg in args), **kwargs))
        return done[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        steps = [[op, list(args), dict(kwargs)] for op, args, kwargs in self.steps]
        return {"arity": self.arity, "name": self.name, "steps": steps}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Pointwise":
        """The program that `to_json` wrote; raises KeyError for an operation not in `OPS`."""
        for op, _, _ in data["steps"]:
            OPS[op]
        steps = tuple((op, tuple(args), dict(kwargs)) for op, args, kwargs in data["steps"])
        return Pointwise(arity=data["arity"], steps=steps, name=data["name"])


Selected = tuple[torch.Tensor, torch.Tensor | None]


def top_k(scores_TE: torch.Tensor, *, k: int) -> Selected:
    """The k best experts."""
    return scores_TE.topk(k, dim=-1).indices, None


def everything(scores_TE: torch.Tensor, *, k: int) -> Selected:
    """All experts."""
    index_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
    return index_E.expand(scores_TE.shape), None


def top_p(scores_TE: torch.Tensor, *, k: int, mass: float) -> Selected:
    """The fewest best experts whose probability exceeds `mass`, one at least and k at most.

    Huang et al., "Harder Tasks Need More Experts", 2024, https://arxiv.org/abs/2403.07652
    """
    p_TK, index_TK = scores_TE.softmax(-1).topk(k, dim=-1)
    before_TK = p_TK.cumsum(-1) - p_TK
    return index_TK, before_TK <= mass


def entropy(scores_TE: torch.Tensor, *, k: int, mass: float, above: float, q: float) -> Selected:
    """All experts where the router is unsure, else those within `mass`, and k at least.

    Unsure is a Tsallis entropy of index `q`, divided by that of the uniform distribution, over
    `above`. Unlike `top_p` the expert that crosses `mass` is left out, as in the authors' code.
    Li et al., "DynMoLE", 2025, https://arxiv.org/abs/2504.00661
    """
    p_TE = scores_TE.softmax(-1)
    count = p_TE.shape[-1]
    sorted_TE, index_TE = p_TE.topk(count, dim=-1)
    kept_TE = sorted_TE.cumsum(-1) <= mass
    kept_TE = kept_TE | (torch.arange(count, device=p_TE.device) < k)
    return index_TE, kept_TE | (tsallis_entropy(p_TE, q) > above)[:, None]


def tsallis_entropy(p_TE: torch.Tensor, q: float) -> torch.Tensor:
    """Tsallis entropy of index q of each row over that of the uniform row, in [0, 1]; q = 1 is
    Shannon's."""
    count = p_TE.shape[-1]
    if count == 1:
        return p_TE.new_zeros(len(p_TE))
    if q == 1:
        tiny = torch.finfo(p_TE.dtype).tiny
        return -(p_TE * p_TE.clamp(min=tiny).log()).sum(-1) / math.log(count)
    entropy_T: torch.Tensor = (1 - p_TE.pow(q).sum(-1)) / (1 - float(count) ** (1 - q))
    return entropy_T


def null(scores_TE: torch.Tensor, *, k: int, nulls: int) -> Selected:
    """Of the k best, those that are not among the last `nulls`, which stand for doing nothing.

    A tie goes to the true expert.
    Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233
    """
    count = scores_TE.shape[1] - nulls
    best_TK, index_TK = scores_TE[:, :count].topk(min(k, count), dim=-1)
    before_K = torch.arange(best_TK.shape[1], device=scores_TE.device)
    nulls_TK = (scores_TE[:, None, count:] > best_TK[:, :, None]).sum(-1)
    return index_TK, before_K + nulls_TK < k


def expert_choice(scores_TE: torch.Tensor, *, k: int) -> Selected:
    """Each expert takes its T * k / E best tokens, rounded up: k experts a token on average.

    What a token gets depends on the other tokens, so it is for encoders.
    Zhou et al., "Mixture-of-Experts with Expert Choice Routing", 2022,
    https://arxiv.org/abs/2202.09368
    """
    tokens, count = scores_TE.shape
    best_CE = scores_TE.softmax(-1).topk((tokens * k + count - 1) // count, dim=0).indices
    index_E = torch.arange(count, device=scores_TE.device)
    return index_E.expand(scores_TE.shape), torch.zeros_like(scores_TE).scatter(0, best_CE, 1.0) > 0


SELECT: dict[str, Callable[..., Selected]] = {
    "top_k": top_k,
    "all": everything,
    "top_p": top_p,
    "entropy": entropy,
    "null": null,
    "expert_choice": expert_choice,
}


def select(scores_TE: torch.Tensor, config: dict[str, Any]) -> Selected:
    """Apply the rule ``config["rule"]`` with the other entries as its arguments."""
    arguments = {name: value for name, value in config.items() if name != "rule"}
    return SELECT[config["rule"]](scores_TE, **arguments)


ARGUMENTS = {"token": "input_ids", "type": "token_type_ids", "domain": "domain_ids"}


class _Kept(threading.local):
    """Each thread has its own; a copy or a pickle of a model is not in the middle of a forward."""

    ids: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Kept, ()


class Given:
    """A forward pre-hook that keeps one argument of a module for the layers below.

    Token types and domains that are not given count as 0, as BERT counts types; token ids have to
    be given.

    Args:
        by: ``token``, ``type`` or ``domain``.
        position: of the argument among those of the module; None if it has no such argument. The
            hook then takes it out of the keyword arguments.
    """

    def __init__(self, by: str, position: int | None) -> None:
        self.by = by
        self.name = ARGUMENTS[by]
        self.position = position
        self.always: torch.Tensor | None = None  # where the argument is not given
        self._kept = _Kept()
        self._compiled: torch.Tensor | None = None  # what a compiler can follow

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Keep the argument; as ``register_forward_pre_hook(..., with_kwargs=True)`` calls it."""
        ids = kwargs.get(self.name)
        if ids is None and self.position is not None and self.position < len(args):
            ids = args[self.position]
        self.keep(self.always if ids is None else ids)
        if self.position is None and self.name in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != self.name}
        return args, kwargs

    def keep(self, ids: torch.Tensor | None) -> None:
        """What `of_tokens` returns from now on, in this thread."""
        if torch.compiler.is_compiling():
            self._compiled = ids
        else:
            self._kept.ids = ids

    def of_tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One number for each token, [T] int64.

        Raises:
            RuntimeError: token ids are missing, or there are not as many as tokens.
        """
        ids = self._compiled if torch.compiler.is_compiling() else self._kept.ids
        if ids is None:
            if self.by == "token":
                raise RuntimeError(
                    f"the router of an MoE layer looks at {self.name}, and they were not given"
                )
            return x_TD.new_zeros(x_TD.shape[0], dtype=torch.int64)
        count = x_TD.shape[0]
        if ids.ndim == 1 and ids.shape[0] != count and count % ids.shape[0] == 0:
            ids = ids.repeat_interleave(count // ids.shape[0])  # one for each text
        ids_T = ids.reshape(-1)
        if ids_T.shape[0] != count:
            raise RuntimeError(
                f"the router of an MoE layer has {count} tokens and {self.name} of shape "
                f"{list(ids.shape)}; its FFN does not see the tokens of the input one by one"
            )
        return ids_T.to(x_TD.device)


def hooked_module(model: nn.Module, path: str, by: str) -> tuple[str, int | None] | None:
    """The nearest module above `path` that has the argument, and its position.

    A domain may be an argument of no module: the model itself then takes it. None if there is no
    such module.
    """
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        above = ".".join(parts[:end])
        names = list(inspect.signature(model.get_submodule(above).forward).parameters)
        if ARGUMENTS[by] in names:
            return above, names.index(ARGUMENTS[by])
    return ("", None) if by == "domain" else None


def tell_routers(model: nn.Module, routers: Mapping[str, nn.Module]) -> None:
    """Register the hooks that the routers need.

    Args:
        model: has the layers in place.
        routers: path of a layer -> its router.
    """
    known: dict[tuple[str, str], Given] = {}
    for path, router in routers.items():
        by = getattr(router, "by", None)
        if by is None:
            continue
        found = hooked_module(model, path, by)
        if found is None:
            raise RuntimeError(f"{path}: no module above it is called with {ARGUMENTS[by]}")
        above, position = found
        if (above, by) not in known:
            given = known[above, by] = Given(by, position)
            model.get_submodule(above).register_forward_pre_hook(given, with_kwargs=True)
        router.given = known[above, by]  # type: ignore[assignment]  # no module


@contextmanager
def domains(model: nn.Module, ids: torch.Tensor) -> Iterator[None]:
    """Within it the texts that `model` is given are of the domains `ids`, [texts] int64.

    For ``generate``, which takes no ``domain_ids``.
    """
    routers = [m for m in model.modules() if getattr(m, "by", None) == "domain"]
    known = {id(router.given): router.given for router in routers}
    try:
        for given in known.values():
            given.always = ids  # type: ignore[union-attr]
        yield
    finally:
        for given in known.values():
            given.always = None  # type: ignore[union-attr]


WeightRule = Literal["renormalised", "softmax", "one", "renorm_detach", "gain"]
_SIMPLE = ("renormalised", "softmax", "one")
_OWN = frozenset(("forward", "scores", "choose", "_weigh"))  # where somebody else's may be


class Router(nn.Module):
    """Chooses experts for each token by scores that are linear in it.

    The scores are computed in float32 (float64 for float64 tokens). Weight rules, with p the
    softmax over all experts and S the chosen set:

    - ``renormalised``: p / sum of p over S. Sums to one.
    - ``softmax``: p. Sums to less than one.
    - ``one``: 1 for each chosen expert.
    - ``renorm_detach``: as renormalised, but no gradient through the sum, so that the router gets
      a gradient from the task even while all experts are equal.
    - ``gain``: 1 + g p with one trained g per expert, which starts at zero
      (Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416).

    ``scale`` multiplies the weights. With ``balance`` a bias, which is no parameter, is added to p
    for the selection and not for the weights, and may be moved to spread the load
    (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024, https://arxiv.org/abs/2408.15664).
    In training the layer counts its load, and `rebalance` moves the bias.

    A ``frozen`` linear router has no parameter, so it is not trained and no optimizer knows it
    (Chen et al., "SMoE-Dropout", 2023, https://arxiv.org/abs/2303.01610). The rows of a
    ``tied`` one are the mean expert keys (the rows that the activation reads), refreshed on every
    training step (Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908).

    Args:
        config: plain data, as ``MoESpec.layer_config()["router"]`` makes it: ``kind``,
            ``num_experts``, ``d_model``, ``select``, ``weights``, ``scale``, ``balance``,
            ``nulls``, and what the kind needs.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.num_experts: int = config["num_experts"]
        self.top_k: int = config["select"]["k"]
        self.weights: WeightRule = config["weights"]
        self.scale: float = config["scale"]
        self.tied: bool = config.get("tied", False)
        self.all_experts = False
        self.load_E: torch.Tensor | None = None
        rows = self.num_experts + config.get("nulls", 0)
        simple = config["select"]["rule"] == "top_k" and self.weights in _SIMPLE
        fits = 0 < self.top_k <= rows == self.num_experts and not config.get("balance")
        self.plain = simple and fits and type(self) is Router
        self.make(rows, config["d_model"], config)
        if config.get("balance"):
            self.register_buffer("selection_bias", torch.zeros(rows))
        if self.weights == "gain":
            self.gain = nn.Parameter(torch.zeros(self.num_experts))

    weight: torch.Tensor
    bias: torch.Tensor | None
    selection_bias: torch.Tensor

    def make(self, rows: int, d_model: int, config: dict[str, Any]) -> None:
        """Make the parameters that `scores` reads, for `rows` experts."""
        frozen = config.get("frozen", False)
        self._put("weight", torch.zeros(rows, d_model), frozen=self.tied or frozen)
        self._put("bias", torch.zeros(rows) if config.get("bias") else None, frozen=frozen)

    def _put(self, name: str, tensor: torch.Tensor | None, *, frozen: bool) -> None:
        if frozen:
            self.register_buffer(name, tensor)
        else:
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def attach(self, experts: nn.Module) -> None:
        """Meet the experts of the layer, which no scores but an oracle's read."""

    def stand_in(self, count: int) -> None:
        """Get ready for `count` tokens of a layer that is run outside its model."""

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens in float32 or float64 -> logits [T, E] (null experts last)."""
        weight, bias = self.weight, self.bias
        if weight.dtype != x_TD.dtype:  # a cast takes its time even if there is nothing to do
            weight, bias = weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype)
        return F.linear(x_TD, weight, bias)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits [T, E], weights [T, K] and index [T, K] of the chosen experts.

        A token that visits fewer than K experts has zeros among its weights.
        """
        logits_TE = self.scores(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)))
        true_TE = logits_TE[..., : self.num_experts]
        if self.all_experts:
            index_TK, _ = everything(true_TE, k=self.num_experts)
            return true_TE, torch.ones_like(true_TE), index_TK
        index_TK, kept_TK = self.choose(logits_TE)
        weights_TK = self._weigh(logits_TE, index_TK, kept_TK)
        if self.training and self.config.get("balance"):
            self._count(index_TK, kept_TK)
        return true_TE, weights_TK * self.scale, index_TK

    def as_linear(self) -> tuple[torch.Tensor, torch.Tensor | None, int, WeightRule, float] | None:
        """Weight, bias, K, rule and scale where these are all that `forward` computes with, in
        evaluation, and nobody watches it or has put something in its place; else None."""
        if not self.plain or self.training or self.all_experts:
            return None
        if self._forward_hooks or self._forward_pre_hooks or not _OWN.isdisjoint(self.__dict__):
            return None
        if (Router.forward, Router.scores, Router.choose, Router._weigh) != _METHODS:
            return None
        return self.weight, self.bias, self.top_k, self.weights, self.scale

    def choose(self, logits_TE: torch.Tensor) -> Selected:
        """The experts of each token, as `upcycle.selection` describes them."""
        if self.config.get("balance"):
            logits_TE = logits_TE.softmax(-1) + self.selection_bias.to(logits_TE.dtype)
        return select(logits_TE, self.config["select"])

    @torch.no_grad()
    def _count(self, index_TK: torch.Tensor, kept_TK: torch.Tensor | None) -> None:
        visits_TK = torch.ones_like(index_TK) if kept_TK is None else kept_TK.to(index_TK.dtype)
        load_E = index_TK.new_zeros(self.num_experts)
        load_E = load_E.index_add(0, index_TK.reshape(-1), visits_TK.reshape(-1))
        self.load_E = load_E if self.load_E is None else self.load_E + load_E

    @torch.no_grad()
    def rebalance(self, rate: float = 1e-3) -> None:
        """Move the selection bias by `rate` towards even load, and forget the load.

        To be called after each optimizer step. Experts that were visited less than the mean since
        the last call go up, the others down; without training nothing was counted and nothing
        moves. Null experts stay. Only what this process has seen counts.
        """
        load_E, self.load_E = self.load_E, None
        if load_E is not None:
            mean = load_E.double().mean()
            self.selection_bias[: self.num_experts] += rate * (mean - load_E).sign()

    def _weigh(
        self, logits_TE: torch.Tensor, index_TK: torch.Tensor, kept_TK: torch.Tensor | None
    ) -> torch.Tensor:
        if self.weights == "one":
            weights_TK = torch.ones_like(index_TK, dtype=logits_TE.dtype)
        elif self.weights == "renormalised" and kept_TK is None:
            return logits_TE.gather(-1, index_TK).softmax(-1)
        else:
            weights_TK = logits_TE.softmax(-1).gather(-1, index_TK)
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        if self.weights in ("renormalised", "renorm_detach"):
            total_T1 = weights_TK.sum(-1, keepdim=True)
            total_T1 = total_T1.clamp(min=torch.finfo(total_T1.dtype).tiny)  # no expert at all
            weights_TK = weights_TK / (
                total_T1.detach() if self.weights == "renorm_detach" else total_T1
            )
        elif self.weights == "gain":
            gain_TK = self.gain.to(weights_TK.dtype)[index_TK]
            weights_TK = 1 + gain_TK * weights_TK
            weights_TK = weights_TK if kept_TK is None else weights_TK * kept_TK
        return weights_TK

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        config = self.config
        shape = f"num_experts={self.num_experts}, d_model={config['d_model']}"
        return f"{shape}, select={config['select']}, weights={self.weights}, tied={self.tied}"


_METHODS = (Router.forward, Router.scores, Router.choose, Router._weigh)


# By class, of transformers and torch.
_OF_CLASS = {
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "LinearActivation": "none",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
# By the name of a `Pointwise`; with a gate the activation is that of the gate.
_PLAIN = {name: name for name in ("gelu", "gelu_tanh", "relu", "relu2", "silu")}
_GATED = {
    "bilinear": "none",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "swiglu": "silu",
}


def of_pointwise(name: str, arity: int) -> str | None:
    """The activation of a `Pointwise` with that name, None if kernels do not know it."""
    return (_PLAIN if arity == 1 else _GATED).get(name)


def of_module(module: Any) -> str | None:
    """The activation of a module with the experts interface of transformers, None if unknown.

    Gate and value are the halves of what is expanded, in this order, or it is unknown.
    """
    act: Any = getattr(module, "act_fn", None)
    pointwise = getattr(act, "pointwise", None)
    if pointwise is not None:  # an `upcycle.experts.Experts`
        if module.training and act.dropout:
            return None
        return of_pointwise(pointwise.name, pointwise.arity)
    if module.has_gate:
        default = _interface._default_apply_gate
        is_concatenated = getattr(module, "is_concatenated", True)
        if not is_concatenated or getattr(type(module), "_apply_gate", default) is not default:
            return None
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _OF_CLASS.get(type(act).__name__)


try:
    from upcycle.compiled import run_compiled as run_compiled
    from upcycle.compiled import run_routed as run_routed
except ImportError:  # in the file of a converted model, where upcycle is not installed
    run_compiled = run_routed = None  # type: ignore[assignment]

# Nanoseconds for each weight and row of an expert, by the number of rows: one expert for itself,
# and experts side by side in one product; then for one token, whose products are with a vector.
# As `python benchmarks/expert_kernels.py --costs` prints them, on two idle cores.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ALONE = (0.21, 0.19, 0.16, 0.069, 0.042, 0.027, 0.019, 0.015, 0.013)
BESIDE = (0.13, 0.086, 0.046, 0.028, 0.019, 0.015, 0.013, 0.012, 0.011)
ONE = 0.21
CALL, ONE_CALL = 50_000.0, 8_000.0  # nanoseconds of the calls for a chunk, and for a vector
MOVE = 1.0  # nanoseconds for each number of a row that is gathered or summed


class ExpertWeights(NamedTuple):
    """The experts of a layer, as the kernels read them."""

    up_EGD: torch.Tensor
    up_bias_EG: torch.Tensor | None
    down_EOI: torch.Tensor
    down_bias_EO: torch.Tensor | None
    activate: Callable[[torch.Tensor], torch.Tensor]
    activation: str | None  # its name, if kernels know it
    norm: Callable[[torch.Tensor], torch.Tensor] | None


class Visits(NamedTuple):
    """Which expert each token visits: the pairs whose weight is not zero, token by token."""

    pair_S: Any  # place in [T, K]
    expert_S: Any
    load_E: Any


def visit(
    w: ExpertWeights, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """What the chosen experts of each token add, weighted, in the way that seems cheapest.

    Arguments and promise are those of `upcycle.kernels.run_experts`.
    """
    if run_compiled is not None and w.norm is None:
        y_TO = run_compiled(*w[:4], w.activation, x_TD, index_TK, weights_TK)
        if y_TO is not None:
            return y_TO
    if len(x_TD) == 1 and one_by_one(w, weights_TK.shape[1]):
        return one_token(w, x_TD, index_TK, weights_TK).to(x_TD.dtype)
    visits = _visits(index_TK, weights_TK, len(w.up_EGD))
    if not len(visits.pair_S):
        return x_TD.new_zeros(len(x_TD), w.down_EOI.shape[1])
    kernel, chunk = choose(w, visits.load_E, len(x_TD))
    if kernel == "dense":
        y_TO = dense(w, x_TD, index_TK, weights_TK)
    else:
        y_TO = in_chunks(w, x_TD, visits, weights_TK, chunk)
    return y_TO.to(x_TD.dtype)


def _visits(index_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> Visits:
    visited_TK = weights_TK.detach() != 0
    expert_S = index_TK.reshape(-1).numpy()
    # On so few numbers numpy takes a third of the time of torch.
    pair_S = numpy.flatnonzero(visited_TK.numpy())
    if len(pair_S) < len(expert_S):
        expert_S = expert_S[pair_S]
    return Visits(pair_S, expert_S, numpy.bincount(expert_S, minlength=num_experts))


def one_by_one(w: ExpertWeights, top_k: int) -> bool:
    """Whether `one_token` is the cheapest for one token: it has no time to ask numpy."""
    num_experts, d_out, width = w.down_EOI.shape
    size = w.up_EGD.shape[1] * w.up_EGD.shape[2] + d_out * width
    return top_k * (ONE_CALL + size * ONE) <= CALL + num_experts * size * BESIDE[0]


def choose(w: ExpertWeights, load_E: Any, tokens: int) -> tuple[str, int]:
    """The cheapest kernel by the table of costs, and for `in_chunks` the experts of a chunk."""
    num_experts, d_out, width = w.down_EOI.shape
    size, row = w.up_EGD[0].numel() + d_out * width, MOVE * (w.up_EGD.shape[2] + d_out)
    alone = size * (load_E * numpy.interp(load_E, ROWS, ALONE)).sum() + row * load_E.sum()
    found = {("in_chunks", 1): numpy.count_nonzero(load_E) * CALL + alone}
    for chunk in {min(4, num_experts), num_experts} - {1}:
        most = numpy.maximum.reduceat(load_E, range(0, num_experts, chunk))
        beside = size * (most * numpy.interp(most, ROWS, BESIDE)).sum() + row * most.sum()
        found["in_chunks", chunk] = numpy.count_nonzero(most) * CALL + chunk * beside
    if w.norm is None and w.up_EGD.is_contiguous():
        summed = MOVE * d_out * min(tokens, 2 * width)
        all_rows = size * tokens * numpy.interp(tokens, ROWS, BESIDE) + summed
        found["dense", 1] = CALL + num_experts * all_rows
    return min(found, key=lambda way: float(found[way]))


def one_token(
    w: ExpertWeights, x_1D: torch.Tensor, index_1K: torch.Tensor, weights_1K: torch.Tensor
) -> torch.Tensor:
    """Expert after expert: their weights are read where they are, and once."""
    x_D = x_1D[0].to(w.up_EGD.dtype)
    weight_K = weights_1K[0].to(x_D.dtype)
    y_O = x_D.new_zeros(w.down_EOI.shape[1])
    chosen = zip(index_1K[0].tolist(), weights_1K[0].tolist(), weight_K, strict=True)
    for expert, number, weight in chosen:
        if not number:
            continue
        z_G = torch.mv(w.up_EGD[expert], x_D)
        if w.up_bias_EG is not None:
            z_G = z_G + w.up_bias_EG[expert]
        hidden_I = w.activate(z_G)
        if w.norm is None and w.down_bias_EO is None:
            y_O = torch.addmv(y_O, w.down_EOI[expert], hidden_I * weight)
        else:
            added_O = torch.mv(w.down_EOI[expert], hidden_I)
            if w.down_bias_EO is not None:
                added_O = added_O + w.down_bias_EO[expert]
            y_O = y_O + weight * (added_O if w.norm is None else w.norm(added_O))
    return y_O[None]


def in_chunks(
    w: ExpertWeights, x_TD: torch.Tensor, visits: Visits, weights_TK: torch.Tensor, chunk: int
) -> torch.Tensor:
    """`chunk` experts at a time, side by side in one product, each with as many rows as the most
    visited one of them has tokens."""
    tokens, top_k = weights_TK.shape
    first_row_E, most = _rows(visits.load_E, chunk)
    order_S = visits.expert_S.astype(numpy.uint16).argsort(kind="stable")
    rank_S = numpy.arange(len(order_S))
    # A row that nobody has reads token 0, and nobody reads what it gives.
    token_R = numpy.zeros(sum(min(chunk, len(w.up_EGD) - e) * n for e, n in most), numpy.int64)
    row_S = numpy.empty_like(rank_S)
    before_E = visits.load_E.cumsum() - visits.load_E
    row_S[order_S] = rank_S + (first_row_E - before_E)[visits.expert_S[order_S]]
    token_S = visits.pair_S // top_k
    token_R[row_S] = token_S
    x_RD = x_TD.index_select(0, torch.from_numpy(token_R))
    parts, start = [], 0
    for expert, rows in most:
        count = min(chunk, len(w.up_EGD) - expert)
        x_CD = x_RD[start : start + count * rows]
        start += count * rows
        parts.append(_expert(w, expert, x_CD) if count == 1 else _chunk(w, expert, count, x_CD))
    y_RO = parts[0] if len(parts) == 1 else torch.cat(parts)
    weight_S = weights_TK.reshape(-1)
    if len(token_S) < len(weight_S):
        weight_S = weight_S[torch.from_numpy(visits.pair_S)]
    y_TO: torch.Tensor = F.embedding_bag(
        torch.from_numpy(row_S),
        y_RO,
        torch.from_numpy(numpy.searchsorted(token_S, numpy.arange(tokens))),
        mode="sum",
        per_sample_weights=weight_S.to(y_RO.dtype),
    )
    return y_TO


def _rows(load_E: Any, chunk: int) -> tuple[Any, list[tuple[int, int]]]:
    """The first row of each expert, and of each chunk that is visited its first expert and C."""
    starts = numpy.arange(0, len(load_E), chunk)
    most = numpy.maximum.reduceat(load_E, starts)
    rows_E = most.repeat(chunk)[: len(load_E)]
    visited = [(e, n) for e, n in zip(starts.tolist(), most.tolist(), strict=True) if n]
    return rows_E.cumsum() - rows_E, visited


def _expert(w: ExpertWeights, expert: int, x_CD: torch.Tensor) -> torch.Tensor:
    bias_G = None if w.up_bias_EG is None else w.up_bias_EG[expert]
    bias_O = None if w.down_bias_EO is None else w.down_bias_EO[expert]
    hidden_CI = w.activate(F.linear(x_CD, w.up_EGD[expert], bias_G))
    y_CO = F.linear(hidden_CI, w.down_EOI[expert], bias_O)
    return y_CO if w.norm is None else w.norm(y_CO)


def _chunk(w: ExpertWeights, first: int, count: int, x_RD: torch.Tensor) -> torch.Tensor:
    chosen = slice(first, first + count)
    x_NCD = x_RD.view(count, -1, x_RD.shape[1])
    z_NCG = x_NCD @ w.up_EGD[chosen].mT
    if w.up_bias_EG is not None:
        z_NCG = z_NCG + w.up_bias_EG[chosen, None]
    y_NCO = w.activate(z_NCG) @ w.down_EOI[chosen].mT
    if w.down_bias_EO is not None:
        y_NCO = y_NCO + w.down_bias_EO[chosen, None]
    y_RO = y_NCO.flatten(0, 1)
    return y_RO if w.norm is None else w.norm(y_RO)


def dense(
    w: ExpertWeights, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """All experts as one FFN whose hidden numbers are weighted."""
    num_experts, d_out, width = w.down_EOI.shape
    bias_G = None if w.up_bias_EG is None else w.up_bias_EG.flatten()
    z_TG = F.linear(x_TD, w.up_EGD.flatten(0, 1), bias_G)
    hidden_TEI = w.activate(z_TG.view(len(x_TD), num_experts, -1))
    # Where the weight is zero the index may be that of an expert of another process.
    index_TK = index_TK.clamp(0, num_experts - 1)
    weights_TE = hidden_TEI.new_zeros(len(x_TD), num_experts)
    weights_TE = weights_TE.scatter_add(1, index_TK, weights_TK.to(hidden_TEI.dtype))
    hidden_TEI = hidden_TEI * weights_TE[:, :, None]
    if len(x_TD) < 2 * width:
        y_TO = (hidden_TEI.transpose(0, 1) @ w.down_EOI.mT).sum(0)
    else:
        down_FO = w.down_EOI.transpose(1, 2).reshape(-1, d_out)
        y_TO = hidden_TEI.flatten(1) @ down_FO
    return y_TO if w.down_bias_EO is None else y_TO + weights_TE @ w.down_bias_EO


def run_as_one_node(
    experts: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """``upcycle::moe`` of an `upcycle.experts.Experts`."""
    parameters = (experts.up_EGD, experts.up_bias_EG, experts.down_proj, experts.program)
    y_TO: torch.Tensor = torch.ops.upcycle.moe(x_TD, index_TK, weights_TK, *parameters)
    return y_TO


@lru_cache(maxsize=256)
def activation(program: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], str | None]:
    """The activation that `Pointwise.to_json` describes, on expansions side by side; its name."""
    pointwise = Pointwise.from_json(json.loads(program))
    return partial(_activate, pointwise), of_pointwise(pointwise.name, pointwise.arity)


def _activate(pointwise: Pointwise, z_TG: torch.Tensor) -> torch.Tensor:
    return pointwise(*z_TG.chunk(pointwise.arity, dim=-1))


def moe(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_EOI: torch.Tensor,
    program: str,
) -> torch.Tensor:
    """What ``torch.ops.upcycle.moe`` computes; `program` is the activation, see `activation`.

    Returns:
        [T, O], in the dtype of `x_TD`.
    """
    weights = ExpertWeights(up_EGD, up_bias_EG, down_EOI, None, *activation(program), None)
    return visit(weights, x_TD, index_TK, weights_TK)


def moe_backward(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_EOI: torch.Tensor,
    program: str,
) -> list[torch.Tensor]:
    """The gradients of `moe` by its tokens, weights and parameters; it is computed again."""
    with torch.enable_grad():
        x, weights, up, down = (
            tensor.detach().requires_grad_() for tensor in (x_TD, weights_TK, up_EGD, down_EOI)
        )
        bias = None if up_bias_EG is None else up_bias_EG.detach().requires_grad_()
        y_TO = moe(x, index_TK, weights, up, bias, down, program)
        given = [tensor for tensor in (x, weights, up, bias, down) if tensor is not None]
        if not y_TO.requires_grad:  # nobody is visited
            return [tensor.new_zeros(tensor.shape) for tensor in given]
        found = torch.autograd.grad(y_TO, given, grad_TO, materialize_grads=True)
    return [gradient.contiguous() for gradient in found]  # as a compiler was promised


def _moe_shape(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_EOI: torch.Tensor,
    program: str,
) -> torch.Tensor:
    return x_TD.new_empty(x_TD.shape[0], down_EOI.shape[1])


def _backward_shapes(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_EOI: torch.Tensor,
    program: str,
) -> list[torch.Tensor]:
    given = (x_TD, weights_TK, up_EGD, up_bias_EG, down_EOI)
    return [tensor.new_empty(tensor.shape) for tensor in given if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.program = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, weights, up, *bias, down = torch.ops.upcycle.moe_backward(grad_TO, *saved, ctx.program)
    return x, None, weights, up, bias[0] if bias else None, down, None


_GIVEN = (
    "Tensor x, Tensor index, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, str program"
)

if not hasattr(torch.ops.upcycle, "moe"):  # the file of a converted model has this text, too
    torch.library.define("upcycle::moe", f"({_GIVEN}) -> Tensor")
    torch.library.define("upcycle::moe_backward", f"(Tensor grad, {_GIVEN}) -> Tensor[]")
    torch.library.impl("upcycle::moe", "cpu", moe)
    torch.library.impl("upcycle::moe_backward", "cpu", moe_backward)
    torch.library.register_fake("upcycle::moe", _moe_shape)
    torch.library.register_fake("upcycle::moe_backward", _backward_shapes)
    torch.library.register_autograd("upcycle::moe", _gradients, setup_context=_keep)


def run_experts(
    experts: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """What the chosen experts of each token add, weighted.

    Pairs of weight zero cost nothing, and their index is not looked at. The order of the sums
    depends on the arguments alone, so the result is the same each time. Differentiable. Where
    shapes may not depend on the routing (compilation, export, fake tensors) it is the operation
    ``upcycle::moe`` for experts that have a `program`; that, and other devices than the CPU, are
    transformers' `grouped_mm` for the experts of other models.

    Args:
        experts: a module with the experts interface of transformers.
        x_TD: tokens, float.
        index_TK: int64.
        weights_TK: float.

    Returns:
        [T, O], in the dtype of `x_TD`.
    """
    static = torch.compiler.is_compiling() or isinstance(x_TD, FakeTensor)
    if x_TD.device.type != "cpu" or (static and not hasattr(experts, "program")):
        y_TO: torch.Tensor = grouped_mm_experts_forward(experts, x_TD, index_TK, weights_TK)
        return y_TO
    if static:
        return run_as_one_node(experts, x_TD, index_TK, weights_TK)
    return visit(weights_of(experts), x_TD, index_TK, weights_TK)


def visit_by_all(shared: Any, x_TD: torch.Tensor) -> torch.Tensor | None:
    """What an expert adds that every token visits, an `upcycle.experts.SharedExpert`.

    Returns:
        [T, O], or None where only torch can compute it.
    """
    if run_compiled is None or torch.compiler.is_compiling() or x_TD.device.type != "cpu":
        return None
    up, down = shared.up, shared.down_proj
    bias_1G = None if up.bias is None else up.bias[None]
    index_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int64)
    weights = (up.weight[None], bias_1G, down.weight[None], None, of_module(shared))
    return run_compiled(*weights, x_TD, index_T1, torch.ones(len(x_TD), 1))


def route_and_visit(experts: Any, x_TD: torch.Tensor, router: Any) -> torch.Tensor | None:
    """What the experts add that a linear router chooses, in one call.

    Args:
        experts: an `upcycle.experts.Experts`.
        x_TD: tokens, float.
        router: as of `upcycle.compiled.run_routed`.

    Returns:
        [T, O], or None where only torch can compute it.
    """
    if run_routed is None:
        return None
    own = experts._parameters  # less to fetch than attributes, when all caches hold other weights
    up_EGD, down_EOI = own.get(experts.up_name), own.get("down_proj")
    bias_EG = own.get(f"{experts.up_name}_bias")
    if up_EGD is None or down_EOI is None or (bias_EG is None) is experts.has_bias:
        return None
    return run_routed(up_EGD, bias_EG, down_EOI, of_module(experts), x_TD, router)


def weights_of(experts: Any) -> ExpertWeights:
    """The parameters of a module with the experts interface of transformers."""
    gated, biased = experts.has_gate, experts.has_bias
    up_EGD = experts.gate_up_proj if gated else experts.up_proj
    down_EOI, up_bias_EG, down_bias_EO = experts.down_proj, None, None
    if experts.is_transposed:
        up_EGD, down_EOI = up_EGD.mT, down_EOI.mT
    if biased:
        up_bias_EG = experts.gate_up_proj_bias if gated else experts.up_proj_bias
        down_bias_EO = None if hasattr(experts, "program") else experts.down_proj_bias
    activate = experts._apply_gate if gated else experts.act_fn
    norm = experts.post_expert_norm if experts.has_post_expert_norm else None
    name = of_module(experts)
    return ExpertWeights(up_EGD, up_bias_EG, down_EOI, down_bias_EO, activate, name, norm)


ALL_EXPERTS_FUNCTIONS.register("upcycle", run_experts)


class Activation(nn.Module):
    """`Pointwise` as a module, with the dropout that the dense FFN had on its hidden layer."""

    def __init__(self, pointwise: Pointwise, dropout: float) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.dropout = dropout

    def forward(self, *z: torch.Tensor) -> torch.Tensor:
        """As `Pointwise.__call__`, then dropout."""
        return F.dropout(self.pointwise(*z), self.dropout, self.training)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return self.pointwise.name


class Experts(nn.Module):
    """E experts of I neurons each, stored as 3-D tensors.

    Gated: `gate_up_proj` [E, 2I, D] (gate rows first); plain: `up_proj` [E, I, D]; then
    `down_proj` [E, O, I]; optional `*_bias`. `program` is the activation as a line of JSON.
    Which kernel runs is ``config._experts_implementation``: ``upcycle``, which is `run_experts` on
    the CPU and ``grouped_mm`` elsewhere, another name that transformers knows, or ``eager``.
    """

    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        width: int,
        d_out: int,
        *,
        pointwise: Pointwise,
        bias: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = d_model
        self.intermediate_dim = width
        self.has_gate = pointwise.arity > 1
        self.has_bias = bias
        self._is_expert_parallel = False
        self.act_fn = Activation(pointwise, dropout)
        self.config: Any = SimpleNamespace(_experts_implementation="upcycle")
        self.program = json.dumps(pointwise.to_json())
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        rows = pointwise.arity * width
        self.register_parameter(self.up_name, nn.Parameter(torch.zeros(num_experts, rows, d_model)))
        if bias:
            up_bias = nn.Parameter(torch.zeros(num_experts, rows))
            self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.down_proj = nn.Parameter(torch.zeros(num_experts, d_out, width))

    @property
    def up_EGD(self) -> torch.Tensor:
        """The fused expansions, [E, arity * I, D]."""
        weight: torch.Tensor = getattr(self, self.up_name)
        return weight

    @property
    def up_bias_EG(self) -> torch.Tensor | None:
        """The biases of the expansions, [E, arity * I], or None."""
        bias: torch.Tensor | None = getattr(self, f"{self.up_name}_bias", None)
        return bias

    @property
    def down_proj_bias(self) -> torch.Tensor:
        """Zeros [E, O]: the interface wants it beside an up bias; the layer adds the real one."""
        return self.down_proj.new_zeros(self.down_proj.shape[:2])

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.act_fn(*gate_up.chunk(self.act_fn.pointwise.arity, dim=-1))
        return hidden

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [T, D], index [T, K] int64, weights [T, K] -> [T, O], in the tokens' dtype."""
        name = self.config._experts_implementation
        if name == "upcycle":
            if hidden_states.device.type != "cpu":
                name = "grouped_mm"
            elif self._must_be_unrolled():
                return self.masked_forward(hidden_states, top_k_index, top_k_weights)
            else:
                return run_experts(self, hidden_states, top_k_index, top_k_weights)
        # The functions of transformers take the width of the output from the input.
        is_square = self.down_proj.shape[1] == self.hidden_dim
        if not is_square or (name == "grouped_mm" and not self._fits_grouped_mm()):
            name = "eager"
        if name != "eager":
            kernel = ALL_EXPERTS_FUNCTIONS.get_interface(name, type(self).eager_forward)
        elif torch.compiler.is_compiling():  # shapes may not depend on the routing
            kernel = type(self).masked_forward
        else:
            kernel = type(self).eager_forward
        out: torch.Tensor = kernel(self, hidden_states, top_k_index, top_k_weights)
        return out

    def _must_be_unrolled(self) -> bool:
        """A graph of ordinary operations is wanted, or one that ``upcycle::moe`` cannot be in."""
        if not torch.compiler.is_compiling():
            return False
        return torch.onnx.is_in_onnx_export() or (self.training and self.act_fn.dropout > 0)

    def _fits_grouped_mm(self) -> bool:
        """torch's grouped_mm: no float64, and rows whose length in bytes is a multiple of 16."""
        size = self.down_proj.element_size()
        widths = (self.hidden_dim, self.intermediate_dim, self.up_EGD.shape[1])
        return size <= 4 and all(width * size % 16 == 0 for width in widths)

    def expert(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """What one expert adds for tokens [T, D], not weighted; [T, O]."""
        up_bias_EG = self.up_bias_EG
        bias = None if up_bias_EG is None else up_bias_EG[expert]
        hidden = self._apply_gate(F.linear(x_TD, self.up_EGD[expert], bias))
        return F.linear(hidden, self.down_proj[expert])

    def eager_forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """One expert after the other: the reference that the kernels are held against."""
        out_TO = weights_TK.new_zeros(len(x_TD), self.down_proj.shape[1])
        for expert in range(self.num_experts):
            token, slot = torch.where((index_TK == expert) & (weights_TK != 0))
            y = self.expert(expert, x_TD[token]) * weights_TK[token, slot, None]
            out_TO = out_TO.index_add(0, token, y.to(out_TO.dtype))
        return out_TO.to(x_TD.dtype)

    def masked_forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Every expert on every token, weighted: shapes that do not depend on the routing."""
        out_TO = weights_TK.new_zeros(len(x_TD), self.down_proj.shape[1])
        for expert in range(self.num_experts):
            weight_T1 = (weights_TK * (index_TK == expert)).sum(-1, keepdim=True)
            out_TO = out_TO + self.expert(expert, x_TD) * weight_T1
        return out_TO.to(x_TD.dtype)


_FORWARD = Experts.forward


def are_untouched(experts: nn.Module) -> bool:
    """`Experts` whose `forward` is the one above, unwatched."""
    return is_untouched(experts, Experts) and Experts.forward is _FORWARD


class SharedExpert(nn.Module):
    """The neurons that every token visits, as one FFN without an output bias, [T, D] -> [T, O]."""

    def __init__(
        self,
        d_model: int,
        width: int,
        d_out: int,
        *,
        pointwise: Pointwise,
        bias: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.act_fn = Activation(pointwise, dropout)
        self.has_gate = pointwise.arity > 1
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        rows = pointwise.arity * width
        setattr(self, self.up_name, nn.Linear(d_model, rows, bias=bias))
        self.down_proj = nn.Linear(width, d_out, bias=False)

    @property
    def up(self) -> nn.Linear:
        """The fused expansions, [arity * S, D]."""
        linear: nn.Linear = getattr(self, self.up_name)
        return linear

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The sum over the shared neurons."""
        if is_untouched(self.up, nn.Linear) and is_untouched(self.down_proj, nn.Linear):
            found = visit_by_all(self, x_TD)
            if found is not None:
                return found
        z_TG = self.up(x_TD)
        hidden_TI = self.act_fn(*z_TG.chunk(self.act_fn.pointwise.arity, dim=-1))
        out: torch.Tensor = self.down_proj(hidden_TI)
        return out


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Nobody has put an adapter or a hook there."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooks


ROUTERS = {"linear": Router}


# Multiplications of a router that take no longer than torch's calls.
AT_ONCE = 1 << 20
# Multiplications of a router that are over before a second thread of torch has woken up.
ONE_THREAD = 1 << 23


class MoE(nn.Module):
    """Router and experts; a shared expert, a thin linear map and an output bias for every token.

    ``y = sum_k w_k E_k(x) + Shared(x) + U V x + b``, of which all but the sum may be missing. `b`
    is the output bias of the dense FFN, which is right under every routing rule if added once.
    `config` is plain data, as `MoESpec.layer_config` makes it, so that a checkpoint can carry it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        pointwise = Pointwise.from_json(config["pointwise"])
        num_experts, d_model, d_out = config["num_experts"], config["d_model"], config["d_out"]
        bias, dropout = config["up_bias"], config["hidden_dropout"]
        self.router = ROUTERS[config["router"]["kind"]](config["router"])
        self.experts = Experts(
            num_experts,
            d_model,
            config["width"],
            d_out,
            pointwise=pointwise,
            bias=bias,
            dropout=dropout,
        )
        self.router_size = sum(tensor.numel() for tensor in self.router.state_dict().values())
        self.router.attach(self.experts)
        self.shared_expert = (
            SharedExpert(
                d_model, config["shared"], d_out, pointwise=pointwise, bias=bias, dropout=dropout
            )
            if config.get("shared")
            else None
        )
        rank = config.get("low_rank", 0)
        self.low_rank = (
            nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_out, bias=False))
            if rank
            else None
        )
        self.output_bias = nn.Parameter(torch.zeros(d_out)) if config["output_bias"] else None
        self.output_dropout = config["output_dropout"]
        self.axis = config.get("axis", -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [..., D] -> [..., O]; with ``axis: 1`` (convolutions) [B, D, ...] likewise."""
        if self.training and self.router.tied:
            self.tie_router()
        if self.axis != -1:
            x = x.movedim(self.axis, -1)
        y = self.tokens(x.reshape(-1, x.shape[-1]))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if self.axis != -1:
            y = y.movedim(-1, self.axis)
        return F.dropout(y, self.output_dropout, True) if self.training else y

    def tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The layer on a list of tokens, [T, D] -> [T, O], without dropout."""
        y_TO = self._at_once(x_TD)
        if y_TO is None:
            _, weights_TK, index_TK = self._route(x_TD)
            y_TO = self.experts(x_TD, index_TK, weights_TK)
        if self.shared_expert is not None:
            y_TO = y_TO + self.shared_expert(x_TD)
        if self.low_rank is not None:
            y_TO = y_TO + self.low_rank(x_TD)
        return y_TO if self.output_bias is None else y_TO + self.output_bias

    def _at_once(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """What router and experts give for few tokens, where torch would be slower than they are;
        None where only torch can compute it, or somebody watches."""
        if torch.compiler.is_compiling() or not 0 < x_TD.shape[0] * self.router_size < AT_ONCE:
            return None
        parts = self._modules
        experts: Any = parts["experts"]
        router = parts["router"]
        watched: bool = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        if watched or not are_untouched(experts):
            return None
        if experts.config._experts_implementation != "upcycle" or torch.is_autocast_enabled("cpu"):
            return None
        linear = router.as_linear() if isinstance(router, Router) else None
        return None if linear is None else route_and_visit(experts, x_TD, linear)

    def _route(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling() or not x_TD.is_cpu:
            return self.router(x_TD)  # type: ignore[no-any-return]
        if not 0 < x_TD.shape[0] * self.router_size < ONE_THREAD:
            return self.router(x_TD)  # type: ignore[no-any-return]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.router(x_TD)  # type: ignore[no-any-return]
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def tie_router(self) -> None:
        """Set each router row to the mean key of its expert, not counting zero padding."""
        up_EGD = self.experts.up_EGD
        if hasattr(up_EGD, "full_tensor"):  # this process holds some of the experts only
            up_EGD = up_EGD.full_tensor()
        key_EID = up_EGD[:, : self.experts.intermediate_dim].to(self.router.weight.dtype)
        count_E1 = (key_EID != 0).any(-1).sum(-1, keepdim=True).clamp(min=1)
        # Not seen by autograd: the same layer may run twice before the backward pass.
        self.router.weight.data.copy_(key_EID.sum(1) / count_E1)


@contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Within it every MoE layer of `model` runs all its experts with weight one (K = N).

    A split is then exactly the dense FFN, whatever its router says: the check that every split
    method is run with.
    """
    routers = [m.router for m in model.modules() if isinstance(m, MoE)]
    saved = [r.all_experts for r in routers]
    try:
        for router in routers:
            router.all_experts = True
        yield
    finally:
        for router, before in zip(routers, saved, strict=True):
            router.all_experts = before


def rebalance(model: nn.Module, rate: float = 1e-3) -> None:
    """`Router.rebalance` for every layer of `model` that balances its load."""
    for layer in model.modules():
        if isinstance(layer, MoE) and layer.config["router"].get("balance"):
            layer.router.rebalance(rate)


class _Remembered(threading.local):
    """The input of an FFN, between its expansion and its contraction; each thread has its own.

    A copy or a pickle of a model is not in the middle of a forward, so it remembers nothing.
    """

    x: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Remembered, ()


class _Absent(torch.Tensor):
    """An empty tensor that stands for a weight that is no longer there.

    As a subclass it makes fused fast paths, which would use the weight, step aside.
    """


class TappedMoE(MoE):
    """The MoE layer in the place of a contraction: it computes on what its taps were given.

    Where other columns of the contraction map something else, `kept_weight` [O, C] holds them, and
    `columns` are the ``(start, stop)`` of the neurons between them.
    """

    def __init__(
        self, config: dict[str, Any], *, columns: Sequence[int] = (), hidden: int = 0
    ) -> None:
        super().__init__(config)
        self.columns = tuple(columns)
        if columns:
            kept = torch.zeros(config["d_out"], hidden - (columns[1] - columns[0]))
            self.kept_weight = nn.Parameter(kept)
        self._remembered = _Remembered()
        self._compiled_x: torch.Tensor | None = None  # what a compiler can follow

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled_x": None}

    def remember(self, x: torch.Tensor) -> None:
        """Keep the input of the FFN until the contraction runs."""
        if torch.compiler.is_compiling():
            self._compiled_x = x
        else:
            self._remembered.x = x

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` gives the shape of the result, and the inputs of the columns that are kept."""
        x = self._compiled_x
        if x is not None:
            self._compiled_x = None
        elif not torch.compiler.is_compiling():
            x, self._remembered.x = self._remembered.x, None
        if x is None:
            raise RuntimeError(
                "a contraction ran without its expansion: the forward of the model has changed "
                "since it was converted"
            )
        y = super().forward(x)
        shape = list(hidden.shape)
        shape[self.axis] = y.shape[self.axis]
        y = y.reshape(shape)
        if not self.columns:
            return y
        start, stop = self.columns
        others = hidden.movedim(self.axis, -1)
        others = torch.cat([others[..., :start], others[..., stop:]], -1)
        return y + F.linear(others, self.kept_weight).movedim(-1, self.axis)

    @property
    def weight(self) -> torch.Tensor:
        """Answers questions about dtype and device; holds nothing."""
        empty = self.experts.down_proj.new_empty(0)
        # Tensors of an exporter are subclasses already; fused paths step aside for them, too.
        return empty.as_subclass(_Absent) if type(empty) is torch.Tensor else empty

    @property
    def bias(self) -> torch.Tensor | None:
        """As `weight`; None where the dense FFN had no bias."""
        return None if self.output_bias is None else self.weight


class Tap(nn.Module):
    """In the place of an expansion: remembers its input, returns an empty hidden tensor."""

    _layer: TappedMoE

    def __init__(self, layer: TappedMoE, *, first: bool, width: int = 0) -> None:
        super().__init__()
        self.first = first
        self.width = width
        # Not a registered child: the layer's parameters have one name, the contraction's.
        object.__setattr__(self, "_layer", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> zeros [..., width]."""
        if self.first:
            self._layer.remember(x)
        shape = list(x.shape)
        shape[self._layer.axis] = self.width
        return x.new_zeros(shape)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"width={self.width}"

    @property
    def weight(self) -> torch.Tensor:
        """Answers questions about dtype and device; holds nothing."""
        return self._layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """As `weight`; None where the dense FFN had no bias."""
        return self.weight if self._layer.experts.has_bias else None


class PartialTap(nn.Module):
    """In the place of an expansion that also maps x to something else, which it goes on doing.

    `weight` [R, D] and `bias` [R] hold the rows that stay; `taken` are the ``(start, stop)`` of the
    FFN's rows, which come out as zeros, in the `width` of the dense map.
    """

    _layer: TappedMoE

    def __init__(
        self,
        layer: TappedMoE,
        *,
        first: bool,
        width: int,
        taken: Sequence[Sequence[int]],
        bias: bool,
    ) -> None:
        super().__init__()
        self.first = first
        self.width = width
        self.taken = [(int(start), int(stop)) for start, stop in taken]
        rows = width - sum(stop - start for start, stop in self.taken)
        self.weight = nn.Parameter(torch.zeros(rows, layer.config["d_model"]))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        object.__setattr__(self, "_layer", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., width]."""
        if self.first:
            self._layer.remember(x)
        z = F.linear(x.movedim(self._layer.axis, -1), self.weight, self.bias)
        pieces, done, at = [], 0, 0
        for start, stop in [*self.taken, (self.width, self.width)]:
            pieces.append(z[..., done : done + start - at])
            pieces.append(z.new_zeros(*z.shape[:-1], stop - start))
            done, at = done + start - at, stop
        return torch.cat(pieces, -1).movedim(-1, self._layer.axis)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"width={self.width}, taken={self.taken}"


def _taps(layer: TappedMoE, site: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """What goes in the place of each expansion."""
    paths, kept = site["expansions"], site.get("kept") or {}
    widths = site.get("tap_widths") or [0] * len(paths)
    for i, (path, width) in enumerate(zip(paths, widths, strict=True)):
        taken = kept["rows"][i] if kept else [[0, width]]
        if sum(stop - start for start, stop in taken) == width:
            yield path, Tap(layer, first=i == 0, width=width)
        else:
            bias = kept["biases"][i]
            yield path, PartialTap(layer, first=i == 0, width=width, taken=taken, bias=bias)


def install(model: nn.Module, sites: Sequence[Mapping[str, Any]]) -> list[MoE]:
    """Put an MoE layer, with weights of zero, at each site of `model`, in place.

    Args:
        model: the dense model; on the meta device the layers are made there too.
        sites: as ``MoESpec.site()`` describes them.

    A module that is registered at several places of `model` is replaced at all of them.

    Returns:
        The layers, in the order of `sites`.
    """
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)

    def put(path: str, new: nn.Module) -> None:
        for place in places[id(model.get_submodule(path))]:
            model.set_submodule(place, new)

    layers: list[MoE] = []
    for site in sites:
        if site["placement"] == "module":
            layer = MoE(site["layer"])
            put(site["path"], layer)
        else:
            kept = site.get("kept") or {"columns": (), "hidden": 0}
            layer = TappedMoE(site["layer"], columns=kept["columns"], hidden=kept["hidden"])
            for path, tap in _taps(layer, site):
                put(path, tap.train(model.training))
            put(site["contraction"], layer)
        layer.train(model.training)
        layers.append(layer)
    places_of = [s["path"] if s["placement"] == "module" else s["contraction"] for s in sites]
    routers = [layer.router for layer in layers]
    tell_routers(model, dict(zip(places_of, routers, strict=True)))
    return layers


FORMAT = 1  # of the description in config.json; a later one may say what this code does not know

# Functions of transformers that read the activation from elsewhere, or that nothing here was
# compared with.
FOREIGN_KERNELS = ("deepgemm", "sonicmoe")


class UpcycledConfig:
    """To be named before the dense configuration; its `upcycle` describes the layers."""

    output_router_logits = False
    router_aux_loss_coef = 0.001


class UpcycledModel(nn.Module):
    """Puts the layers that ``config.upcycle`` describes in place when the model is built.

    To be named before the dense class, which it changes in four ways:

    - ``experts_implementation`` may be ``upcycle`` (the default: its own kernels on the CPU, else
      ``grouped_mm``), ``grouped_mm`` (layers that torch's kernel does not fit run one expert after
      the other), ``eager``, ``batched_mm``, or a function that was registered with transformers.
    - ``output_router_logits=True``, as an argument or in the configuration, adds ``router_logits``
      to the output, one [T, E] for each layer, and ``aux_loss``; and that, times
      ``config.router_aux_loss_coef``, to the loss.
    - the experts can be spread over processes: ``DistributedConfig(ep_size=...)``.
    - the routers stay in float32.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_format(config)
        # The dense classes inside know no experts and refuse a name for how to run them.
        chosen, config._experts_implementation = config._experts_implementation, None
        super().__init__(config, *args, **kwargs)
        chosen = self.get_correct_experts_implementation(chosen) or "upcycle"
        config._experts_implementation_internal = chosen
        sites = [moved(self, site) for site in config.upcycle["sites"]]
        dtype = config.dtype or torch.get_default_dtype()
        self._ep_plan: dict[str, str] = {}
        for layer, site in zip(install(self, sites), sites, strict=True):
            layer.to(dtype)
            layer.router.to(torch.promote_types(dtype, torch.float32))
            layer.experts.config = config
            path = site["path"] if site["placement"] == "module" else site["contraction"]
            experts = re.sub(r"\.\d+(?=\.|$)", ".*", f"{path}.experts")
            shards = [f"{experts}.{name}" for name, _ in layer.experts.named_parameters()]
            self._ep_plan |= {
                **dict.fromkeys(shards, "grouped_gemm"),
                experts: "ep_dispatch_experts",
            }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._keep_in_fp32_modules_strict = {"router", *(cls._keep_in_fp32_modules_strict or ())}
        if "forward" not in cls.__dict__:
            cls.forward = with_router_logits(cls.forward)

    _keep_in_fp32_modules_strict: Any = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: the configuration, from the same file, brings the file along when it is saved.

        The class of a model may be one that FSDP made, and transformers would save FSDP's file.
        """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks at the source of the dense class

    def get_correct_experts_implementation(self, requested: str | None) -> str | None:
        """`requested`, a way to run the experts; ValueError for one that may compute another."""
        if requested in FOREIGN_KERNELS or requested not in (
            None,
            "eager",
            *ALL_EXPERTS_FUNCTIONS.keys(),
        ):
            raise ValueError(
                f'experts_implementation="{requested}": it is not known to compute what these '
                "experts compute; choose upcycle, eager, grouped_mm or batched_mm"
            )
        return requested


def check_format(config: Any) -> None:
    """Raises ValueError for a description that is newer than this code."""
    found, version = config.upcycle.get("format", 1), config.upcycle["version"]
    if found > FORMAT:
        raise ValueError(
            f"config.json: upcycle {version} wrote it in format {found}, and this code reads "
            f"formats up to {FORMAT}; install that version of upcycle or a later one"
        )


def moved(model: nn.Module, site: Mapping[str, Any]) -> dict[str, Any]:
    """`site` with its paths in `model`, which may have another head than the converted model."""
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def path_in(path: str) -> str:
        for name in (path, prefix + path, path.removeprefix(prefix)):
            if name in modules:
                return name
        raise ValueError(f"{type(model).__name__} has no {path}, where the file has an MoE layer")

    if site["placement"] == "module":
        return {**site, "path": path_in(site["path"])}
    expansions = [path_in(path) for path in site["expansions"]]
    return {**site, "expansions": expansions, "contraction": path_in(site["contraction"])}


def with_router_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with ``output_router_logits``, and otherwise the same signature."""

    @wraps(forward)
    def wrapper(
        self: Any, *args: Any, output_router_logits: bool | None = None, **kwargs: Any
    ) -> Any:
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if not output_router_logits:
            return forward(self, *args, **kwargs)
        routed: list[tuple[torch.Tensor, ...]] = []
        hooks = [
            layer.router.register_forward_hook(lambda module, given, out: routed.append(out))
            for layer in self.modules()
            if isinstance(layer, MoE)
        ]
        try:
            kwargs.pop("return_dict", None)  # a tuple has no names
            out = forward(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        out["router_logits"] = tuple(logits_TE for logits_TE, _, _ in routed)
        if routed:
            out["aux_loss"] = torch.stack([load_balance(*found) for found in routed]).mean()
            if out.get("loss") is not None:
                factor = self.config.router_aux_loss_coef
                out["loss"] = out["loss"] + factor * out["aux_loss"].to(out["loss"].device)
        return out

    return wrapper


def load_balance(
    logits_TE: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor
) -> torch.Tensor:
    """E times the sum over experts of visits per token and mean probability: K at best.

    Fedus et al., "Switch Transformers", 2021, https://arxiv.org/abs/2101.03961
    """
    visits_TE = torch.zeros_like(logits_TE).scatter_add(
        1, index_TK, (weights_TK != 0).to(logits_TE.dtype)
    )
    share_E = visits_TE.detach().mean(0) * logits_TE.softmax(-1).mean(0)
    return logits_TE.shape[1] * share_E.sum()


class UpcycleBertConfig(UpcycledConfig, BertConfig):
    """BertConfig with the description of the MoE layers in `upcycle`."""

    model_type = "upcycle_bert"


class UpcycleBertForMaskedLM(UpcycledModel, BertForMaskedLM):
    """BertForMaskedLM with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertForMultipleChoice(UpcycledModel, BertForMultipleChoice):
    """BertForMultipleChoice with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertForNextSentencePrediction(UpcycledModel, BertForNextSentencePrediction):
    """BertForNextSentencePrediction with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertForPreTraining(UpcycledModel, BertForPreTraining):
    """BertForPreTraining with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertForQuestionAnswering(UpcycledModel, BertForQuestionAnswering):
    """BertForQuestionAnswering with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertForSequenceClassification(UpcycledModel, BertForSequenceClassification):
    """BertForSequenceClassification with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertForTokenClassification(UpcycledModel, BertForTokenClassification):
    """BertForTokenClassification with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertLMHeadModel(UpcycledModel, BertLMHeadModel):
    """BertLMHeadModel with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig


class UpcycleBertModel(UpcycledModel, BertModel):
    """BertModel with MoE layers in the place of dense FFNs."""

    config_class = UpcycleBertConfig
