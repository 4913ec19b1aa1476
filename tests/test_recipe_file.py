"""A recipe file is read strictly, and every mistake in it is reported at once, with its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import get_args

import pytest
from pydantic import BaseModel

from upcycle.errors import RecipeError
from upcycle.recipe.methods import ExpertMethodName
from upcycle.recipe.reader import dump_recipe, load_recipe, recipe_schema
from upcycle.recipe.schema import Recipe
from upcycle.recipe.shipped import describe, recipe_names, recipe_text

METHODS = get_args(ExpertMethodName)

GOOD = """\
version: 1
experts: {method: copy, count: 8}
router: {method: normal, top_k: 2, weights: renormalised}
"""

COUNT = "a whole number of at least 1"
TOKENS = f"{COUNT} or a list of {COUNT} and {COUNT} or empty"


def complaints(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder of the file."""
    path = tmp_path / "r.yaml"
    path.write_text(dedent(text), "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "r.yaml").splitlines()


def test_every_mistake_is_reported_at_its_place(tmp_path: Path) -> None:
    lines = complaints(
        tmp_path,
        """\
        version: 2
        layer: {every: 2}
        experts:
          method: clustre
          cuont: 4
          granularity: "2"
          scale: down
          scale: even
        router:
          method: normal
          top_k: none
          std: -1
          bias: 1
          count: 3
        seed:
        """,
    )
    assert lines == [
        "r.yaml:1:10: version: must be 1, not 2",
        "r.yaml:2:1: layer: unknown key, did you mean layers?",
        "r.yaml:3:1: experts.count: this key is missing; it must be a whole number of at least 1: "
        "experts, shared ones included; for granular, copies of the FFN",
        f"r.yaml:4:11: experts.method: must be one of {', '.join(METHODS)}, "
        'not "clustre"; did you mean cluster?',
        "r.yaml:5:3: experts.cuont: unknown key, did you mean experts.count?",
        'r.yaml:6:16: experts.granularity: must be a whole number of at least 1, not "2"',
        "r.yaml:8:3: experts.scale: this key was given before, on line 7; remove one of the two",
        "r.yaml:9:1: router.weights: this key is missing; it must be one of renormalised, softmax, "
        "one, renorm_detach, gain: how the outputs of the visited experts are weighted",
        'r.yaml:11:10: router.top_k: must be a whole number of at least 1 or all, not "none"',
        "r.yaml:12:8: router.std: must be a number of at least 0, not -1",
        "r.yaml:13:9: router.bias: must be true or false or empty, not 1",
        "r.yaml:14:3: router.count: unknown key, did you mean experts.count?",
        "r.yaml:15:6: seed: must be a whole number of at least 0, not empty",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("experts: {a: 1\n", "r.yaml:2:1: this is not YAML: while parsing a flow mapping, "),
        ("experts: [\n", "r.yaml:2:1: this is not YAML: while parsing a flow node, "),
        ("experts:\n\tmethod: copy\n", "r.yaml:2:1: this is not YAML: while scanning "),
        ("a: &x 1\nb: *x\n", "r.yaml:2:4: this is not YAML: a recipe has no aliases"),
        ("a: &x [*x]\n", "r.yaml:1:8: this is not YAML: a recipe has no aliases"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: this is not YAML: expected a single document"),
        ("", "r.yaml:1:1: a recipe is a list of `key: value` lines"),
        ("# nothing\n", "r.yaml:1:1: a recipe is a list of `key: value` lines"),
        ("- copy\n", "r.yaml:1:1: a recipe is a list of `key: value` lines"),
        ("a: \x07\n", "r.yaml:1:4: this character is not allowed in YAML"),
        ("[" * 5000, "r.yaml:1:1: this is nested too deeply"),
        ("seed: !!python/name:os.system\n" + GOOD, "r.yaml:1:7: seed: '' cannot be read as"),
        ("seed: !!int x\n" + GOOD, "r.yaml:1:7: seed: 'x' cannot be read as"),
        ("? [a]\n: 1\n" + GOOD, "r.yaml:1:3: a key must be a word"),
        (GOOD + "verify: 1e-5\n", "r.yaml:4:9: verify: must be a section with the keys max_rel"),
        (GOOD + "layers:\n  exclude: [a, 3]\n", "r.yaml:5:16: layers.exclude: must be a list, e"),
        (GOOD + "layers: {include: 3}\n", "r.yaml:4:19: layers.include: must be text or a list, "),
        (GOOD + "seed: 010\n", "r.yaml:4:7: seed: must be a whole number of at least 0, not 10.0"),
        (GOOD + "onnx: {tokens: 0}\n", f"r.yaml:4:16: onnx.tokens: must be {TOKENS}, not 0"),
        (GOOD + "onnx: {tokens: [1]}\n", f"r.yaml:4:16: onnx.tokens: must be {TOKENS}, not [1]"),
        (GOOD + "onnx: {tokens: [9, 0]}\n", f"r.yaml:4:16: onnx.tokens: must be {TOKENS}, not [9"),
        (GOOD + "onnx: {tokens: [9, 1]}\n", "r.yaml:4:16: onnx.tokens: short calls have fewer t"),
        (GOOD + "zzz: 1\n", "r.yaml:4:1: zzz: unknown key; the keys here are version, layers, ex"),
    ],
)
def test_one_mistake_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    lines = complaints(tmp_path, text)
    assert len(lines) == 1, lines
    assert lines[0].startswith(expected)


def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + "verify: {max_relative_error: 1e-3}\nlayers: {include: no}\n", "utf-8")
    recipe = load_recipe(path)
    assert recipe.verify.max_relative_error == 1e-3
    assert recipe.layers.include == "no"


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, with the sections before it."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        yield prefix + name
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")


