"""Quantised directories: dense, native mixtures of experts, and those with their own code."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import native_moes
import pytest
import small_models
import torch
from command_line import run
from remote_case import without_upcycle
from safetensors.torch import save_file

import upcycle
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.rounding import ROUNDING
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.models.moe_layers import moe_layers
from upcycle.operations.quantise import Matrix, Rounded, quantise
from upcycle.routing.contract import routed_layers

EPS = torch.finfo(torch.float32).eps
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
# Experts of these are one stack in their files, and stay.
STACKED = ("GraniteMoe", "GptOss")
OWN = ("opt", "bert", "gpt2")
DENSE = ("llama", "qwen3", "bert", "vit")


def converted(name: str, folder: Path) -> Path:
    """A small model of `name` with experts that differ."""
    small_models.saved(name, folder / "dense", with_tokenizer=name in ("llama", "bert"))
    sets = ("experts.count=4", "router.std=1", "verify.max_relative_error=99")
    made = upcycle.convert(folder / "dense", "drop-upcycling", overrides=sets)
    made.save(folder / "moe", targets=("safetensors",))
    return folder / "moe"


def directory(kind: str, folder: Path, **changes: Any) -> Path:
    form, _, name = kind.rpartition("-")
    if form == "own":
        return converted(name, folder)
    if form == "dense":
        return small_models.saved(name, folder / "dense")
    native_moes.native(name, **changes).save_pretrained(folder / "native")
    return folder / "native"


def rounded(source: Path, out: Path, bits: int = 8, **options: Any) -> tuple[Any, Rounded]:
    """The model with rounded floats, which is also written."""
    model: Any = upcycle.load(source)
    found = quantise(model, bits, **{"min_group": 16, **options})
    model.save_pretrained(out)
    found.write(out)
    return model, found


def differences(model: Any, again: Any) -> list[str]:
    """The parameters of `model` that `again` has not, to the bit."""
    theirs = dict(again.named_parameters())
    return [name for name, p in model.named_parameters() if not torch.equal(theirs[name].to(p), p)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


KINDS = [*native_moes.FAMILIES, *(f"own-{n}" for n in OWN), *(f"dense-{n}" for n in DENSE)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_rounded(kind: str, bits: int, tmp_path: Path) -> None:
    source = directory(kind, tmp_path)
    model, found = rounded(source, tmp_path / "out", bits, alpha=0.95)
    again: Any = upcycle.load(tmp_path / "out")
    assert differences(model, again) == []
    assert differences(upcycle.load(source), again) != []
    assert {matrix.bits for matrix in found.matrices} == {bits}
    for matrix in found.matrices:
        assert 0 < matrix.relative < 1
        assert matrix.steps <= 0.5 + 2**bits * EPS
    stacks = {n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n}
    experts = [matrix for matrix in found.matrices if ".experts." in matrix.name]
    assert bool(stacks) == bool(moe_layers(model))
    assert {n for n in found.kept if ".experts." in n} == (stacks if kind in STACKED else set())
    assert bool(experts) == (bool(stacks) and kind not in STACKED)
    assert len({matrix.group for matrix in experts if matrix.group < matrix.shape[1]}) <= 1


def predicted(matrix: Matrix, dtype: torch.dtype) -> int:
    """Bytes: whole words of numbers in each row, a scale for each group, and the shape."""
    rows, columns = matrix.shape
    words = math.ceil(columns * matrix.bits / 32)
    return rows * (words * 4 + columns // matrix.group * dtype.itemsize) + 2 * 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "own-bert"])
def test_files_have_the_size_that_was_predicted(kind: str, bits: int, tmp_path: Path) -> None:
    source = directory(kind, tmp_path)
    model, found = rounded(source, tmp_path / "out", bits, alpha=1)
    tensors = read_tensors(tmp_path / "out")
    packed = sum(predicted(matrix, model.dtype) for matrix in found.matrices)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert packed == sum(n for name, n in sizes.items() if ".weight_" in name)
    before = {name: tensor.nbytes for name, tensor in read_tensors(source).items()}
    elements = sum(m.shape[0] * m.shape[1] for m in found.matrices)
    left = sum(n for name, n in sizes.items() if ".weight_" not in name)
    assert sum(before.values()) == left + elements * 4


ALONE = """
folder = Path(sys.argv[1])
example = load_file(folder / "example.safetensors")
auto = getattr(transformers, sys.argv[2])
model = auto.from_pretrained(folder / "out", trust_remote_code=True).eval()
print(json.dumps(relative(floats(model, {"input_ids": example["ids"]}), example["expected"])))
"""


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("Qwen3Moe", "AutoModelForCausalLM"),
        ("dense-llama", "AutoModelForCausalLM"),
        ("own-bert", "AutoModelForMaskedLM"),
    ],
)
def test_transformers_loads_it_alone(kind: str, auto: str, tmp_path: Path) -> None:
    model, _ = rounded(directory(kind, tmp_path), tmp_path / "out", 4)
    expected = {"ids": IDS, "expected": logits(model).double()}
    save_file(expected, tmp_path / "example.safetensors")
    assert without_upcycle(ALONE, tmp_path, auto) <= ROUNDING[torch.float32]


def test_eight_bits_move_logits_by_less_than_a_hundredth(tmp_path: Path) -> None:
    """Of layers as they are drawn for training, where the residual stream is most of the output."""
    torch.manual_seed(0)
    small_models.llama(initializer_range=0.02).save_pretrained(tmp_path / "dense")
    before = logits(upcycle.load(tmp_path / "dense"))
    moved = {}
    for bits in (8, 4):
        model, _ = rounded(tmp_path / "dense", tmp_path / str(bits), bits)
        moved[bits] = float((logits(model) - before).abs().max() / before.abs().max())
    assert 0 < moved[8] <= 1e-2
    assert moved[4] > 4 * moved[8]  # its steps are 18 times as long


@pytest.mark.parametrize("kind", ["Mixtral", "HunYuanMoEV1", "own-opt"])
def test_routers_choose_the_same_of_the_same_tokens(kind: str, tmp_path: Path) -> None:
    source = directory(kind, tmp_path)
    rounded(source, tmp_path / "out", 4)
    x_TD = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(1))
    pairs = zip(*(routed_layers(upcycle.load(d)) for d in (source, tmp_path / "out")), strict=True)
    for before, after in pairs:
        assert differences(before.router, after.router) == []
        inputs = x_TD[0] if kind == "own-opt" else x_TD
        with torch.no_grad():
            old, new = before.router(inputs), after.router(inputs)
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b)


def test_experts_that_no_group_divides_stay_in_stacks(tmp_path: Path) -> None:
    """Of a quantised directory transformers reads no expert by itself that is not packed."""
    source = directory("Mixtral", tmp_path, intermediate_size=40)  # 8 * 5
    model, found = rounded(source, tmp_path / "out", 4, alpha=0.95)
    reasons = {r for name, r in found.kept.items() if "experts" in name}
    assert reasons == {"rows of 40, which no group from 16 on divides"}
    files = read_tensors(tmp_path / "out")
    assert sum(name.endswith("experts.down_proj") for name in files) == 2
    assert differences(model, upcycle.load(tmp_path / "out")) == []
    _, by_rows = rounded(source, tmp_path / "rows", 4, alpha=0)
    assert not any("experts" in name for name in by_rows.kept)
    assert {matrix.group for matrix in by_rows.matrices} == {32, 40}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 5}, "bits: 5: choose 8 or 4"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"min_group": 48}, "min_group: 48: choose a power of two"),
        ({"min_group": 8}, "min_group: 8: choose a power of two from 16 on"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, said: str) -> None:
    model = small_models.build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match=said):
        quantise(model, **options)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_model_without_linear_maps_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"nothing of it can be rounded.*Conv1D"):
        quantise(small_models.build("gpt2"))


# The command


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native mixture of experts with a tokenizer."""
    folder = tmp_path_factory.mktemp("qwen3") / "moe"
    native_moes.native("Qwen3Moe", vocab_size=300).save_pretrained(folder)
    small_models.tokenizer().save_pretrained(folder)
    return folder


