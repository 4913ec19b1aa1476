"""A self-contained modeling file for an architecture that has no native MoE twin.

The file is the source text of upcycle's own layer, with the kinds of routers of the model, and a
subclass of the dense transformers class that puts the layers in place when it is built, from the
description in ``config.json``; for finetuning also one of each class with another head. It needs
transformers and torch, not upcycle. Experts are stored fused and need no weight converter.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
)

from upcycle.errors import UnsupportedError
from upcycle.ir.spec import Plan
from upcycle.layers.config import OTHER_KINDS
from upcycle.layers.pretrained import FORMAT
from upcycle.layers.routers import ROUTER_KINDS
from upcycle.pointwise import BUILT_IN, OPS
from upcycle.targets import inlined
from upcycle.version import __version__

FILE = "modeling_upcycle.py"
# The modules in the file: before the routers, and after them.
_BEFORE = (
    *("pointwise", "layers.config", "layers.selection", "layers.token_context", "layers.router"),
    *("kernels.activations", "kernels.torch_cpu", "kernels.torch_operation", "kernels"),
    "layers.experts",
)
_AFTER = ("layers.moe", "layers.tap", "layers.pretrained")

_CONFIG = '''
class {config}(UpcycledConfig, {dense_config}):
    """{dense_config} with the description of the MoE layers in `upcycle`."""

    model_type = "{model_type}"
'''

_MODEL = '''
class {model}(UpcycledModel, {dense}):
    """{dense} with MoE layers in the place of dense FFNs."""

    config_class = {config}
'''


def modeling_file(model: PreTrainedModel, plan: Plan) -> str:
    """Source text of the modeling file; the same class and kinds of layers give the same text."""
    sites = [spec.site() for spec in plan.specs]
    return modeling_text(type(model.config), heads(type(model.config), type(model)), sites)


def modeling_text(
    dense_config: type, dense: Mapping[str, type], sites: Iterable[Mapping[str, Any]]
) -> str:
    """As `modeling_file`; `dense` is what `heads` returns, and `sites` those of ``config.json``.

    Raises:
        UnsupportedError: it cannot have a router or an activation of others.
    """
    router_kinds, operations = _needed(sites)
    kinds = {kind: ROUTER_KINDS[kind] for kind in sorted(router_kinds & set(ROUTER_KINDS))}
    before, after = ([import_module(f"upcycle.{m}") for m in names] for names in (_BEFORE, _AFTER))
    homes = [import_module(cls.__module__) for cls in kinds.values()]
    foreign, additions = _of_others(router_kinds - set(kinds), operations - set(BUILT_IN), homes)
    classes = sorted(set(dense.values()), key=lambda cls: cls.__name__)
    imports = {_import(cls) for cls in (dense_config, *classes)}

    def body(module: ModuleType) -> str:
        lines = inspect.getsource(module).split('"""', 2)[2]
        found = re.findall(r"^(?:from|import) .*$", lines, flags=re.MULTILINE)
        imports.update(line for line in found if "upcycle" not in line)
        return re.sub(r"^(?:from|import) .*\n", "", lines, flags=re.MULTILINE).strip()

    table = ", ".join(f'"{kind}": {cls.__name__}' for kind, cls in kinds.items())
    bodies = [body(module) for module in dict.fromkeys([*before, *homes, *foreign])]
    bodies += ["\n".join([f"ROUTER_KINDS = {{{table}}}", *additions]), *map(body, after)]
    names = {"config": new_name(dense_config), "dense_config": dense_config.__name__}
    kind = new_model_type(dense_config, classes[0])
    bodies.append(_CONFIG.format(**names, model_type=kind).strip())
    for cls in classes:
        names = {"config": new_name(dense_config), "model": new_name(cls), "dense": cls.__name__}
        bodies.append(_MODEL.format(**names).strip())
    plain = sorted(line for line in imports if line.startswith("import"))
    head = f'"""Made by upcycle {__version__}; needs transformers and torch."""'
    text = "\n".join([head, "", *plain, *sorted(imports - set(plain)), ""])
    return text + "\n\n" + "\n\n\n".join(bodies) + "\n"


def check_sources(plan: Plan) -> None:
    """Raises UnsupportedError if a file cannot have a router or an activation of the plan."""
    kinds, operations = _needed(spec.site() for spec in plan.specs)
    _of_others(kinds - set(ROUTER_KINDS), operations - set(BUILT_IN), [])


def _needed(sites: Iterable[Mapping[str, Any]]) -> tuple[set[str], set[str]]:
    """The kinds of routers, and the operations of activations."""
    layers = [site["layer"] for site in sites]
    routers = [layer["router"] for layer in layers]
    programs = [part["pointwise"] for part in (*layers, *routers) if "pointwise" in part]
    return {r["kind"] for r in routers}, {op for p in programs for op, _, _ in p["steps"]}


