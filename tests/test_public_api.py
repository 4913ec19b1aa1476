"""The names that ``import upcycle`` promises."""

import subprocess
import sys
from types import ModuleType

import pytest

import upcycle

# A new name is a promise to users: make it here too, and in the change log.


def test_all_is_sorted_and_complete() -> None:
    assert list(upcycle.__all__) == sorted(set(upcycle.__all__), key=str.casefold)


@pytest.mark.parametrize("name", upcycle.__all__)
def test_a_public_name_can_be_imported(name: str) -> None:
    value = getattr(upcycle, name)
    assert not isinstance(value, ModuleType), f"{name} is a module, not a name of the API"
    assert not name.startswith("_") or name == "__version__"


@pytest.mark.parametrize("name", upcycle.__all__)
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(upcycle, name)
    if callable(value):
        assert value.__doc__


def test_dir_lists_what_is_public() -> None:
    assert set(upcycle.__all__) <= set(dir(upcycle))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        upcycle.no_such_name  # noqa: B018


def test_importing_upcycle_is_cheap_and_leaks_no_private_module() -> None:
    code = (
        "import sys, types, upcycle\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "names = [n for n in vars(upcycle) if not n.startswith('_')]\n"
        "print(*[n for n in names if n not in upcycle.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
