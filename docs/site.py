"""A hook of MkDocs: pages that live outside docs/, and where griffe finds the sources.

The Markdown files stay as a code host shows them; what differs on the site is changed here.
"""

import re
import shutil
import tempfile
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ABOVE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
}
SHIM = "https://unpkg.com/iframe-worker/shim"  # what Material's offline plugin has readers fetch
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copy the packages into one folder, as an installation does; none of them is imported."""
    folder = tempfile.TemporaryDirectory(prefix="upcycle-site-")
    config._folder = folder  # it lives as long as the build
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for name, place in setup["package-dir"].items():
        shutil.copytree(ROOT / place, Path(folder.name) / name.replace(".", "/"))
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [folder.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages above docs/."""
    for source, name in ABOVE.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site; a link to a file of the repository is its name."""
    is_above = page.file.src_uri in ABOVE.values()
    return LINK.sub(lambda found: _link(found, is_above), text)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The shim for search comes with the site; all pages are in one folder."""
    return output.replace(SHIM, "iframe-worker.js")


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """The same for the page of a missing address."""
    return output.replace(SHIM, "/iframe-worker.js")


def _link(found: re.Match[str], is_above: bool) -> str:
    text, target, anchor = found[1], found[2], found[3] or ""
    inside = target.removeprefix("docs/") if is_above else target
    above = target if is_above else target.removeprefix("../")
    if above in ABOVE and (is_above or target != above):
        return f"[{text}]({ABOVE[above]}{anchor})"
    is_page = target != inside if is_above else not target.startswith("../")
    return f"[{text}]({inside}{anchor})" if is_page else text
