"""Which FFNs are chosen, what each becomes, and every refusal."""

import dataclasses

import numerics
import pytest
import torch

import upcycle
from upcycle.errors import PlanError, RecipeError, UnsupportedError
from upcycle.ir.ffn import FFN, Located, Miss
from upcycle.ir.spec import MoESpec, Promise
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.schema import Recipe

COPIES: dict[str, object] = {"method": "copy", "count": 4}
GRANULAR: dict[str, object] = {"method": "granular", "count": 2, "granularity": 4}
SPLIT: dict[str, object] = {"method": "cluster", "count": 6}


def ffn(path: str = "mlp", name: str = "gelu", **changes: object) -> FFN:
    found = numerics.site(numerics.random_ffn(name), path)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def model(layers: int = 6) -> Located:
    head = ffn("head", kind="head")
    return Located(ffns=(*(ffn(f"layers.{i}.mlp") for i in range(layers)), head))


def router(method: str = "normal", top_k: int | str = 2, **more: object) -> dict[str, object]:
    return {"method": method, "top_k": top_k, "weights": "renormalised", **more}


def recipe(
    experts: dict[str, object] = COPIES, routing: dict[str, object] | None = None, **rest: object
) -> Recipe:
    return numerics.make_recipe(experts, routing or router(), **rest)


def only(plan_of: Recipe, name: str = "gelu") -> MoESpec:
    (spec,) = make_plan(Located(ffns=(ffn(name=name),)), plan_of).specs
    return spec


def chosen(**layers: object) -> list[int]:
    plan = make_plan(model(), recipe(layers=layers))
    return [int(spec.ffn.path.split(".")[1]) for spec in plan.specs]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"include": "*.2.*"}, [2]),
        ({"include": ("layers.[0-3].mlp",), "exclude": ("*.1.mlp",)}, [0, 2, 3]),
        ({"every": 2}, [1, 3, 5]),
        ({"every": 2, "skip_first": 1}, [2, 4]),
        ({"every": 2, "start": 1}, [0, 2, 4]),
        ({"every": 2, "start": 2}, [1, 3, 5]),
        ({"skip_first": 0.5}, [3, 4, 5]),
        ({"skip_first": 1, "skip_last": 0.4}, [1, 2, 3]),
    ],
    ids=str,
)
def test_layers_select(layers: dict[str, object], expected: list[int]) -> None:
    assert chosen(**layers) == expected


def two_stacks(first: int = 4, second: int = 6) -> Located:
    paths = [f"vision.blocks.{i}.mlp" for i in range(first)]
    paths += [f"text.layers.{i}.0.mlp" for i in range(second)]
    return Located(ffns=tuple(map(ffn, paths)))


@pytest.mark.parametrize(
    ("layers", "vision", "text"),
    [
        ({"every": 2}, [1, 3], [1, 3, 5]),
        ({"every": 2, "start": 1}, [0, 2], [0, 2, 4]),
        ({"skip_first": 0.5}, [2, 3], [3, 4, 5]),
        ({"skip_first": 1, "skip_last": 2}, [1], [1, 2, 3]),
        ({"skip_last": 4}, [], [0, 1]),
        ({"every": 2, "include": "text.*"}, [], [1, 3, 5]),
    ],
    ids=str,
)
def test_layers_are_counted_stack_by_stack(
    layers: dict[str, object], vision: list[int], text: list[int]
) -> None:
    plan = make_plan(two_stacks(), recipe(layers=layers))
    found = [spec.ffn.path.split(".")[::2][:2] for spec in plan.specs]
    assert found == [["vision", str(i)] for i in vision] + [["text", str(i)] for i in text]


def test_an_odd_first_stack_does_not_shift_the_second() -> None:
    plan = make_plan(two_stacks(3), recipe(layers={"every": 2}))
    paths = [spec.ffn.path for spec in plan.specs]
    assert paths[1:] == [f"text.layers.{i}.0.mlp" for i in (1, 3, 5)]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (
            [
                *(f"model.vision_tower.layers.{i}.mlp" for i in range(3)),
                "model.multi_modal_projector",
                *(f"model.language_model.layers.{i}.mlp" for i in range(4)),
            ],
            [f"model.language_model.layers.{i}.mlp" for i in (0, 2)],
        ),
        ([f"model.layers.{i}.mlp" for i in range(4)], [f"model.layers.{i}.mlp" for i in (0, 2)]),
    ],
)  # fmt: skip
def test_moe_llava_takes_the_language_model(paths: list[str], expected: list[str]) -> None:
    found = Located(ffns=tuple(map(ffn, paths)))
    plan = make_plan(found, load_recipe("moe-llava"))
    assert [spec.ffn.path for spec in plan.specs] == expected


