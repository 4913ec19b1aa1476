import json
import os
from pathlib import Path

import pytest

from upcycle.errors import UsageError
from upcycle.ir.measured import Check
from upcycle.targets.card import LOADING, PROMISES, model_card
from upcycle.targets.companions import copy_companions
from upcycle.targets.files.staging import staged


def content(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(directory.iterdir())}


def test_the_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as directory:
        assert directory == tmp_path / "deep" / f"out.tmp-{os.getpid()}"
        (directory / "a").write_text("1")
        assert not out.exists()
    assert content(out) == {"a": "1"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_everything_as_it_was(
    error: type[BaseException], existed: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()
        (out / "old").write_text("kept")

    def fail() -> None:
        with staged(out, overwrite=existed) as directory:
            (directory / "half").write_text("")
            raise error

    with pytest.raises(error):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existed else [])
    assert not existed or content(out) == {"old": "kept"}


def test_an_existing_directory_is_refused_unless_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(UsageError, match="`overwrite=True`"), staged(out):
        pytest.fail("the block must not run")
    with staged(out, overwrite=True) as directory:
        (directory / "new").write_text("")
    assert content(out) == {"new": ""}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with staged(out):
            out.mkdir()
            (out / "theirs").write_text("")

    with pytest.raises(UsageError, match="exists already"):
        write()
    assert content(out) == {"theirs": ""}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_in_use_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    for out in (dense, tmp_path):
        with (
            pytest.raises(UsageError, match="in use"),
            staged(out, overwrite=True, protect=[dense]),
        ):
            pytest.fail("the block must not run")
    monkeypatch.chdir(dense)
    with pytest.raises(UsageError, match="in use"), staged(dense, overwrite=True):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="not a directory"),
        staged(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("the block must not run")


def test_companions_are_what_is_neither_weights_nor_config_nor_readme(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source, target, source / "1_Pooling", source / "onnx"):
        directory.mkdir()
    wanted = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"]
    unwanted = ["config.json", "README.md", "model.safetensors", "pytorch_model.bin", ".git"]
    unwanted += ["model.safetensors.index.json", "onnx/model.json", "model.gguf", "heads.pt"]
    for name in [*wanted, *unwanted, "1_Pooling/config.json"]:
        (source / name).write_text("x")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (target / "LICENSE").write_text("ours")
    expected = ["1_Pooling/config.json", *wanted[:3], "modules.json"]
    assert copy_companions(source, target) == sorted(expected)
    assert (target / "LICENSE").read_text() == "ours"
    present = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert present == {*expected, "LICENSE"}


def card(**changes: object) -> str:
    arguments: dict[str, object] = {
        "name": "tiny-moe",
        "base_model": "someone/tiny",
        "promise": "exact",
        "recipe_name": "sparse-upcycling",
        "recipe_text": "version: 1\nseed: 0\n",
        "numbers": {"experts per layer": "8", "experts per token": "2"},
        "checks": [
            Check("logits", 1.5e-6, 1e-5, True),
            Check("layer 3 | gate", float("nan"), 1e-5, False),
        ],
        "targets": ["native"],
        "auto_class": "AutoModelForCausalLM",
        "runtimes": {},
        "notes": [],
        "library": "transformers",
    }
    return model_card(**{**arguments, **changes})  # type: ignore[arg-type]


def test_the_card_says_what_was_measured() -> None:
    text = card(runtimes={"vLLM": "native"}, notes=["A note."])
    assert text.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "base_model: someone/tiny\n---",
        "# tiny-moe",
        PROMISES["exact"],
        "A note.",
        "| experts per layer | 8 |",
        "| logits | 1.50e-06 | 1.00e-05 | yes |",
        "| layer 3 \\| gate | nan | 1.00e-05 | **no** |",
        'AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        "| vLLM | native |",
        "```yaml\nversion: 1\nseed: 0\n```",
    ):
        assert part in text
    assert text == card(runtimes={"vLLM": "native"}, notes=["A note."])


def test_the_card_knows_every_target_and_hides_local_paths_from_the_hub() -> None:
    text = card(targets=list(LOADING), base_model="./some/dense/model", checks=[])
    assert "base_model:" not in text
    assert "trust_remote_code=True" in text
    assert "onnxruntime.InferenceSession" in text
    assert "not verified" in text


def test_a_fence_in_the_recipe_does_not_end_the_block() -> None:
    assert "````yaml\n# ```\n````" in card(recipe_text="# ```")
