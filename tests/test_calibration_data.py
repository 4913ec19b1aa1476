"""Where calibration data comes from, in which form, and what is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import upcycle
from upcycle.cli.main import main
from upcycle.data import default_data
from upcycle.data.calibration import calibration_data, given_data, verification_inputs
from upcycle.data.calibration_files import CalibrationInput, read_calibration
from upcycle.data.text import sequences
from upcycle.errors import UsageError
from upcycle.passes.calibrate.usage import usage
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.schema import Recipe

RIDGE = ["router.method=ridge", "verify.max_relative_error=9", "experts.count=4", "router.top_k=2"]
SHORT = ["calibration.tokens=256", "calibration.length=16"]
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def ridge(*overrides: str) -> Recipe:
    return load_recipe("factorllm", [*RIDGE, *SHORT, *overrides])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("llama", tmp_path_factory.mktemp("llama"), with_tokenizer=True)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("vit", tmp_path_factory.mktemp("vit"))


def records(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def convert(model: Path, out: Path, *options: object) -> Result:
    sets = [part for key in (*RIDGE, *SHORT) for part in ("--set", key)]
    arguments = ["convert", model, "--recipe", "factorllm", "--out", out, *options]
    return CliRunner().invoke(main, [*map(str, arguments), "--target", "safetensors", *sets])


def test_verification_reads_a_quarter_and_calibration_the_rest() -> None:
    first, rest = default_data.verification_text(), default_data.calibration_text()
    assert first + rest == default_data.default_text()
    assert len(first) == len(default_data.default_text()) // 4


def test_source_code_that_is_held_out_is_not_calibrated_on() -> None:
    held_out, rest = (default_data.library_source(held_out=held) for held in (True, False))
    mixed = default_data.mixed_calibration_text()
    assert not any(line in rest for line in held_out.splitlines()[::50] if len(line) > 70)
    assert len(mixed) > 1.9 * len(default_data.calibration_text())
    first = mixed[:20_000]
    assert default_data.calibration_text()[:4000] in first
    assert rest[:4000] in first
    assert default_data.verification_text()[:4000] not in mixed


@pytest.mark.parametrize(
    "given",
    [
        CalibrationInput("", texts=(TEXT,)),
        CalibrationInput("", texts=("abcdefgh" * 4, "ijklmnop" * 4), domains=("a", "b")),
        CalibrationInput("", texts=tuple(f"text {i}" for i in range(9)), domains=tuple("abc" * 3)),
    ],
)
def test_what_is_held_out_is_not_calibrated_on(given: CalibrationInput) -> None:
    held, rest = given.parts()
    if len(given.texts) < 4:
        pairs = zip(held.texts, rest.texts, strict=True)
        assert tuple(a + b for a, b in pairs) == given.texts
        assert held.domains == rest.domains == given.domains
    else:
        assert not set(held.texts) & set(rest.texts)
        assert set(held.texts) | set(rest.texts) == set(given.texts)
        assert len(held.texts) == len(held.domains) == 3


def test_examples_are_held_out_too() -> None:
    tensors = {"pixel_values": torch.arange(9.0)[:, None]}
    held, rest = CalibrationInput("", tensors=tensors).parts()
    assert held.tensors is not None
    assert rest.tensors is not None
    assert held.tensors["pixel_values"].flatten().tolist() == [0, 4, 8]
    assert rest.tensors["pixel_values"].flatten().tolist() == [1, 2, 3, 5, 6, 7]


def test_running_text_for_a_language_model(llama: Path) -> None:
    data = calibration_data(
        small_models.build("llama"), ridge(), CalibrationInput("x", texts=(TEXT,)), directory=llama
    )
    tokens = torch.cat([batch["input_ids"] for batch in data.batches])  # type: ignore[call-overload]
    assert tokens.shape == (16, 16)
    expected = small_models.tokenizer()(TEXT[len(TEXT) // 4 :]).input_ids
    assert tokens.flatten().tolist() == expected[:256]
    assert len(data.batches) <= 16
    assert data.domains is None


class Counting:
    """A tokenizer that notes how many characters it has read."""

    def __init__(self) -> None:
        self.inner, self.read = small_models.tokenizer(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        self.read += sum(map(len, [text] if isinstance(text, str) else text))
        return self.inner(text, **options)


@pytest.mark.parametrize("is_running", [True, False])
def test_of_a_long_text_no_more_is_tokenised_than_is_wanted(is_running: bool) -> None:
    texts = ("", "a short one", default_data.default_text(), "not read")
    for length, most in ((16, 256), (64, 1)):
        tokenizer = Counting()
        found = sequences(tokenizer, texts, length, most=most, is_running=is_running)
        assert len(found) == max(1, most // length)
        assert tokenizer.read < len(texts[2]) / 10
        every = sequences(tokenizer.inner, texts, length, most=10**9, is_running=is_running)
        assert found == every[: len(found)]
        assert len(every) > 100_000 // length  # all of it, where that is wanted


def test_sentences_for_another_model(tmp_path: Path) -> None:
    """They are padded, and the padding is masked."""
    bert = small_models.saved("bert", tmp_path / "bert", with_tokenizer=True)
    given = CalibrationInput("x", texts=("a b c d", "a", *["longer text " * 9] * 6))
    data = calibration_data(small_models.build("bert"), ridge(), given, directory=bert)
    batch = data.batches[0]
    assert isinstance(batch, dict)
    mask = batch["attention_mask"]
    assert mask.sum(1).tolist()[0] == 1, "the text `a`; the first one is held out"
    assert (batch["input_ids"][mask == 0] == 0).all()
    assert mask.shape[1] <= 64


def test_a_decoder_is_given_text_of_another_length(tmp_path: Path) -> None:
    t5 = small_models.saved("t5", tmp_path / "t5", with_tokenizer=True)
    model = small_models.build("t5")
    data = calibration_data(model, ridge(), CalibrationInput("x", texts=(TEXT,)), directory=t5)
    batch = data.batches[0]
    assert isinstance(batch, dict)
    ours, theirs = batch["decoder_input_ids"], batch["input_ids"]
    assert len(ours) == len(theirs)
    assert ours.shape[1] < theirs.shape[1]
    assert (ours[:, 1:] == theirs[:, : ours.shape[1] - 1]).all()
    upcycle.convert(model, ridge(), calibration=[dict(b) for b in data.batches])  # type: ignore[call-overload]


def test_several_files_are_domains(llama: Path, tmp_path: Path) -> None:
    paths = []
    for name, text in (("a", "a b c " * 200), ("b", "x y z " * 200)):
        paths.append(str(tmp_path / f"{name}.txt"))
        Path(paths[-1]).write_text(text)
    data = calibration_data(
        small_models.build("llama"), ridge(), read_calibration(paths), directory=llama
    )
    assert data.domains is not None
    domain_N = torch.cat(list(data.domains))
    assert domain_N.bincount().tolist() == [8, 8], "as many tokens of each"
    tokens = torch.cat([batch["input_ids"] for batch in data.batches])  # type: ignore[call-overload]
    of_a = set(small_models.tokenizer()("abc").input_ids)
    for row, domain in zip(tokens, domain_N, strict=True):
        assert bool(of_a & set(row.tolist())) == (domain == 0)


def test_records_have_domains(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "domain": "ab"[i % 2]} for i in range(5)]
    given = read_calibration([records(tmp_path / "x.jsonl", *rows)])
    assert given.texts == tuple(f"text {i}" for i in range(5))
    assert given.domains == ("a", "b", "a", "b", "a")
    named = read_calibration([records(tmp_path / "y.jsonl", {"body": "b"})], field="body")
    assert named.texts == ("b",)


def test_domains_are_found_where_they_are_wanted(llama: Path) -> None:
    """Sequences of two vocabularies, mixed, come apart again."""
    texts = tuple(("abcdefgh" if i // 4 % 2 else "stuvwxyz") * 4 for i in range(24))
    recipe = ridge("router.method=assigned", "router.weights=one", "calibration.tokens=384")
    data = calibration_data(
        small_models.build("llama"),
        recipe,
        CalibrationInput("x", texts=texts),
        directory=llama,
        domains=2,
    )
    assert data.domains is not None
    tokens = torch.cat([batch["input_ids"] for batch in data.batches])  # type: ignore[call-overload]
    has_a = (tokens == small_models.tokenizer()("a").input_ids[0]).any(1).long()
    domain_N = torch.cat(list(data.domains))
    assert domain_N.tolist() in (has_a.tolist(), (1 - has_a).tolist())
    assert 0 < has_a.sum() < len(has_a)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_tensors_in_files(vit: Path, tmp_path: Path, suffix: str) -> None:
    x = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"pixels{suffix}"
    if suffix == ".npz":
        np.savez(path, pixel_values=x.numpy())
    elif suffix == ".pt":
        torch.save({"pixel_values": x}, path)
    else:
        save_file({"pixel_values": x}, path)
    given = ("--calibration", path)
    if suffix == ".pt":
        refused = convert(vit, tmp_path / "out", *given)
        assert "pass --allow-pickle if you trust its source" in refused.stderr
        given = (*given, "--allow-pickle")
    result = convert(vit, tmp_path / "out", *given)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["data"] == f"the tensors of {path.name}"
    assert [row["tokens"] for row in report["calibration"]["layers"]] == [18 * 5] * 2
    assert report["end_to_end"]["inputs"] == "the given inputs"


def test_images_in_a_folder(vit: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        image.new("RGB", (20 + i, 30), (255, 0, 20 * i)).save(folder / f"{i}.png")
    given = read_calibration([str(folder)])
    data = calibration_data(small_models.build("vit"), ridge(), given)
    batch = data.batches[0]
    assert isinstance(batch, dict)
    pixel_values = batch["pixel_values"]
    assert pixel_values.shape[1:] == (3, 16, 16)
    assert pixel_values[0, :, 0, 0].tolist() == pytest.approx([1, -1, 20 / 127.5 - 1])
    (vit / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 8, "width": 16}, "image_mean": [0, 0, 0]})
    )
    other = calibration_data(small_models.build("vit"), ridge(), given, directory=vit).batches[0]
    (vit / "preprocessor_config.json").unlink()
    assert isinstance(other, dict)
    assert other["pixel_values"].shape[2:] == (8, 16)
    assert other["pixel_values"][0, 0, 0, 0] == pytest.approx(2)


def test_a_data_set_on_disk(tmp_path: Path) -> None:
    """The files that ``datasets.save_to_disk`` writes: arrow streams and a list of them."""
    pa = pytest.importorskip("pyarrow")
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    table = pa.table({"body": ["one", "two"], "domain": [3, 4], "n": [1, 2]})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    given = read_calibration([str(tmp_path / "set")], field="body")
    assert given.texts == ("one", "two")
    assert given.domains == ("3", "4")
    with pytest.raises(UsageError, match="has no text column 'text'; its columns are body"):
        read_calibration([str(tmp_path / "set")])
    state["_data_files"][0]["filename"] = "gone"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match="gone cannot be read"):
        read_calibration([str(tmp_path / "set")])


def test_random_inputs_are_called_so(vit: Path, tmp_path: Path) -> None:
    result = convert(vit, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "random inputs, so the numbers mean little" in result.stdout
    assert "random inputs, so the numbers mean little" in (tmp_path / "out/README.md").read_text()


def test_the_report_says_how_the_experts_are_used(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    result = convert(llama, tmp_path / "out", "--calibration", text)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]
    assert found["data"] == "the given text"
    for row in found["layers"]:
        assert row["tokens"] == 256
        assert sum(row["tokens_per_expert"]) == 2 * 256
        assert row["dead_experts"] == row["tokens_per_expert"].count(0)
        assert 0.5 < row["captured_mass"] < 1
    assert "captured mass" in result.stdout
    assert "captured mass" in (tmp_path / "out" / "README.md").read_text()


def test_all_experts_capture_everything() -> None:
    result = upcycle.convert(
        small_models.build("llama"),
        ridge("router.top_k=all"),
        calibration=[{"input_ids": torch.arange(20).reshape(2, 10)}] * 4,
    )
    for row in result.report.calibration.layers:
        assert row.captured_mass == pytest.approx(1, abs=1e-6)
        assert row.load_entropy == pytest.approx(1)
    assert usage.__doc__ is not None


def test_data_in_python() -> None:
    assert given_data("a") == CalibrationInput("the given text", texts=("a",))
    assert given_data(["a", "b"]) == CalibrationInput("the given texts", texts=("a", "b"))
    for wrong in ([], [1], ["a", {}]):
        with pytest.raises(UsageError, match="give a text, several texts, or batches"):
            given_data(wrong)  # type: ignore[arg-type]


def test_the_text_is_all_for_verification_where_nothing_is_calibrated() -> None:
    model = small_models.build("llama")
    recipe = load_recipe("sparse-upcycling")
    assert verification_inputs(model, recipe, CalibrationInput("", texts=(TEXT,)))[0] == TEXT
    held, _ = verification_inputs(model, ridge(), CalibrationInput("", texts=(TEXT,)))
    assert held == TEXT[: len(TEXT) // 4]


BAD: list[tuple[str, bytes, str]] = [
    ("empty.txt", b"", "the text has 0 characters; give at least 800"),
    ("short.txt", b"a few words", "give at least 800"),
    ("latin.txt", "caf\xe9 ".encode("latin-1") * 200, "not a text file in UTF-8"),
    ("latin.jsonl", b'{"text": "\xe9"}', "not a text file in UTF-8"),
    ("no.jsonl", b'{"body": "b", "n": 1}\n', "record 1 has no text 'text'; its texts are body"),
    ("broken.jsonl", b'{"text": "b"}\n{"text"\n', "broken.jsonl:2: not JSON"),
    ("list.jsonl", b"[1]\n", "list.jsonl:1: not a record"),
    ("half.jsonl", b'{"text": "b", "domain": 1}\n{"text": "b"}\n', "record 2 has no `domain`"),
    ("broken.npz", b"PK", "not a file of plain arrays"),
    ("broken.safetensors", b"x", "not a whole safetensors file"),
    ("image.png", b"x", "images, and the model reads input_ids"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD, ids=[name for name, *_ in BAD])
def test_bad_files(name: str, content: bytes, words: str, llama: Path, tmp_path: Path) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    path.write_bytes(content)
    result = convert(llama, out, "--calibration", path)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert str(path) in line or "image.png" in name or "at least 800" in words
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_a_text_for_a_model_of_images(vit: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    result = convert(vit, out, "--calibration", text)
    assert result.exit_code == 2
    assert "a text, and the model reads pixel_values" in result.stderr
    assert not out.exists()


def test_tensors_that_the_model_does_not_read(vit: Path, tmp_path: Path) -> None:
    for tensors, words in (
        ({"pixels": torch.zeros(4, 3)}, "there is no pixel_values among the tensors pixels"),
        ({"pixel_values": torch.zeros(4, 3), "y": torch.zeros(3)}, "counts the examples"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        result = convert(vit, tmp_path / "out", "--calibration", tmp_path / "x.safetensors")
        assert result.exit_code == 2
        assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_domain_that_is_too_short(llama: Path, tmp_path: Path) -> None:
    rows = [{"text": TEXT, "domain": "long"}, {"text": "a b", "domain": "short"}]
    path = records(tmp_path / "x.jsonl", *rows)
    result = convert(llama, tmp_path / "out", "--calibration", path)
    assert result.exit_code == 2
    assert "the text of domain 'short' has less than one sequence of 16 tokens" in result.stderr


def test_a_directory_of_nothing(llama: Path, tmp_path: Path) -> None:
    result = convert(llama, tmp_path / "out", "--calibration", tmp_path)
    assert result.exit_code == 2
    assert "neither images nor a data set" in result.stderr