def _of_others(
    kinds: Collection[str], operations: Collection[str], homes: Collection[ModuleType]
) -> tuple[list[ModuleType], list[str]]:
    """The modules of others whose text the file gets, and the lines that put them to use."""
    found: dict[ModuleType, None] = {}
    lines = []
    ours = [f"upcycle.{name}" for name in _BEFORE] + [home.__name__ for home in homes]

    def module_of(thing: Any, what: str) -> str:
        found[inlined.module_of(thing, what, ours)] = None
        return str(thing.__name__)

    for kind in sorted(kinds):
        name = module_of(OTHER_KINDS[kind], f"the router `{kind}`")
        lines.append(f'OTHER_KINDS["{kind}"] = {name}')
    for op in sorted(operations):
        function = OPS[op]
        called = inlined.in_torch(function) or module_of(function, f"the activation `{op}`")
        lines.append(f'OPS["{op}"] = {called}')
    known = [import_module(name) for name in ours] + [import_module(f"upcycle.{m}") for m in _AFTER]
    taken = {name: module for module in known for name in inlined.defined(module)}
    for module in found:
        for name in inlined.defined(module) & set(taken):
            raise UnsupportedError(
                f"{module.__name__} cannot be copied into a self-contained modeling file: `{name}` "
                f"is also in {taken[name].__name__}; rename it"
            )
        taken |= dict.fromkeys(inlined.defined(module), module)
    return [*found], lines


def _import(cls: type) -> str:
    """How the file gets a class: from a package, or from the dense model's own file beside it."""
    module = cls.__module__
    if module.startswith("transformers_modules."):
        module = "." + module.rpartition(".")[2]
    return f"from {module} import {cls.__name__}"


def new_name(dense: type) -> str:
    """Name of the class that is made of a dense configuration or model."""
    return f"Upcycle{dense.__name__}"


def new_model_type(dense_config: Any, dense: type) -> str:
    """A model type of its own: under the dense one the file would load with missing weights.

    `upcycle.auto_classes` registers those of transformers' own classes; a dense class from
    elsewhere may share a model type with one of them, so it gets another.
    """
    own = "" if _is_theirs(dense) and _is_theirs(dense_config) else "own_"
    return f"upcycle_{own}{dense_config.model_type}"


def _is_theirs(cls: type) -> bool:
    return cls.__module__.startswith("transformers.")


def build_config(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """The content of ``config.json``: the dense configuration, the layers, and the classes."""
    data: dict[str, Any] = model.config.to_dict()
    data.pop("_name_or_path", None)
    sites = [spec.site() for spec in plan.specs]
    return {
        **data,
        **_processors(model.config.model_type, data),
        "architectures": [new_name(type(model))],
        "auto_map": auto_map(type(model.config), heads(type(model.config), type(model))),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_type": new_model_type(type(model.config), type(model)),
        "upcycle": {"version": __version__, "format": FORMAT, "sites": sites},
    }


_BY_MODEL_TYPE = {
    "tokenizer_class": (tokenization_auto, "TOKENIZER_MAPPING_NAMES"),
    "processor_class": (processing_auto, "PROCESSOR_MAPPING_NAMES"),
    "feature_extractor_type": (feature_extraction_auto, "FEATURE_EXTRACTOR_MAPPING_NAMES"),
    "image_processor_type": (image_processing_auto, "IMAGE_PROCESSOR_MAPPING_NAMES"),
}


def _processors(model_type: str, config: Mapping[str, Any]) -> dict[str, str]:
    """What the Auto classes of processors choose by the dense model type, if nothing else does."""
    found = {}
    for key, (module, table) in _BY_MODEL_TYPE.items():
        name = getattr(module, table).get(model_type)
        if isinstance(name, dict):  # by what it is made with; the others have its name and a suffix
            name = name.get("torchvision")
        if name and not config.get(key):
            found[key] = name
    return found


def auto_map(dense_config: type, dense: Mapping[str, type]) -> dict[str, str]:
    """Auto class -> the class in the file."""
    stem = FILE.removesuffix(".py")
    names = {"AutoConfig": dense_config, **dense}
    return {auto: f"{stem}.{new_name(cls)}" for auto, cls in names.items()}


def heads(dense_config: type, dense: type) -> dict[str, type]:
    """Auto class of transformers -> the class that it makes of the dense configuration.

    Of several it is `dense`, if that is among them. A class that no Auto class knows becomes that
    of ``AutoModel``, and one that is not of transformers is the only one.
    """
    found = {}
    for name, known in auto_mapping(dense_config).items():
        if dense in known:
            found[name] = dense
        elif _is_theirs(dense):
            found[name] = known[0]
    return found if dense in found.values() else {**found, "AutoModel": dense}


def auto_mapping(dense_config: type) -> dict[str, tuple[type, ...]]:
    """Auto class -> the classes that it may make of the dense configuration."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        known = None if mapping is None else mapping.get(dense_config, None)
        if known is not None:
            found[name] = known if isinstance(known, tuple) else (known,)
    return found


def auto_classes(model: nn.Module) -> list[str]:
    """The Auto classes of transformers that know the dense class, most specific first."""
    mapping = auto_mapping(type(getattr(model, "config", None)))
    names = [name for name, known in mapping.items() if type(model) in known]
    first, last = ("CausalLM", "Seq2SeqLM"), ("ForPreTraining", "AutoModel", "ForTextEncoding")
    names.sort(key=lambda name: (not name.endswith(first), name.endswith(last), name))
    return names or ["AutoModel"]
