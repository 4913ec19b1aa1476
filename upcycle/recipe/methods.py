"""The names of methods in a recipe: those of upcycle, and those that others add.

Here are the names, and which options of its own a method of others has; `upcycle.passes.experts`
and `upcycle.passes.routers` have the methods.
"""

import json
import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationInfo, WrapValidator

from upcycle.errors import UsageError
from upcycle.util.registry import Registry

# `tests/test_registries.py` compares these with the methods.
ExpertMethodName = Literal[
    "copy",
    "noise",
    "drop",
    "svd",
    "granular",
    "zero_routed",
    "from_checkpoints",
    "contiguous",
    "random",
    "cluster",
    "coactivation",
    "importance",
    "importance_overlap",
    "gradient_domain",
    "gradient_domain_overlap",
    "activation_carve",
    "universal_specialised",
    "token_sets",
]
RouterMethodName = Literal[
    "normal",
    "zero",
    "uniform",
    "virtual_group",
    "avg_key",
    "centroid",
    "ridge",
    "mlp",
    "representative",
    "kmeans_lsq",
    "random_fixed",
    "hash",
    "assigned",
    "noisy_topk",
    "cosine",
    "oracle",
]

# A pydantic model, or a dataclass, whose fields are keys of a recipe.
Options = type[Any]

EXPERT_METHODS: Registry[Any] = Registry(
    "an expert method", "upcycle.experts", get_args(ExpertMethodName)
)
ROUTER_METHODS: Registry[Any] = Registry(
    "a router method", "upcycle.routers", get_args(RouterMethodName)
)

log = logging.getLogger(__name__)


def _named(registry: Registry[Any]) -> WrapValidator:
    """A key that names a method; in Python the method may stand there itself, and gets a name."""

    def check(value: Any, handler: Callable[[Any], str], info: ValidationInfo) -> str:
        if callable(value) or hasattr(value, "build"):
            return registry.hold(value)
        name = handler(value)
        # JSON is the text of a file, and that names no function, even if this process knows it.
        is_named = info.mode == "json" and ":" in name and name not in (info.context or ())
        if is_named or not registry.knows(name):
            raise ValueError(registry.unknown(name))
        return name

    return WrapValidator(check)


def _listed(registry: Registry[Any]) -> Any:
    """What the JSON Schema says of such a key."""

    def add(schema: dict[str, Any]) -> None:
        schema["enum"] = registry.names()

    return Field(json_schema_extra=add)


def _options(registry: Registry[Any]) -> WrapValidator:
    """The key with the options that the chosen method brings; None where it has none."""

    def check(value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        name = info.data.get("method")
        kind = None if name is None else options_type(registry, name)
        if kind is None:
            if value and name is not None:
                raise ValueError(f"`method: {name}` has no options of its own; leave them out")
            return None
        given = {} if value is None else value
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        if info.mode == "json":
            return adapter.validate_json(json.dumps(given), extra="forbid")
        return adapter.validate_python(given, extra="forbid")

    return WrapValidator(check)


ExpertName = Annotated[str, _named(EXPERT_METHODS), _listed(EXPERT_METHODS)]
RouterName = Annotated[str, _named(ROUTER_METHODS), _listed(ROUTER_METHODS)]
ExpertOptions = Annotated[Any, _options(EXPERT_METHODS)]
RouterOptions = Annotated[Any, _options(ROUTER_METHODS)]


def schema_with_options(schema: dict[str, Any], data: Any) -> dict[str, Any]:
    """The JSON Schema of a recipe with the options of the methods that `data` names, as keys."""
    defs = schema["$defs"]
    for section, definition, registry in (
        ("experts", "Experts", EXPERT_METHODS),
        ("router", "Router", ROUTER_METHODS),
    ):
        name = data[section].get("method") if isinstance(data.get(section), dict) else None
        kind = options_type(registry, name) if isinstance(name, str) else None
        if kind is not None:
            options = TypeAdapter(kind).json_schema()
            defs |= options.pop("$defs", {})
            defs[definition]["properties"]["options"] = options
    return schema


def options_type(registry: Registry[Any], name: str) -> Options | None:
    """What checks the options of a method; None if it has none."""
    return getattr(registry.get(name), "options", None)


def options_schemas(registry: Registry[Any], place: str) -> list[dict[str, Any]]:
    """For each method with options what the JSON Schema at `place` says of them.

    A package that cannot be loaded is left out, and a warning says so.
    """
    found: list[dict[str, Any]] = []
    for name in registry.names()[len(registry.reserved) :]:
        try:
            kind = options_type(registry, name)
        except UsageError as error:
            log.warning("%s", error)
            continue
        if kind is not None:
            here = f"#{place}/allOf/{len(found)}/then/properties/options/$defs/{{model}}"
            schema = TypeAdapter(kind).json_schema(ref_template=here)
            found.append(
                {
                    "if": {"properties": {"method": {"const": name}}},
                    "then": {"properties": {"options": {**schema, "additionalProperties": False}}},
                }
            )
    return found
