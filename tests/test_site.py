"""The documentation: one way through all pages, and a site that needs no network."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import upcycle

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ABOVE = {"contributing.md", "changelog.md", "security-policy.md"}  # docs/site.py brings them in
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="pip install -e '.[docs]'"
)


def in_order(nav: Any) -> Iterator[str]:
    for entry in nav:
        (where,) = entry.values()
        if isinstance(where, str):
            yield where
        else:
            yield from in_order(where)


def pages_of_the_site() -> list[str]:
    return list(in_order(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def links_of(page: Path) -> set[str]:
    targets = re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", page.read_text())
    return {target for target in targets if "://" not in target}


def test_every_page_has_its_place_in_the_site() -> None:
    pages = pages_of_the_site()
    assert len(pages) == len(set(pages))
    assert set(pages) == {page.name for page in DOCS.glob("*.md")} | ABOVE


def test_the_index_names_every_page_in_that_order() -> None:
    text = (DOCS / "index.md").read_text()
    above = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
    above["SECURITY.md"] = "security-policy"
    found = re.findall(r"\]\((?:\.\./)?([\w-]+\.md)\)", text.split("## In which order")[1])
    listed = [above.get(name, name.removesuffix(".md")) for name in found]
    expected = [page.removesuffix(".md") for page in pages_of_the_site()]
    starts = [page for page in expected if page.startswith("quickstart-")]
    assert listed == [page for page in expected if page != "index" and page not in starts]
    assert all(f"({page}.md)" in text for page in starts)


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: upcycle\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.M)
    assert len(shown) == len(set(shown))
    assert set(shown) == {name for name in upcycle.__all__ if not name.startswith("__")}


def test_pictures_load_nothing_and_read_in_dark_mode() -> None:
    pictures = sorted((DOCS / "pictures").glob("*.svg"))
    assert len(pictures) >= 6
    for picture in pictures:
        text = picture.read_text()
        assert "<title" in text, picture.name
        assert "prefers-color-scheme: dark" in text, picture.name
        assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"], picture.name
        used = any(f"pictures/{picture.name}" in page.read_text() for page in DOCS.glob("*.md"))
        assert used, picture.name


class Loaded(HTMLParser):
    """The addresses that a browser fetches for a page, as opposed to links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = given.get("src") or (given.get("href") if tag == "link" else None)
        if fetched:
            self.found.append(fetched)


def loaded_by(page: str) -> list[str]:
    parser = Loaded()
    parser.feed(page)
    return parser.found


def test_what_a_page_loads_is_seen() -> None:
    page = (
        '<a href="https://a"></a><link href="https://b"/><script src="//c"></script><img src="d">'
    )
    assert loaded_by(page) == ["https://b", "//c", "d"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; neither torch nor a network is there for the build."""
    out = tmp_path_factory.mktemp("site") / "built"
    absent = tmp_path_factory.mktemp("absent")
    for name in ("torch", "transformers"):
        (absent / f"{name}.py").write_text("raise ImportError\n")
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"PYTHONPATH": str(absent), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@needs_mkdocs
def test_the_site_builds_without_a_warning_and_without_torch(site: Path) -> None:
    built = {page.stem for page in site.glob("*.html")}
    assert {page.removesuffix(".md") for page in pages_of_the_site()} <= built
    api = (site / "api.html").read_text()
    for name in ("convert", "MoE", "register_router", "RecipeError"):
        assert f'id="upcycle.{name}"' in api
    assert "returns" in api.lower()


@needs_mkdocs
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        for address in loaded_by(page.read_text()):
            assert "//" not in address.removeprefix("data:"), f"{page.name}: {address}"
            if page.name != "404.html" and not address.startswith("data:"):
                assert (site / address.split("?")[0]).exists(), f"{page.name}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text()), sheet.name


@needs_mkdocs
def test_links_to_files_of_the_repository_are_their_names(site: Path) -> None:
    for page in site.glob("*.html"):
        assert not re.findall(r'href="\.\./[^"]*"', page.read_text()), page.name
    text = (site / "contributing.html").read_text()
    assert 'href="plugins.html"' in text


@needs_mkdocs
@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[a place](recipes.md#nowhere)", "nowhere"),
        ("::: upcycle.nothing", "upcycle.nothing"),
    ],
)
def test_a_broken_link_fails_the_build(added: str, said: str, tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if entry.name not in ("docs", "mkdocs.yml") and not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "docs").mkdir()
    for entry in DOCS.iterdir():
        (tmp_path / "docs" / entry.name).symlink_to(entry)
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    page = tmp_path / "docs" / "glossary.md"
    text = page.read_text()
    page.unlink()
    page.write_text(f"{text}\n\n{added}\n")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "s"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr
