"""report.html in Chromium: it is drawn, without an error on the console, in every form.

The pictures stay in ``.artefacts/`` for people to look at.
"""

import html
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import page_case
import pytest
from click.testing import CliRunner

from upcycle.cli.main import main
from upcycle.page.page import page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARTEFACTS = Path(__file__).parents[1] / ".artefacts"
PAPER = {"light": (255, 255, 255), "dark": (20, 23, 27)}  # as style.css has it
PHONE = 360

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"
)
Browse = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Open a file with more flags: what it prints, and the messages on its console."""

    def run(file: Path, *flags: str) -> tuple[str, list[str]]:
        assert CHROMIUM is not None
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
            *(f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, re.findall(r"CONSOLE.*", done.stderr)

    return run


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that ``upcycle convert`` writes."""
    out = tmp_path_factory.mktemp("real") / "moe"
    command = ["convert", "small_models:plain", "--inputs", "small_models:plain_inputs"]
    command += ["--recipe", "sparse-upcycling", "--target", "safetensors", "--out", str(out)]
    assert CliRunner().invoke(main, command).exit_code == 0
    return out / "report.html"


@pytest.fixture(params=["real", "small", "large"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """2 layers of 4 experts, or 80 of 64."""
    if request.param == "real":
        made: Path = request.getfixturevalue("real")
        return made
    size = (2, 4) if request.param == "small" else (80, 64)
    path = tmp_path / f"{request.param}.html"
    path.write_text(page(page_case.contents(*size)), encoding="utf-8")
    return path


def test_it_is_drawn_in_light_and_dark(file: Path, browse: Browse) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    for number, scheme in enumerate(("dark", "light")):
        picture = ARTEFACTS / f"{file.stem}-{scheme}.png"
        picture.unlink(missing_ok=True)
        scheme_is = f"--blink-settings=preferredColorScheme={number}"
        _, console = browse(file, scheme_is, "--window-size=1100,3600", f"--screenshot={picture}")
        assert console == []
        assert _size(picture) == (1100, 3600)
        assert _first_pixel(picture) == PAPER[scheme]


def test_its_texts_are_there_after_it_is_read(file: Path, browse: Browse) -> None:
    """The browser repairs what is not HTML: then these would be elsewhere, or other elements."""
    made, console = browse(file, "--dump-dom")
    assert console == []
    written = file.read_text("utf-8")
    for tag in ("section", "svg", "path", "rect", "circle", "title", "table", "caption", "td"):
        assert made.count(f"<{tag}") == written.count(f"<{tag}"), tag
    for text in ("Checks", "Load of every expert", "What the experts are made of", "Recipe"):
        assert f">{text}</h2>" in made


def test_it_can_be_printed(file: Path, browse: Browse) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    paper = ARTEFACTS / f"{file.stem}.pdf"
    paper.unlink(missing_ok=True)
    _, console = browse(file, "--no-pdf-header-footer", f"--print-to-pdf={paper}")
    assert console == []
    assert paper.read_bytes().startswith(b"%PDF-")


def test_a_phone_scrolls_charts_and_never_the_page(
    file: Path, tmp_path: Path, browse: Browse
) -> None:
    """In a frame of that width, as a window of Chromium is never so narrow."""
    ARTEFACTS.mkdir(exist_ok=True)
    inner = html.escape(file.read_text("utf-8"))
    around = tmp_path / "phone.html"
    around.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><title>-</title><iframe id="f" width="{PHONE}" '
        f'height="3600" style="border:0" srcdoc="{inner}"></iframe><script>onload = () => '
        "document.title = f.contentDocument.documentElement.scrollWidth</script>"
    )
    made, console = browse(around, "--dump-dom")
    assert console == []
    assert re.findall(r"<title>(.*?)</title>", made)[0] == str(PHONE)
    picture = ARTEFACTS / f"{file.stem}-phone.png"
    browse(around, "--window-size=500,3600", f"--screenshot={picture}")
    assert _size(picture) == (500, 3600)


def test_a_script_in_it_would_not_run_and_be_seen(tmp_path: Path, browse: Browse) -> None:
    file = tmp_path / "bad.html"
    text = page(page_case.contents())
    script = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png'>"
    file.write_text(text.replace("</main>", f"{script}</main>"), encoding="utf-8")
    made, console = browse(file, "--dump-dom")
    assert "<title>run" not in made
    assert len(console) == 2
    assert all("Content Security Policy" in line for line in console)


def _size(picture: Path) -> tuple[int, int]:
    found: tuple[int, int] = struct.unpack(">II", picture.read_bytes()[16:24])
    return found


def _first_pixel(picture: Path) -> tuple[int, ...]:
    image = pytest.importorskip("PIL.Image")
    return tuple(image.open(picture).convert("RGB").getpixel((0, 0)))


def test_the_page_of_a_graph_moves_by_its_own_script(tmp_path: Path, browse: Browse) -> None:
    """Its policy lets no other script run."""
    command = ["graph", "small_models:plain", "--inputs", "small_models:plain_inputs"]
    file = tmp_path / "graph.html"
    assert CliRunner().invoke(main, [*command, "--out", str(file)]).exit_code == 0
    made, console = browse(file, "--dump-dom", "--window-size=1100,800")
    assert console == []
    assert '<body class="moves">' in made
    text = file.read_text("utf-8")
    file.write_text(text.replace('classList.add("moves")', 'classList.add("moved")'))
    made, console = browse(file, "--dump-dom")
    assert "moved" not in made.partition("<script")[0]
    assert any("Content Security Policy" in line for line in console)
