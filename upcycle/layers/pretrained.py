"""What a transformers model with MoE layers is beyond its dense class.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from upcycle.layers.config import RouterConfig
from upcycle.layers.moe import MoE
from upcycle.layers.tap import install, place_of
from upcycle.layers.token_context import ForwardState

FORMAT = 1  # of the description in config.json
_AUX_LOSS = 0.001  # factor on the balance loss

# Functions of transformers that read the activation from elsewhere, or that were not compared.
FOREIGN_KERNELS = ("deepgemm", "sonicmoe")


class UpcycledConfig:
    """To be named before the dense configuration; its `upcycle` describes the layers."""

    output_router_logits = False
    router_aux_loss_coef = _AUX_LOSS


class UpcycledModel(nn.Module):
    """Puts the layers that ``config.upcycle`` describes in place when the model is built.

    To be named before the dense class, which it changes in five ways:

    - ``experts_implementation`` may be ``upcycle`` (the default: its own kernels on the CPU, else
      ``grouped_mm``), ``grouped_mm`` (layers that torch's kernel does not fit run one expert after
      the other), ``eager``, ``batched_mm``, or a function that was registered with transformers.
    - ``output_router_logits=True``, as an argument or in the configuration, adds ``router_logits``
      to the output, one [T, E] for each layer with null experts last; ``router_scores``, by which
      the experts were chosen; and ``aux_loss``, and that, times ``config.router_aux_loss_coef``, to
      the loss.
    - the experts can be spread over processes: ``DistributedConfig(ep_size=...)``.
    - the routers stay in float32.
    - files may have the matrices of experts one by one (``experts.0.down_proj.weight``), as
      quantised ones do; saved are stacks.
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
            experts = re.sub(r"\.\d+(?=\.|$)", ".*", f"{place_of(site)}.experts")
            shards = [f"{experts}.{name}" for name, _ in layer.experts.named_parameters()]
            self._ep_plan |= dict.fromkeys(shards, "grouped_gemm")
            self._ep_plan[experts] = "ep_dispatch_experts"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._keep_in_fp32_modules_strict = {"router", *(cls._keep_in_fp32_modules_strict or ())}
        kind = cls.config_class.model_type
        register_checkpoint_conversion_mapping(kind, [*stacking()], overwrite=True)
        if "forward" not in cls.__dict__:
            cls.forward = with_router_logits(cls.forward)

    config_class: Any
    _keep_in_fp32_modules_strict: Any = None
    _weight_conversions: Any = ()  # of a model that was not loaded: it is saved as it is

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: saving the configuration, from the same file, also saves the file.

        The class of a model may be one that FSDP made, and transformers would save FSDP's file.
        """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks at the source of the dense class

    def get_correct_experts_implementation(self, requested: str | None) -> str | None:
        """`requested`, a way to run the experts; ValueError for one that may compute another."""
        possible = {None, "eager", *ALL_EXPERTS_FUNCTIONS.keys()} - set(FOREIGN_KERNELS)
        if requested not in possible:
            raise ValueError(
                f'experts_implementation="{requested}": it is not known to compute what these '
                "experts compute; choose upcycle, eager, grouped_mm or batched_mm"
            )
        return requested


def stacking() -> list[Any]:
    """How transformers makes stacks of matrices that a file has one by one."""
    return [
        WeightConverter(f"experts.*.{name}.weight", f"experts.{name}", [MergeModulelist(dim=0)])
        for name in ("gate_up_proj", "up_proj", "down_proj")
    ]


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

    site = {**site, "path": path_in(site["path"])}
    if site["placement"] == "module":
        return site
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
        watch = RouterWatch(self)
        try:
            kwargs.pop("return_dict", None)  # a tuple has no names
            out = forward(self, *args, **kwargs)
        finally:
            watch.end()
        return watch.added_to(out)

    return wrapper


class RouterWatch:
    """What the routers of `model` return from now on, until the `end`."""

    def __init__(self, model: Any) -> None:
        self._config = model.config
        self._seen: list[tuple[Any, tuple[torch.Tensor, ...]]] = []
        self._hooks = [
            layer.router.register_forward_hook(lambda *seen: self._seen.append(seen[::2]))
            for layer in model.modules()
            if isinstance(layer, MoE)
        ]

    def end(self) -> None:
        """Do not look any more."""
        for hook in self._hooks:
            hook.remove()

    def added_to(self, out: Any) -> Any:
        """The output of the model with what `UpcycledModel` says of it."""
        out["router_logits"] = tuple(logits_TE for _, (logits_TE, _, _) in self._seen)
        scores = (router.selection_scores(found[0]) for router, found in self._seen)
        out["router_scores"] = tuple(scores)
        if self._seen:
            losses = [load_balance(router.config, *found) for router, found in self._seen]
            out["aux_loss"] = torch.stack(losses).mean()
            if out.get("loss") is not None:
                factor = getattr(self._config, "router_aux_loss_coef", _AUX_LOSS)
                out["loss"] = out["loss"] + factor * out["aux_loss"].to(out["loss"].device)
        return out


class RouterLogits:
    """Hooks that give a model of a dense class the ``output_router_logits`` of `UpcycledModel`."""

    def __init__(self, model: Any) -> None:
        self._watch = ForwardState()
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Take the argument, which the dense class does not know."""
        kwargs = dict(kwargs)
        wanted = kwargs.pop("output_router_logits", None)
        if wanted is None:
            wanted = getattr(model.config, "output_router_logits", False)
        if wanted:
            kwargs.pop("return_dict", None)
        self._watch.put(RouterWatch(model) if wanted else None)
        return args, kwargs

    def after(self, model: Any, args: Any, out: Any) -> Any:
        """Add what was seen; also called where the forward failed, without an output."""
        watch = self._watch.take()
        if watch is None:
            return None
        watch.end()
        return None if out is None else watch.added_to(out)


def load_balance(
    config: RouterConfig, logits_TE: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor
) -> torch.Tensor:
    """E times the sum over experts of visits per token and mean probability: K at best.

    Null experts are experts, each of which gets the same part of the visits that they have
    together (Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233).

    Fedus et al., "Switch Transformers", 2021, https://arxiv.org/abs/2101.03961
    """
    visits_TE = torch.zeros_like(logits_TE).scatter_add(
        1, index_TK, (weights_TK != 0).to(logits_TE.dtype)
    )
    if config.nulls:
        left_T1 = config.select.k - visits_TE.sum(1, keepdim=True)
        visits_TE[:, config.num_experts :] = left_T1 / config.nulls
    share_E = visits_TE.detach().mean(0) * logits_TE.softmax(-1).mean(0)
    return logits_TE.shape[1] * share_E.sum()
