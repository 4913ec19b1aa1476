"""Where upcycle is installed its own classes load a converted model, and no trust flag is needed.

This process has imported upcycle, so the Auto classes know it; what has to be seen before that is
seen in another process.
"""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import remote_models
import small_models
import torch
import transformers
from click.testing import CliRunner
from remote_case import BEFORE, python, without_upcycle
from safetensors.torch import save_file

from upcycle import auto_classes as auto
from upcycle.cli.main import main
from upcycle.conversion.api import convert
from upcycle.errors import UsageError
from upcycle.targets.load import load
from upcycle.util.quiet import quiet_transformers

t: Any = transformers

# As for the written files: the same operations on the same numbers, in another order of threads.
BOUND = 1e-6
IDS = torch.arange(3, 13).reshape(2, 5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted BERT whose own Python file must not be run."""
    folder = tmp_path_factory.mktemp("bert")
    convert(remote_models.build("bert-masked"), "split-all", verify=False).save(
        folder / "moe", verify=False
    )
    (folder / "moe" / "modeling_upcycle.py").write_text("raise SystemExit('it was run')")
    return folder / "moe"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)[0].double()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def opened(auto: str, directory: Path, **options: Any) -> Any:
    with quiet_transformers():
        return getattr(t, auto).from_pretrained(directory, **options)


@pytest.mark.parametrize("flag", [None, False, True])
def test_the_classes_of_upcycle_load_it(flag: bool | None, bert: Path) -> None:
    model = opened("AutoModelForMaskedLM", bert, trust_remote_code=flag)
    assert type(model).__name__ == "UpcycleBertForMaskedLM"
    assert type(model).__module__ == "upcycle.auto_classes"
    expected = logits(remote_models.build("bert-masked"))
    assert relative(logits(model), expected) <= BOUND


def test_upcycle_load_does_not_run_the_file(bert: Path) -> None:
    assert type(load(bert)).__module__ == "upcycle.auto_classes"


def test_other_heads_load_for_finetuning(bert: Path) -> None:
    base = opened("AutoModel", bert)
    dense = remote_models.build("bert-masked").bert
    assert relative(logits(base), logits(dense)) <= BOUND
    classifier = opened("AutoModelForSequenceClassification", bert, num_labels=3)
    assert classifier(IDS).logits.shape == (2, 3)
    assert relative(classifier.eval().bert(IDS)[0].double(), logits(dense)) <= BOUND


def test_the_classes_survive_pickle_and_copies(bert: Path) -> None:
    model = opened("AutoModelForMaskedLM", bert)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))


def test_what_is_saved_from_here_loads_without_upcycle(bert: Path, tmp_path: Path) -> None:
    """The Python file is written again, for the head that was saved."""
    model = opened("AutoModelForSequenceClassification", bert, num_labels=3)
    model.save_pretrained(tmp_path / "saved")
    save_file({"ids": IDS, "expected": logits(model)}, tmp_path / "example.safetensors")
    code = """
folder = Path(sys.argv[1])
example = load_file(folder / "example.safetensors")
auto = transformers.AutoModelForSequenceClassification
model = auto.from_pretrained(folder / "saved", trust_remote_code=True).eval()
error = relative(floats(model, {"input_ids": example["ids"]}), example["expected"])
print(json.dumps([type(model).__name__, error]))
"""
    name, error = without_upcycle(code, tmp_path)
    assert name == "UpcycleBertForSequenceClassification"
    assert error <= BOUND


@pytest.mark.parametrize("first", ["upcycle", "transformers"])
def test_it_does_not_matter_what_is_imported_first(first: str, bert: Path) -> None:
    second = "transformers" if first == "upcycle" else "upcycle"
    code = f"""
import json, sys
import {first}
early = [name for name in ("torch", "transformers") if name in sys.modules]
import {second}
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1])
print(json.dumps([early, type(model).__module__]))
"""
    early, home = python(code, bert)
    assert home == "upcycle.auto_classes"
    assert first == "transformers" or not early  # `import upcycle` waits for neither


def test_a_newer_format_is_refused(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    config = json.loads((bert / "config.json").read_text())
    config["upcycle"].update(format=2, version="99.0")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"upcycle 99.0 wrote it in format 2, and this code reads"):
        opened("AutoModelForMaskedLM", tmp_path)
    with pytest.raises(UsageError, match=r"upcycle 99.0 wrote it in format 2"):
        load(tmp_path)


def test_a_head_without_the_layers_is_refused(bert: Path, tmp_path: Path) -> None:
    config = opened("AutoConfig", bert)
    config.upcycle["sites"][0]["contraction"] = "bert.encoder.layer.9.output.dense"
    with pytest.raises(ValueError, match=r"has no bert.encoder.layer.9.output.dense, where"):
        t.AutoModelForMaskedLM.from_config(config)


def test_unknown_model_types_stay_unknown() -> None:
    assert "upcycle_bert" in t.CONFIG_MAPPING
    for unknown in ("upcycle_nothing", "upcycle_own_bert", "nothing"):
        assert unknown not in t.CONFIG_MAPPING
        with pytest.raises(KeyError):
            t.CONFIG_MAPPING[unknown]


def test_registering_twice_is_registering_once() -> None:
    before = t.CONFIG_MAPPING._extra_content
    auto.register()
    assert t.CONFIG_MAPPING._extra_content is before


def test_tokenizers_and_processors_are_those_of_the_dense_model(tmp_path: Path) -> None:
    """Also where only the dense model type says which: with upcycle, without it, without trust."""
    for name in ("bert", "vit"):
        small_models.build(name).save_pretrained(tmp_path / name)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(295))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    size = {"height": 16, "width": 16}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    expected = {}
    for name, kind in (("bert", "AutoTokenizer"), ("vit", "AutoImageProcessor")):
        out = tmp_path / f"{name}-moe"
        arguments = ["convert", str(tmp_path / name), "--recipe", "split-all", "--out", str(out)]
        done = CliRunner().invoke(main, [*arguments, "--no-verify", "--target", "safetensors"])
        assert done.exit_code == 0, done.stderr
        expected[kind] = type(opened(kind, tmp_path / name)).__name__
        assert type(opened(kind, out)).__name__ == expected[kind]
    code = """
