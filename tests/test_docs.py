"""The commands and the code of the documentation work as printed."""

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numerics
import pytest
import small_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from upcycle.cli.main import main
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.method import DenseLayer
from upcycle.passes.merge import merge_to_dense
from upcycle.recipe.reader import recipe_schema
from upcycle.recipe.schema import Recipe
from upcycle.recipe.shipped import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def commands() -> list[tuple[str, str]]:
    """Each line of the documentation that calls upcycle, with the page that it is on."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh") + blocks(page, "console"):
            for line in block.splitlines():
                for part in line.removeprefix("$ ").split(" && "):
                    if re.match(r"(\.venv/bin/)?upcycle ", part):
                        found.append((page.name, part.split("#")[0].split(" > ")[0].strip()))
    return found


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 5


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_printed_command_parses(page: str, command: str) -> None:
    """The command line accepts it; what the commands do is tested elsewhere."""
    name, *arguments = shlex.split(command)[1:]
    subcommand = main.get_command(click.Context(main), name)
    assert subcommand is not None, f"{page}: no command {name}"
    if not isinstance(subcommand, click.Group):
        subcommand.make_context(name, arguments)


def test_no_two_commands_write_the_same_directory() -> None:
    """Who follows one page and then another is not refused because it is there already."""
    # README shows its first command twice, with the environment's path and without.
    printed = {(page, command.removeprefix(".venv/bin/")) for page, command in commands()}
    written = [
        (page, out[0]) for page, line in printed if (out := re.findall(r"(?:--out|-o) (\S+)", line))
    ]
    counts = Counter(directory for _, directory in written)
    twice = [f"{page}: {directory}" for page, directory in written if counts[directory] > 1]
    assert len(written) > 20
    assert not twice


NOT_RUN = re.compile(r"<!-- not run by the tests: (.+?) -->\n$", flags=re.S)


def python_of(page: Path) -> list[tuple[str, str | None]]:
    """The blocks of Python, and the reason that stands before one that the tests cannot run."""
    text, found = page.read_text(), []
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.S | re.M):
        reason = NOT_RUN.search(text[: match.start()])
        found.append((match[1], reason[1] if reason else None))
    return found


WITH_PYTHON = [page for page in PAGES if python_of(page)]


def test_few_blocks_are_not_run_and_each_has_a_reason() -> None:
    reasons = [reason for page in WITH_PYTHON for _, reason in python_of(page) if reason]
    assert len(WITH_PYTHON) >= 8
    assert len(reasons) <= 2, reasons
    assert NOT_RUN.search("<!-- not run by the tests: it needs a GPU -->\n")
    assert not NOT_RUN.search("<!-- not run by the tests: it needs a GPU -->\n\nText.\n")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models under the names of those that the pages make and read."""
    folder = tmp_path_factory.mktemp("stand_ins")
    torch.manual_seed(0)
    small_models.llama().save_pretrained(folder / "llama")
    for name, model, *more in (
        ("minilm-moe", "sample:bert-tiny", "--target", "safetensors", "--target", "onnx"),
        ("bert-moe", "sample:bert-tiny", "--target", "safetensors"),
        ("smollm2-moe", str(folder / "llama")),
    ):
        made = ["convert", model, "--recipe", "sparse-upcycling", "--out", str(folder / name)]
        ran = CliRunner().invoke(main, [*made, *more])
        assert ran.exit_code == 0, ran.output
    merged = tmp_path_factory.mktemp("merged")
    for seed, name in enumerate(("base", "law", "code")):
        torch.manual_seed(seed)
        small_models.llama(vocab_size=256).save_pretrained(merged / name)
    sources = f"experts.sources=[base,{merged / 'law'},{merged / 'code'}]"
    made = ["convert", str(merged / "base"), "--recipe", "btx", "--set", sources]
    made += ["--set", "experts.count=3", "--target", "safetensors"]
    ran = CliRunner().invoke(main, [*made, "--out", str(folder / "experts-moe")])
    assert ran.exit_code == 0, ran.output
    for name, made in (
        ("minilm-code", "minilm-moe"),
        ("minilm-fast", "minilm-moe"),
        ("bert-edge", "minilm-moe"),
        ("bert-copies", "bert-moe"),
    ):
        (folder / name).symlink_to(folder / made)
    return folder


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(
    page: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All blocks in one namespace, in order, beside the directories that the pages make."""
    for made in stand_ins.iterdir():
        (tmp_path / made.name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block, reason in python_of(page):
        if reason is None:
            exec(compile(block, page.name, "exec"), namespace)
    if page.name == "training.md":
        before, after = (
            load_file(f"{name}/model.safetensors") for name in ("experts-moe", "experts-trained")
        )
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert moved == {name for name in before if name.endswith(".gate.weight")}


@pytest.mark.usefixtures("own_registries")
def test_the_example_of_a_new_method_is_right() -> None:
    """It is a split: each neuron is in one expert, so that the dense FFN can be put together."""
    namespace: dict[str, Any] = {"__name__": "strided_experts"}
    for block, _ in python_of(ROOT / "CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    ffn = numerics.random_ffn("swiglu")
    split = numerics.make_recipe(
        {"method": "strided", "count": 6}, {"method": "normal", "top_k": 2, "weights": "one"}
    )
    spec = numerics.convert(ffn, split)[0]
    for method in (namespace["STRIDED"], EXPERTS["strided"]):
        parts = method.build(DenseLayer(ffn, spec, spec.generator("experts")))
        assert parts.experts.neuron_EI.tolist() == [[*range(e, 48, 6)] for e in range(6)]
        assert torch.equal(merge_to_dense(parts.experts, ffn).up_MFD, ffn.up_MFD)
        assert "Source:" in method.build.__doc__


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_the_files_that_a_page_names_exist(name: str) -> None:
    """All but those that the reader is to write."""
    folders = "upcycle|passes|targets|recipes|tests|docs|benchmarks"
    named = set(re.findall(rf"`((?:{folders})/[\w./]*)`", (ROOT / name).read_text()))
    missing = {file for file in named if not (ROOT / file).exists()}
    assert len(named) > 5
    assert {file for file in missing if Path(file).stem not in ("NAME", "strided")} == set()


def test_every_recipe_is_in_the_tables() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "recipes.md"):
        listed = set(re.findall(r"^\| `([a-z-]+)` \|", page.read_text(), flags=re.M))
        assert set(recipe_names()) <= listed, page.name


def test_every_word_of_a_recipe_is_documented() -> None:
    """What a key may be, in the page that lists the keys; and methods in their own row."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    sections = recipe_schema()["$defs"]
    for name, key in [("Experts", "experts"), ("Router", "router"), ("Layers", "layers")]:
        for field, about in sections[name]["properties"].items():
            parts = [about, about.get("items", {}), *about.get("anyOf", [])]
            for word in [str(w) for part in parts for w in part.get("enum", []) if w is not None]:
                assert re.search(rf"`(\w+: )?{word}`", text), f"{key}.{field}: {word}"
    (row,) = re.findall(r"^\| `experts\.method` \|.*", text, flags=re.M)
    listed = re.findall(r"`(\w+)`", row)
    assert listed == sections["Experts"]["properties"]["method"]["enum"]
    routers = text.split("| `router.method` | the score")[1].split("\n\n")[0]
    first = " ".join(line.split("|")[1] for line in routers.splitlines()[2:])
    assert sorted(re.findall(r"`(\w+)`", first)) == sorted(
        sections["Router"]["properties"]["method"]["enum"]
    )


def test_the_mistakes_that_a_page_prints_are_those_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "recipes.md"
    (text,), (shown,) = blocks(page, "yaml"), blocks(page, "console")
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(text)
    command, *lines = shown.splitlines()
    ran = CliRunner().invoke(main, shlex.split(command)[2:])
    assert (ran.exit_code, ran.stderr.splitlines()) == (2, lines)


def test_every_key_of_a_recipe_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    for section in ("layers", "experts", "router", "verify"):
        model = Recipe.model_fields[section].annotation
        assert model is not None
        for key in model.model_fields:
            assert f"`{section}.{key}`" in text, f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
