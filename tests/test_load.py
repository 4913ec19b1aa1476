"""`upcycle.load` gives back what was saved, in every form and whatever happened in between."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner
from torch import nn

import upcycle
from upcycle.cli.main import main
from upcycle.conversion.api import Conversion, convert
from upcycle.errors import UsageError
from upcycle.layers.moe import MoE
from upcycle.targets.checkpoint import planned_layers

EMOE = ["layers.skip_first=0", "layers.every=1", "experts.count=8", "router.top_k=4"]
FORMS = [
    ("llama", "sparse-upcycling", "MixtralForCausalLM"),
    ("qwen3", "granular", "Qwen3MoeForCausalLM"),
    ("llama", "factorllm", "UpcycleLlamaForCausalLM"),
    ("bert", "split-all", "UpcycleBertForMaskedLM"),
    ("t5", "granular", "UpcycleT5ForConditionalGeneration"),
]


def trained(done: Conversion) -> nn.Module:
    """The converted model with every parameter moved, as training would, all different."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in done.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * 0.05)
    return done.model


def assert_same_function(loaded: nn.Module, model: nn.Module, bound: float = 1e-5) -> None:
    with torch.no_grad():
        assert upcycle.verify(model, loaded).relative <= bound


@pytest.mark.parametrize(("name", "recipe", "cls"), FORMS)
def test_a_trained_model_keeps_its_values(name: str, recipe: str, cls: str, tmp_path: Path) -> None:
    done = convert(small_models.build(name), recipe, verify=False)
    model = trained(done)
    done.save(tmp_path / "moe")
    loaded = upcycle.load(tmp_path / "moe")
    assert type(loaded).__name__ == cls
    assert not loaded.training
    assert_same_function(loaded, model)
    assert upcycle.verify(done.dense, loaded).relative > 1e-3, "the dense model came back"
    if cls.startswith("Upcycle"):
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_model_that_was_trained_by_the_optimizer(tmp_path: Path) -> None:
    """Distinct experts reach the native architecture in their own places."""
    done = convert(small_models.build("llama"), "sparse-upcycling", verify=False)
    model = done.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(0, 300, (4, 16), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (_, layer), _ = planned_layers(model, done.plan)
    assert not torch.equal(layer.experts.down_proj[0], layer.experts.down_proj[1])
    done.save(tmp_path / "moe")
    assert model.training
    assert_same_function(upcycle.load(tmp_path / "moe"), model)


@pytest.mark.parametrize(("name", "recipe", "cls"), FORMS)
def test_a_model_that_was_cast(name: str, recipe: str, cls: str, tmp_path: Path) -> None:
    done = convert(small_models.build(name), recipe, verify=False)
    done.model.to(torch.bfloat16)
    done.save(tmp_path / "moe", verify=False)
    loaded = upcycle.load(tmp_path / "moe")
    assert type(loaded).__name__ == cls
    types = {key: value.dtype for key, value in loaded.state_dict().items()}
    routers = {t for key, t in types.items() if ".router." in key}
    assert routers <= {torch.float32}
    assert {t for key, t in types.items() if ".router." not in key} == {torch.bfloat16}
    state = loaded.state_dict()
    for key, value in done.model.state_dict().items():
        if key in state:
            assert torch.equal(state[key], value.to(state[key].dtype)), key


def test_a_callable_that_a_file_names_is_not_called(tmp_path: Path) -> None:
    out = tmp_path / "moe"
    arguments = ["convert", "small_models:plain", "--recipe", "split-all", "--out", str(out)]
    done = CliRunner().invoke(main, [*arguments, "--target", "safetensors"])
    assert done.exit_code == 0, done.stderr
    with pytest.raises(UsageError, match=r"the dense model \(small_models:plain\) as `model`"):
        upcycle.load(out)
    loaded = upcycle.load(out, small_models.plain())
    assert isinstance(loaded, small_models.Plain)
    assert isinstance(loaded.ffns[0], MoE)
    assert_same_function(loaded, small_models.plain())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_module_with_a_given_model(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = small_models.plain().to(dtype)
    done = convert(dense, "emoe", overrides=EMOE)
    model = trained(done)
    done.save(tmp_path / "moe")
    with pytest.raises(
        UsageError, match=r"give upcycle.load the dense model \(small_models.Plain\) as `model`"
    ):
        upcycle.load(tmp_path / "moe")
    given = small_models.Plain()
    loaded = upcycle.load(tmp_path / "moe", given)
    assert loaded is given
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert loaded.state_dict()[key].dtype == value.dtype


def test_the_router_of_a_module_stays_in_float32(tmp_path: Path) -> None:
    done = convert(small_models.plain().bfloat16(), "sparse-upcycling", verify=False)
    done.save(tmp_path / "moe", verify=False)
    loaded: Any = upcycle.load(tmp_path / "moe", small_models.Plain())
    assert loaded.ffns[0].router.weight.dtype == torch.float32
    assert loaded.ffns[0].experts.down_proj.dtype == torch.bfloat16


def test_a_module_of_another_shape(tmp_path: Path) -> None:
    convert(small_models.plain(), "split-all", verify=False).save(tmp_path / "moe", verify=False)
    with pytest.raises(UsageError, match="not those of a Plain"):
        upcycle.load(tmp_path / "moe", small_models.Plain(width=8))
    with pytest.raises(UsageError, match="not those of a WithoutFFN"):
        upcycle.load(tmp_path / "moe", small_models.without_ffn())


@pytest.mark.parametrize(("name", "file"), [("plain", "upcycle.json"), ("bert", "config.json")])
def test_a_layer_of_a_later_version(name: str, file: str, tmp_path: Path) -> None:
    dense = small_models.plain() if name == "plain" else small_models.build(name)
    convert(dense, "split-all", verify=False).save(tmp_path / "moe", verify=False)
    path = tmp_path / "moe" / file
    data = json.loads(path.read_text())
    described = data["upcycle"] if name == "bert" else data
    described["sites"][0]["layer"]["router"]["depth"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=r"layer\.router has `depth`, which is unknown; read it"):
        upcycle.load(tmp_path / "moe", dense)


def test_a_directory_that_upcycle_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither config\.json nor upcycle\.json"):
        upcycle.load(tmp_path)


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "split-all"])
def test_files_that_do_not_fit_are_not_loaded_with_a_warning(recipe: str, tmp_path: Path) -> None:
    convert(small_models.build("llama"), recipe, verify=False).save(tmp_path / "moe", verify=False)
    for name, change in {
        "shape": {"vocab_size": 299},
        "missing": {"num_hidden_layers": 3},
    }.items():
        broken = Path(shutil.copytree(tmp_path / "moe", tmp_path / name))
        config = json.loads((broken / "config.json").read_text())
        if "upcycle" in config and name == "missing":
            config["upcycle"]["sites"].pop()
        (broken / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UsageError, match=name):
            upcycle.load(broken)


def test_loading_is_silent_and_leaves_the_settings_of_transformers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(small_models.build("llama"), "granular", verify=False).save(
        tmp_path / "moe", verify=False
    )
    log: Any = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    capfd.readouterr()
    upcycle.load(tmp_path / "moe")
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_a_conversion_can_be_saved_twice(tmp_path: Path) -> None:
    done = convert(small_models.build("bert"), "split-all")
    done.save(tmp_path / "a")
    first = list(done.report.checks)
    done.save(tmp_path / "b")
    assert [c.what for c in done.report.checks] == [c.what for c in first]


def test_rows_that_grouped_mm_refuses(tmp_path: Path) -> None:
    """transformers' default kernel wants rows of a multiple of 16 bytes; ours does not."""
    torch.manual_seed(0)
    dense = small_models.llama(intermediate_size=66).eval()
    done = convert(dense, "sparse-upcycling")
    done.save(tmp_path / "moe")
    loaded = upcycle.load(tmp_path / "moe")
    assert type(loaded).__name__ == "UpcycleLlamaForCausalLM"
    assert "multiples of 4" in done.report.checkpoint.not_native_because["mixtral"]
    assert_same_function(loaded, dense)