def test_harder_tasks_begins_with_the_first_layer() -> None:
    plan = make_plan(model(), load_recipe("harder-tasks"))
    assert [spec.ffn.path for spec in plan.specs] == [f"layers.{i}.mlp" for i in (0, 2, 4)]


def test_a_fraction_of_a_hundred_layers_is_counted_without_rounding_error() -> None:
    plan = make_plan(model(100), recipe(layers={"skip_first": 0.29}))
    assert len(plan.specs) == 71


def test_a_model_without_ffn_lists_what_came_near() -> None:
    found = Located(
        ffns=(ffn("pooler", kind="head"),),
        misses=(Miss("layers.0.mlp", "a normalisation reads the hidden layer"),),
    )
    with pytest.raises(UnsupportedError) as error:
        make_plan(found, recipe())
    assert "pooler: a head; to convert it, set `layers.kinds: [ffn, head]`" in str(error.value)
    assert "layers.0.mlp: a normalisation reads the hidden layer" in str(error.value)
    with pytest.raises(UnsupportedError, match="nothing looks like one"):
        make_plan(Located(), recipe())


def test_the_kinds_that_the_recipe_names_are_converted() -> None:
    kinds = ("ffn", "head", "bottleneck", "ffn")
    found = Located(ffns=tuple(ffn(f"{i}.{kind}", kind=kind) for i, kind in enumerate(kinds)))

    def paths(*kinds: str) -> list[str]:
        plan = make_plan(found, recipe(layers={"kinds": kinds} if kinds else {}))
        return [spec.ffn.path for spec in plan.specs]

    assert paths() == paths("ffn") == ["0.ffn", "3.ffn"]
    assert paths("head") == ["1.head"]
    assert paths("bottleneck", "ffn") == ["0.ffn", "2.bottleneck", "3.ffn"]
    with pytest.raises(ValueError, match="Input should be 'ffn', 'bottleneck' or 'head'"):
        recipe(layers={"kinds": ("poolers",)})
    with pytest.raises(ValueError, match="at least 1 item"):
        recipe(layers={"kinds": ()})


