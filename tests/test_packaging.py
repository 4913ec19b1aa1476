"""What is installed: every package, the recipes, and no top-level name but upcycle."""

import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
MAPPED = ("passes", "targets", "recipes")


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_every_package_directory_is_listed() -> None:
    """An unlisted one works in an editable install and is missing from the wheel."""
    found = set()
    for folder in ("upcycle", *MAPPED):
        for path in (ROOT / folder).rglob("__init__.py"):
            name = ".".join(path.parent.relative_to(ROOT).parts)
            found.add(name if folder == "upcycle" else f"upcycle.{name}")
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in ("upcycle", *MAPPED):
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks __init__.py"


def test_the_shipped_recipes_are_package_data() -> None:
    in_tree = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    installed = {f.name for f in files("upcycle.recipes").iterdir() if f.name.endswith(".yaml")}
    assert installed == in_tree
    assert SETUPTOOLS["package-data"]["upcycle.recipes"] == ["*.yaml"]


def test_the_templates_of_the_page_are_package_data() -> None:
    """Each folder is named: one that is not would be missing from the wheel alone."""
    page = ROOT / "upcycle" / "page"
    data = {path for path in page.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    listed = SETUPTOOLS["package-data"]["upcycle.page"]
    assert data == {path for pattern in listed for path in page.glob(pattern)}
    assert len(data) > 3


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_folder_is_no_top_level_module(tmp_path: Path, name: str) -> None:
    done = python(f"import {name}", tmp_path)
    assert f"No module named '{name}'" in done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_folder_refuses_a_second_import_from_the_root(name: str) -> None:
    done = python(f"import {name}", ROOT)
    assert f"ImportError: import upcycle.{name}, not {name}" in done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_folder_is_a_part_of_upcycle(tmp_path: Path, name: str) -> None:
    done = python(f"import importlib; importlib.import_module('upcycle.{name}')", tmp_path)
    assert done.returncode == 0, done.stderr
