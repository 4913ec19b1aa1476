"""Read a recipe from YAML, and report every mistake at once.

Each line of the `RecipeError` is ``FILE:LINE:COLUMN: KEY: sentence``, or begins with the wrong
``--set KEY=VALUE`` of the command line. pydantic finds the mistakes; the sentences are made from
the JSON Schema, so a key that may be a number or a word gets one sentence, not one for each.
"""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from upcycle.errors import RecipeError
from upcycle.recipe import shipped
from upcycle.recipe.methods import EXPERT_METHODS, ROUTER_METHODS, schema_with_options
from upcycle.recipe.onnx import Onnx
from upcycle.recipe.schema import Recipe
from upcycle.recipe.yaml_places import (
    COMMAND_LINE,
    Document,
    KeyPath,
    Place,
    Problem,
    dotted,
    read_yaml,
    set_value,
)
from upcycle.util.untrusted import names_code

Override = str | tuple[str, Any]
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "empty",
}


def load_recipe(recipe: str | Path, overrides: Sequence[Override] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: the name of a shipped recipe, or the path of a YAML file.
        overrides: such as ``"experts.count=4"``; they win over the file, and a later one over an
            earlier one. ``("experts.method", function)`` puts a method in the place of a name.

    Raises:
        RecipeError: with one line for each mistake in the file and the overrides.
    """
    text, name = _text(recipe)
    document = read_yaml(text, name)
    if not isinstance(document.data, dict):
        if not document.problems:
            sentence = "a recipe is a list of `key: value` lines, and begins with `version: 1`"
            document.report(document.place(()), (), sentence)
        raise _error(document.problems)
    held = set()
    for i, override in enumerate(overrides):
        if not isinstance(override, str):
            key, method = override
            held.add(name := _held(key, method))
            override = f"{key}={json.dumps(name)}"
        _override(document, override, i)
    try:
        # Strict pydantic takes a list for a tuple in JSON alone.
        loaded = Recipe.model_validate_json(json.dumps(document.data), context=held)
    except ValidationError as error:
        raise _error(document.problems + _problems(error, document)) from None
    for i, source in enumerate(loaded.experts.sources):
        path = ("experts", "sources", i)
        if names_code(source) and document.place(path).line != COMMAND_LINE:
            sentence = (
                f"`{source}` is Python code, which no file may name; give all sources with "
                "`overrides=experts.sources=[...]`"
            )
            document.report(document.place(path), path, sentence)
    if document.problems:
        raise _error(document.problems)
    return loaded


def onnx_options(overrides: Sequence[str]) -> Onnx:
    """The section `onnx` of a recipe with overrides such as ``"onnx.form=quantised"``.

    Raises:
        RecipeError: one is wrong, or of another section.
    """
    for override in overrides:
        if not override.startswith("onnx."):
            raise RecipeError(f"`overrides={override}`: only keys of the section `onnx` are used")
    return load_recipe("split-all", overrides).onnx


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors that complete and check YAML."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Recipe.model_json_schema()


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load_recipe` reads back."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    return text


def changes_of(recipe: Recipe) -> str:
    """The recipe without the keys that have their defaults, as YAML that `load_recipe` reads."""
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    text: str = yaml.safe_dump({"version": recipe.version, **data}, sort_keys=False)
    return text


def _text(recipe: str | Path) -> tuple[str, str]:
    """The text of a recipe and the name of its file."""
    path = Path(recipe)
    is_name = isinstance(recipe, str) and path.name == recipe and not path.suffix
    if is_name and (recipe in shipped.recipe_names() or not path.is_file()):
        return shipped.recipe_text(str(recipe)), f"{recipe}.yaml"
    try:
        return path.read_text("utf-8"), str(recipe)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{recipe}: this is not a text file: {error.reason}") from None
    except OSError as error:
        raise RecipeError(f"{recipe}: cannot read this recipe: {error.strerror}") from None


def _override(document: Document, override: str, position: int) -> None:
    place = Place(COMMAND_LINE, position, f"`overrides={override}`")
    key, equals, value = override.partition("=")
    path: KeyPath = tuple(key.strip().split("."))
    if not equals or not all(path):
        document.report(place, (), "write key=value, for example experts.count=4")
    else:
        set_value(document, path, value, place)


def _held(key: str, method: Any) -> str:
    """The name by which a method is known that was given for a key."""
    registries = {"experts.method": EXPERT_METHODS, "router.method": ROUTER_METHODS}
    if key not in registries:
        raise RecipeError(f"`overrides=({key!r}, ...)`: write it as '{key}=VALUE', in one text")
    return registries[key].hold(method)


def _error(problems: list[Problem]) -> RecipeError:
    return RecipeError("\n".join(str(p) for p in sorted(problems, key=lambda p: p.place)))


def _problems(error: ValidationError, document: Document) -> list[Problem]:
    """One problem for each wrong key, in our words."""
    schema = schema_with_options(Recipe.model_json_schema(), document.data)
    keys = _keys(schema, schema)
    reported = {problem.key for problem in document.problems}
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path: KeyPath = detail["loc"]
        if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a dataclass
            place, sentence = document.place(path, of_key=True), _unknown(path, list(keys))
        elif detail["type"] == "missing" and path in keys:  # not an item of a list
            hint = f": {about}" if (about := keys[path].get("description")) else ""
            sentence = f"this key is missing; it must be {_expected(keys[path], schema)}{hint}"
            place = document.place(path[:-1], of_key=True)
        else:
            place = document.place(path)
            path = next(path[:n] for n in range(len(path), 0, -1) if path[:n] in keys)
            sentence = _wrong(reduce(getitem, path, document.data), keys[path], schema)
            if detail["type"] == "value_error":  # a rule that no schema has
                sentence = str(detail["ctx"]["error"])
            elif detail["type"] == "less_than_equal":
                sentence = f"must be at most {detail['ctx']['le']}, not {_shown(detail['input'])}"
        if dotted(path) not in reported:
            found.setdefault(dotted(path), Problem(place, dotted(path), sentence))
    return list(found.values())


def _keys(
    schema: dict[str, Any], root: dict[str, Any], prefix: KeyPath = ()
) -> dict[KeyPath, dict[str, Any]]:
    """The schema of every key that a recipe may have, sections included."""
    found: dict[KeyPath, dict[str, Any]] = {}
    for name, key in schema["properties"].items():
        key = _resolve(key, root)
        found[(*prefix, name)] = key
        if "properties" in key:
            found |= _keys(key, root, (*prefix, name))
    return found


def _resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """`schema`, or the definition that it refers to."""
    if "$ref" in schema:
        definition: dict[str, Any] = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        return definition
    return schema


def _unknown(path: KeyPath, keys: list[KeyPath]) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    siblings = {str(key[-1]): key for key in keys if key[:-1] == path[:-1]}
    if nearest := get_close_matches(str(path[-1]), siblings, n=1):
        suggestion = dotted(siblings[nearest[0]])
    elif same_name := [key for key in keys if key[-1] == path[-1]]:
        suggestion = dotted(same_name[0])
    elif nearest := get_close_matches(dotted(path), map(dotted, keys), n=1):
        suggestion = nearest[0]
    else:
        return f"unknown key; the keys here are {', '.join(siblings)}"
    return f"unknown key, did you mean {suggestion}?"


def _wrong(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> str:
    """The sentence for a value that the schema refuses."""
    sentence = f"must be {_expected(schema, root)}, not {_shown(value)}"
    options = [option for part in schema.get("anyOf", [schema]) for option in _options(part)]
    words = [option for option in options if isinstance(option, str)]
    nearest = get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f"{sentence}; did you mean {nearest[0]}?" if nearest else sentence


def _options(schema: dict[str, Any]) -> list[Any]:
    return schema.get("enum") or ([schema["const"]] if "const" in schema else [])


def _expected(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """What the schema allows, in words."""
    schema = _resolve(schema, root)
    if "anyOf" in schema:
        return " or ".join(_expected(part, root) for part in schema["anyOf"])
    if options := _options(schema):
        words = ", ".join(map(str, options))
        return words if len(options) == 1 else f"one of {words}"
    if "prefixItems" in schema:
        return f"a list of {' and '.join(_expected(item, root) for item in schema['prefixItems'])}"
    if "type" not in schema:
        return "another value"
    if schema["type"] == "array":
        return f"a list, each item {_expected(schema['items'], root)}"
    if schema["type"] == "object":
        return f"a section with the keys {', '.join(schema.get('properties', ()))}"
    least, bound = "", ""
    if "minimum" in schema:
        least = f" of at least {schema['minimum']}"
    if "exclusiveMaximum" in schema:
        bound = f" and below {schema['exclusiveMaximum']}"
    return f"{_TYPES.get(schema['type'], 'text')}{least}{bound}"


def _shown(value: Any) -> str:
    """A value of the user, short."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