found = {}
for name, auto in (("bert", "AutoTokenizer"), ("vit", "AutoImageProcessor")):
    made = getattr(transformers, auto).from_pretrained(
        Path(sys.argv[1]) / f"{name}-moe", trust_remote_code=True
    )
    found[auto] = type(made).__name__
print(json.dumps(found))
"""
    assert python(BEFORE + code, tmp_path) == expected


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/custom-code.md, with a small model in the place of MiniLM."""
    monkeypatch.chdir(tmp_path)
    dense = t.BertModel(t.BertConfig(**remote_models.TEXT)).eval()
    convert(dense, "sparse-upcycling", verify=False).save("minilm-code", verify=False)
    small_models.tokenizer().save_pretrained("minilm-code")
    page = Path(__file__).parents[1] / "docs" / "custom-code.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    namespace: dict[str, Any] = {}
    with quiet_transformers():
        for block in blocks:
            exec(compile(block, page.name, "exec"), namespace)
    assert namespace["classifier"].num_labels == 3
    assert len(namespace["out"].router_logits) == 2


def test_the_page_lists_every_architecture_that_is_tested() -> None:
    page = (Path(__file__).parents[1] / "docs" / "custom-code.md").read_text().lower()
    names = {re.split(r"(?=For|Model)", name)[0] for name, _, _ in remote_models.MODELS.values()}
    for name in names:
        plain = name.removesuffix("LMHead").removesuffix("Encoder").lower()
        assert plain in re.sub(r"[- ]", "", page.replace("gpt-2", "gpt2")), name