def test_the_road_of_a_user(qwen3_moe: Path, tmp_path: Path) -> None:
    """The errors of all matrices, in a table and as data, and the distance of the outputs."""
    options = ("--alpha", 1, "--min-group", 16)
    command = ("quantise", qwen3_moe, "--bits", 4, *options)
    data = json.loads(run(*command, "--out", tmp_path / "out", "--json").stdout)
    names = [row["name"] for row in data["matrices"]]
    assert names.count("model.layers.1.mlp.experts.7.down_proj") == 1
    assert len(names) == len(set(names)) == 2 * (4 + 3 * 8)
    assert {row["group"] for row in data["matrices"]} == {16}
    assert set(data["kept"].values()) == {"a router", "an embedding or the head"}
    assert data["bytes_after"] < data["bytes_before"] * 0.6  # half of it is no matrix or header
    assert data["distance"]["language_model"]["converted_perplexity"] > 1
    shown = run(*command, "--out", tmp_path / "again").stdout
    assert "model.layers.{0..1}.mlp.experts.{0..7}.down_proj" in shown
    assert "Not rounded: an embedding or the head (2); a router (2)." in shown
    assert "Perplexity" in shown
    for again in ("trace", "inspect"):
        more = ("--out", tmp_path / "t.npz", "--length", 16) if again == "trace" else ()
        assert run(again, tmp_path / "out", *more).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("quantise", "NOWHERE", "--bits", 8), 2, "there is no such directory"),
        (("quantise", "MOE", "--bits", 5), 2, "'5' is not one of"),
        (("quantise", "MOE", "--bits", 8, "--min-group", 48), 2, "'48' is not one of"),
        (("quantise", "MOE", "--bits", 8, "--alpha", 2), 2, "not in the range 0<=x<=1"),
        (("quantise", "QUANTISED", "--bits", 8), 4, "are quantised (compressed-tensors)"),
        (("prune", "QUANTISED", "--keep", 4), 4, "are quantised (compressed-tensors)"),
        (
            ("convert", "QUANTISED", "--recipe", "split-all"),
            4,
            "are quantised (compressed-tensors)",
        ),
        (
            ("quantise", "T5", "--bits", 8),
            4,
            "transformers cannot load what is made of it: 'Linear'",
        ),
        (("quantise", "PLAIN", "--bits", 8), 4, "no config.json is here"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: tuple[Any, ...], code: int, said: str, qwen3_moe: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / name.lower() for name in ("NOWHERE", "QUANTISED", "T5", "PLAIN")}
    places["PLAIN"].mkdir()
    if "T5" in arguments:
        small_models.saved("t5", places["T5"])
    if "QUANTISED" in arguments:
        rounded(qwen3_moe, places["QUANTISED"])
    given = ({**places, "MOE": qwen3_moe}.get(a, a) for a in arguments)
    ended = run(*given, "--out", tmp_path / "out", code=code)
    assert said in ended.stderr
    assert "Traceback" not in ended.output
    assert not (tmp_path / "out").exists()


def test_the_package_is_asked_for_by_its_name(
    qwen3_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    ended = run("quantise", qwen3_moe, "--bits", 8, "--out", tmp_path / "out", code=2)
    assert "pip install compressed-tensors" in ended.stderr
    assert not (tmp_path / "out").exists()