@pytest.mark.parametrize("key", [*leaves(Recipe)])
def test_no_value_of_a_key_is_more_than_a_mistake(tmp_path: Path, key: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    values = ("", "zzz", "-1.5", "0", "true", "[]", "[1]", "[zzz, -1, [2]]", "{a: 1}")
    refused = []
    for value in values:
        try:
            load_recipe(path, [f"{key}={value}"])
        except RecipeError as error:
            refused.append(str(error))
    assert refused
    assert all(f"`overrides={key}=" in sentence for sentence in refused)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD, "utf-8")
    overrides = [
        "experts.count=2",
        "experts.count=4",
        "router.top_k=all",
        "layers.include=[a.*, b.*]",
        "verify={max_relative_error: 0.5}",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.experts.count == 4
    assert recipe.router.top_k == "all"
    assert recipe.layers.include == ("a.*", "b.*")
    assert recipe.verify.max_relative_error == 0.5


def test_wrong_overrides_are_named_after_the_file(tmp_path: Path) -> None:
    overrides = ["experts.cuont=4", "top_k=4", "experts", "seed.x=1", "router.top_k=[", "seed=x"]
    lines = complaints(tmp_path, GOOD + "sede: 1\n", *overrides)
    assert lines == [
        "r.yaml:4:1: sede: unknown key, did you mean seed?",
        "`overrides=experts.cuont=4`: experts.cuont: unknown key, did you mean experts.count?",
        "`overrides=top_k=4`: top_k: unknown key, did you mean router.top_k?",
        "`overrides=experts`: write key=value, for example experts.count=4",
        "`overrides=router.top_k=[`: router.top_k: '[' is not a YAML value",
        '`overrides=seed=x`: seed: must be a whole number of at least 0, not "x"',
    ]


def test_a_count_has_a_limit(tmp_path: Path) -> None:
    """Tensors of any size are made from it, some of them while a model is planned."""
    lines = complaints(
        tmp_path, GOOD, "experts.count=9223372036854775808", 'layers.include="\\ud800"'
    )
    assert lines == [
        "`overrides=experts.count=9223372036854775808`: experts.count: must be at most 16777216, "
        "not 9223372036854775808",
        '`overrides=layers.include="\\ud800"`: layers.include: \'"\\\\ud800"\' is not a YAML value',
    ]


def test_an_override_mends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD.replace("copy", "kopy"), "utf-8")
    assert load_recipe(path, ["experts.method=copy"]).experts.method == "copy"


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"did you mean sparse-upcycling\?") as caught:
        load_recipe("sparse_upcycling")
    assert all(name in str(caught.value) for name in recipe_names())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot read this recipe: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.yaml: this is not a text file"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_and_names_its_paper(name: str) -> None:
    recipe = load_recipe(name)
    about = describe(name)
    assert about.name == name
    assert about.title.endswith("."), "the first line is one sentence"
    assert 2015 <= about.year <= 2100
    assert about.url.startswith("https://arxiv.org/abs/")
    assert recipe_text(name).splitlines()[0].startswith("# ")
    assert load_recipe(name, ["seed=7"]).seed == 7
    assert recipe.version == 1


@pytest.mark.parametrize("name", recipe_names())
def test_a_dumped_recipe_is_the_same_recipe(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe(path) == recipe


def test_the_schema_describes_every_section() -> None:
    schema = recipe_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["properties"]) == set(Recipe.model_fields)
    for section in schema["$defs"].values():
        assert section["description"]
        assert section["additionalProperties"] is False
