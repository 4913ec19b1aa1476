"""The names that ``import upcycle`` promises."""

import subprocess
import sys
from types import ModuleType

import pytest

import upcycle

PUBLIC = list(getattr(upcycle, "__all__", []))


def test_the_public_names_are_listed_once() -> None:
    assert PUBLIC, "upcycle/__init__.py must list its names in __all__"
    assert len(PUBLIC) == len(set(PUBLIC))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_can_be_imported(name: str) -> None:
    value = getattr(upcycle, name)
    assert not isinstance(value, ModuleType), f"{name} is a module, not a name of the API"
    assert not name.startswith("_") or name == "__version__"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(upcycle, name)
    if callable(value):
        assert value.__doc__


def test_dir_lists_what_is_public() -> None:
    assert set(PUBLIC) <= set(dir(upcycle))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        upcycle.no_such_name  # noqa: B018


def test_importing_upcycle_is_cheap() -> None:
    """The command line answers at once because of it."""
    code = "import sys, upcycle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_foreign_module_is_reachable_as_a_public_name() -> None:
    modules = {n: v for n, v in vars(upcycle).items() if isinstance(v, ModuleType)}
    foreign = [n for n, v in modules.items() if not v.__name__.startswith("upcycle.")]
    assert [name for name in foreign if not name.startswith("_")] == []