def test_a_plain_mlp_is_converted_unless_the_recipe_names_kinds() -> None:
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    x = torch.randn(5, 784)
    with pytest.raises(UnsupportedError, match=r"set `layers.kinds: \[ffn, head\]`"):
        upcycle.convert(mlp, "split-all", (x,), overrides=["layers.kinds=[ffn]"])
    done = upcycle.convert(mlp, "split-all", (x,))
    assert done.plan.recipe.layers.kinds == ("head",)
    (spec,) = done.plan.specs
    assert (spec.ffn.kind, spec.ffn.d_ff) == ("head", 256)
    with torch.no_grad():
        expected = mlp(x)
        assert (done.model(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "layers", [{"include": "encoder.*"}, {"skip_first": 4, "skip_last": 9}, {"every": 7}], ids=str
)
def test_nothing_left_says_why(layers: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="leave none of the 6 FFNs to convert") as error:
        make_plan(model(), recipe(layers=layers))
    assert "layers.0.mlp, layers.1.mlp, layers.2.mlp and 3 more" in str(error.value)


def test_decisions_of_each_kind() -> None:
    copies = only(recipe())
    assert (copies.num_experts, copies.width, copies.top_k, copies.scale) == (4, 48, 2, 1.0)
    slices = only(recipe(GRANULAR, router("virtual_group", 4)))
    assert (slices.num_experts, slices.width, slices.top_k) == (8, 12, 4)
    padded = only(recipe({"method": "random", "count": 5}, router(top_k="all")))
    assert (padded.num_experts, padded.width, padded.top_k) == (5, 10, 5)
    scaled = only(recipe(SPLIT, router(top_k=4, scale="n_over_k")))
    assert scaled.scale == 1.5


def test_seeds_differ_by_layer_and_by_recipe_and_stay_when_layers_are_left_out() -> None:
    seeds = [spec.seed for spec in make_plan(model(), recipe()).specs]
    assert len(set(seeds)) == 6
    others = [spec.seed for spec in make_plan(model(), recipe(seed=1)).specs]
    assert not set(seeds) & set(others)
    some = make_plan(model(), recipe(layers={"every": 2})).specs
    assert [spec.seed for spec in some] == seeds[1::2]
    huge = make_plan(model(), recipe(seed=2**70)).specs
    assert all(0 <= spec.seed < 2**31 for spec in huge)


@pytest.mark.parametrize(
    ("experts", "routing", "name", "promise"),
    [
        (COPIES, router(), "gelu", "exact"),
        (COPIES, router(weights="renorm_detach"), "gelu", "exact"),
        (COPIES, router(weights="one", top_k=1), "gelu", "exact"),
        (COPIES, router(weights="one"), "gelu", "approximate"),
        (COPIES, router(weights="softmax"), "gelu", "approximate"),
        (COPIES, router(scale=2.0), "gelu", "approximate"),
        (GRANULAR, router("virtual_group", 4), "swiglu", "exact"),
        (GRANULAR, router("virtual_group", 4, weights="one"), "swiglu", "exact"),
        (GRANULAR, router("virtual_group", 4, weights="softmax"), "swiglu", "approximate"),
        (GRANULAR, router("virtual_group", 4, scale="n_over_k"), "swiglu", "approximate"),
        (GRANULAR, router("normal", 4), "swiglu", "approximate"),
        ({**GRANULAR, "scale": "even"}, router("virtual_group", 4), "relu", "exact"),
        ({**GRANULAR, "scale": "even"}, router("virtual_group", 4), "relu2", "exact"),
        ({**GRANULAR, "scale": "even"}, router("virtual_group", 4), "reglu", "exact"),
        ({**GRANULAR, "scale": "even"}, router("virtual_group", 4), "gelu", "approximate"),
        ({**GRANULAR, "scale": "even"}, router("virtual_group", 4), "swiglu", "approximate"),
        ({**GRANULAR, "scale": "up_down"}, router("virtual_group", 4), "swiglu", "exact"),
        (SPLIT, router(weights="one"), "gelu", "exact with all experts"),
        (SPLIT, router(weights="one", top_k="all"), "gelu", "exact"),
        (SPLIT, router(weights="one", scale=2.0), "gelu", "approximate"),
        (SPLIT, router(top_k="all"), "gelu", "approximate"),
    ],
)
def test_promises(
    experts: dict[str, object], routing: dict[str, object], name: str, promise: Promise
) -> None:
    assert only(recipe(experts, routing), name).promise == promise


@pytest.mark.parametrize(
    ("experts", "routing", "name", "message"),
    [
        (
            COPIES,
            router(top_k=5),
            "gelu",
            "a token cannot visit 5 of 4 experts; set `router.top_k`",
        ),
        ({"method": "random", "count": 49}, router(), "gelu", "49 experts cannot share 48 neurons"),
        (
            {**GRANULAR, "granularity": 5},
            router("virtual_group", 5),
            "gelu",
            "48 neurons cannot be cut into 5 equal slices; set `experts.granularity` to 4 or 6",
        ),
        (
            {**GRANULAR, "granularity": 50},
            router("virtual_group", 50),
            "gelu",
            "48 neurons cannot be cut into 50 equal slices; set `experts.granularity` to 48",
        ),
        (GRANULAR, router("virtual_group", 6), "gelu", "`router.top_k` to a multiple of 4"),
        (COPIES, router("virtual_group"), "gelu", "needs `experts.method: granular`"),
        (SPLIT, router("virtual_group"), "gelu", "needs `experts.method: granular`"),
        (COPIES, router("avg_key"), "gelu", "copies would all get the same row"),
        (COPIES, router("centroid"), "gelu", "copies would all get the same row"),
        (GRANULAR, router("avg_key", 4), "gelu", "copies would all get the same row"),
        (SPLIT, router("centroid", tied=True), "gelu", "set `router.method` to `avg_key`"),
        (
            {**GRANULAR, "scale": "up_down"},
            router("virtual_group", 4),
            "gelu",
            "`experts.scale: up_down` changes what gelu computes",
        ),
    ],
)
def test_refusals(
    experts: dict[str, object], routing: dict[str, object], name: str, message: str
) -> None:
    with pytest.raises(PlanError) as error:
        only(recipe(experts, routing), name)
    assert str(error.value).startswith("mlp: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_of_all_ffns_come_at_once() -> None:
    found = Located(
        ffns=(
            *(ffn(f"layers.{i}.mlp") for i in range(5)),
            ffn("wide", d_ff=45),
        )
    )
    with pytest.raises(PlanError) as error:
        make_plan(found, recipe(GRANULAR, router("virtual_group", 6)))
    assert str(error.value).splitlines() == [
        "layers.0.mlp, layers.1.mlp, layers.2.mlp and 3 more: a token that visits 6 experts "
        "gets no whole number of copies, which have 4 slices each; "
        "set `router.top_k` to a multiple of 4",
        "wide: 45 neurons cannot be cut into 4 equal slices; set `experts.granularity` to 3 or 5",
    ]
    assert error.value.exit_code == 2


def test_a_plan_carries_what_it_was_made_from() -> None:
    found, asked = model(), recipe()
    plan = make_plan(found, asked, recipe_name="sparse-upcycling")
    assert (plan.located, plan.recipe, plan.recipe_name) == (found, asked, "sparse-upcycling")
    assert plan.promise == "exact"
