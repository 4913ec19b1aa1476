"""A self-contained modeling file for an architecture that has no native MoE twin.

The file is the source text of upcycle's own layer, with the kinds of routers that it has, and a
subclass of the dense transformers class that puts the layers in place when it is built, from the
description in ``config.json``. It needs transformers and torch, not upcycle. Experts are stored
fused, so no weight converter is needed.
"""

import inspect
import re
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

import upcycle.context
import upcycle.experts
import upcycle.moe
import upcycle.pointwise
import upcycle.routing
import upcycle.selection
import upcycle.tap
from upcycle.routers import ROUTERS
from upcycle.spec import Plan, router_kind
from upcycle.version import __version__

FILE = "modeling_upcycle.py"
_BEFORE: tuple[ModuleType, ...] = (
    upcycle.pointwise,
    upcycle.selection,
    upcycle.context,
    upcycle.routing,
    upcycle.experts,
)
_AFTER: tuple[ModuleType, ...] = (upcycle.moe, upcycle.tap)

_CLASSES = '''
class {config}({dense_config}):
    """{dense_config} with the description of the MoE layers in `upcycle`."""

    model_type = "{model_type}"


class {model}({dense}):
    """{dense} with MoE layers in the place of dense FFNs."""

    config_class = {config}
    _keep_in_fp32_modules_strict = {{"router", *({dense}._keep_in_fp32_modules_strict or ())}}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        dtype = config.dtype or torch.get_default_dtype()
        for layer in install(self, config.upcycle["sites"]):
            layer.to(dtype)
            layer.router.to(torch.promote_types(dtype, torch.float32))
'''


def class_names(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the configuration and model class of the converted model."""
    return f"Upcycle{type(model.config).__name__}", f"Upcycle{type(model).__name__}"


def modeling_file(model: PreTrainedModel, plan: Plan) -> str:
    """Source text of the modeling file; the same class and kinds of routers give the same text."""
    dense_config, dense = type(model.config), type(model)
    config_name, model_name = class_names(model)
    kinds = {kind: ROUTERS[kind] for kind in sorted({router_kind(s.router) for s in plan.specs})}
    homes = [m for m in map(inspect.getmodule, kinds.values()) if m and m not in _BEFORE]
    imports: set[str] = set()

    def body(module: ModuleType) -> str:
        lines = inspect.getsource(module).split('"""', 2)[2]
        found = re.findall(r"^(?:from|import) .*$", lines, flags=re.MULTILINE)
        imports.update(line for line in found if "upcycle" not in line)
        return re.sub(r"^(?:from|import) .*\n", "", lines, flags=re.MULTILINE).strip()

    table = ", ".join(f'"{kind}": {cls.__name__}' for kind, cls in kinds.items())
    bodies = [body(module) for module in dict.fromkeys([*_BEFORE, *homes])]
    bodies += [f"ROUTERS = {{{table}}}", *map(body, _AFTER)]
    imports |= {_import(dense_config), _import(dense)}
    plain = sorted(line for line in imports if line.startswith("import"))
    classes = _CLASSES.format(
        config=config_name,
        dense_config=dense_config.__name__,
        model=model_name,
        dense=dense.__name__,
        model_type=model_type(model),
    )
    head = f'"""{model_name}: made by upcycle {__version__}; needs transformers and torch."""'
    text = "\n".join([head, "", *plain, *sorted(imports - set(plain)), ""])
    return text + "\n\n" + "\n\n\n".join([*bodies, classes.strip()]) + "\n"


def _import(cls: type) -> str:
    """How the file gets a class: from a package, or from the dense model's own file beside it."""
    module = cls.__module__
    if module.startswith("transformers_modules."):
        module = "." + module.rpartition(".")[2]
    return f"from {module} import {cls.__name__}"


def model_type(model: PreTrainedModel) -> str:
    """A model type of its own: under the dense one the file would load with missing weights."""
    return f"upcycle_{model.config.model_type}"


def build_config(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """The content of ``config.json``: the dense configuration, the layers, and the classes."""
    config_name, model_name = class_names(model)
    stem = FILE.removesuffix(".py")
    auto_map = {"AutoConfig": f"{stem}.{config_name}"}
    auto_map |= dict.fromkeys(auto_classes(model), f"{stem}.{model_name}")
    data: dict[str, Any] = model.config.to_dict()
    data.pop("_name_or_path", None)
    data.update(
        architectures=[model_name],
        auto_map=auto_map,
        dtype=str(model.dtype).removeprefix("torch."),
        model_type=model_type(model),
        upcycle={"version": __version__, "sites": [spec.site() for spec in plan.specs]},
    )
    return data


def auto_classes(model: nn.Module) -> list[str]:
    """The Auto classes of transformers that know the dense class, most specific first."""
    names = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None:
            continue
        known = mapping.get(type(getattr(model, "config", None)), None)
        if type(model) in (known if isinstance(known, tuple | list) else [known]):
            names.append(name)
    return sorted(names, key=lambda name: (name == "AutoModel", name)) or ["AutoModel"]
