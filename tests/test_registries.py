"""Nothing that was written is left out of the table that finds it, and a recipe names all of it."""

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import get_args

import pytest

from upcycle.layers import routers as kinds
from upcycle.layers.config import SELECT_ARGUMENTS
from upcycle.layers.router import Router
from upcycle.layers.selection import SELECT
from upcycle.passes import experts, routers
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.passes.routers.method import RouterMethod
from upcycle.recipe import methods
from upcycle.recipe import schema as recipe
from upcycle.recipe.onnx import Form
from upcycle.targets import native
from upcycle.targets.native import NATIVE
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.onnx.forms.functions import STANDARD


def modules(package: ModuleType) -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def left_out(package: ModuleType, kind: type, known: list[object]) -> list[str]:
    """Objects of type `kind` that a file of `package` defines in capitals and nobody lists."""
    return [
        f"{module.__name__}.{name}"
        for module in modules(package)
        for name, value in vars(module).items()
        if isinstance(value, kind) and name.isupper() and value not in known
    ]


REGISTRIES = {
    "experts": (experts, ExpertMethod, [*EXPERTS.values()]),
    "routers": (routers, RouterMethod, [*ROUTER_METHODS.values()]),
    "native": (native, NativeTarget, [*NATIVE.values()]),
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_every_file_is_in_its_table(name: str) -> None:
    package, kind, known = REGISTRIES[name]
    assert not left_out(package, kind, known)
    assert len(left_out(package, kind, known[1:])) == 1


def test_a_recipe_names_every_method_and_no_other() -> None:
    assert sorted(get_args(methods.ExpertMethodName)) == sorted(EXPERTS)
    assert sorted(get_args(methods.RouterMethodName)) == sorted(ROUTER_METHODS)


def test_every_kind_of_router_has_its_file_and_a_method_that_makes_it() -> None:
    assert {method.makes for method in ROUTER_METHODS.values()} == set(kinds.ROUTER_KINDS)
    written = {
        value
        for module in modules(kinds)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Router)
    }
    assert written == set(kinds.ROUTER_KINDS.values())


def test_what_a_method_reads_is_a_field_of_the_recipe() -> None:
    read = {name for method in ROUTER_METHODS.values() for name in method.reads}
    assert read <= set(recipe.Router.model_fields)


def test_the_arguments_of_a_selection_are_fields_of_the_recipe() -> None:
    rules = get_args(recipe.Router.model_fields["select"].annotation)
    assert set(rules) == set(SELECT)
    for rule, function in SELECT.items():
        _, k, *more = inspect.signature(function).parameters
        assert (k, tuple(more)) == ("k", SELECT_ARGUMENTS.get(rule, ()))


def test_every_onnx_form_is_a_kernel_or_standard() -> None:
    assert set(get_args(Form)) == {"fused", "quantised"} | set(STANDARD)
