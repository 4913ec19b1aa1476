"""PEFT adapters as MODEL: merged into their base, and refused where that cannot be right."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycle.cli.main import main
from upcycle.errors import UpcycleError
from upcycle.models import adapter
from upcycle.models.named import open_model

peft: Any = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks
]
RECIPE = ("--recipe", "sparse-upcycling", "--set", "experts.count=2", "--target", "safetensors")
TOKENS = torch.arange(24).reshape(2, 12)
ALL = ["q_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=ALL, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(target_modules=ALL, use_dora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(
        target_modules=ALL, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=ALL, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=ALL, init_weights=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=ALL, init_weights=False),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=ALL, init_weights=False),
    "head": lambda: peft.LoraConfig(
        target_modules=["up_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    ),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in the working directory, and a cache of our own."""
    monkeypatch.setenv("UPCYCLE_CACHE", str(tmp_path / "made"))
    monkeypatch.chdir(tmp_path)
    small_models.saved("llama", Path("base"), with_tokenizer=True)


def write(kind: str, directory: str = "adapter", base: str = "base") -> torch.Tensor:
    """An adapter, and the logits of its base with it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained("base")
    model.config._name_or_path = base
    wrapped = peft.get_peft_model(model, CONFIGS[kind]()).eval()
    wrapped.save_pretrained(directory)
    change(directory, base_model_name_or_path=base)
    with torch.no_grad():
        found: torch.Tensor = wrapped(input_ids=TOKENS).logits
    return found


def change(directory: str, **fields: object) -> None:
    path = Path(directory) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.load()(input_ids=TOKENS).logits
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_its_base_with_it(kind: str) -> None:
    expected = write(kind)
    scale = expected.abs().max()
    # Merged or beside it: sums of at most 64 products in another order, through two layers.
    assert (logits(open_model("adapter")) - expected).abs().max() < 1e-4 * scale
    assert (logits(open_model("base")) - expected).abs().max() > 1e-2 * scale


def test_a_conversion_from_an_adapter() -> None:
    write("lora")
    for out, options in (("moe", []), ("streamed", ["--stream"])):
        done = run("convert", "adapter", *RECIPE, "--out", out, *options)
        assert done.exit_code == 0, done.output
        assert "merging the adapter" in done.stderr or options
    whole, streamed = (load_file(f"{out}/model.safetensors") for out in ("moe", "streamed"))
    assert all(whole[name].equal(streamed[name]) for name in whole)
    assert Path("moe/tokenizer.json").is_file()
    assert json.loads(Path("moe/report.json").read_text())["model"] == "adapter"
    assert run("verify", "adapter", "moe").exit_code == 0
    assert run("verify", "base", "moe").exit_code == 3
    assert run("inspect", "adapter").exit_code == 0


def test_an_adapter_is_not_written_over() -> None:
    write("lora")
    done = run("convert", "adapter", *RECIPE, "--out", "adapter", "--overwrite")
    assert done.exit_code == 2
    assert "which is in use; choose another --out" in done.stderr
    assert Path("adapter/adapter_config.json").is_file()


def test_experts_from_adapters() -> None:
    write("lora")
    write("dora", "other")
    experts = ("--recipe", "btx", "--set", "experts.count=2")
    sources = "experts.sources=[adapter, other]"
    done = run("convert", "base", *experts, "--set", sources, "--no-verify", "--out", "moe")
    assert done.exit_code == 0, done.output


def test_it_is_merged_once_and_again_after_a_change() -> None:
    first = write("lora")
    source: Any = open_model("adapter")
    assert source.fetched().directory == source.fetched().directory
    assert len(list(Path("made/models").iterdir())) == 1
    weights = load_file("adapter/adapter_model.safetensors")
    save_file({n: 2 * t for n, t in weights.items()}, "adapter/adapter_model.safetensors")
    # twice the update moves the logits by far more than rounding could
    assert (logits(open_model("adapter")) - first).abs().max() > 1e-2 * first.abs().max()


def other_base() -> None:
    small_models.build("llama", 3).save_pretrained("base")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def drop(name: str) -> Callable[[], None]:
    return (Path("adapter") / name).unlink


def pickled() -> None:
    weights = load_file("adapter/adapter_model.safetensors")
    torch.save(weights, "adapter/adapter_model.bin")
    Path("adapter/adapter_model.safetensors").unlink()


def fewer() -> None:
    weights = load_file("adapter/adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), "adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda: change("adapter", base_model_name_or_path="no/where"), "the base of this adapter"),
        (lambda: change("adapter", base_model_name_or_path=None), "which names no model"),
        (lambda: change("adapter", base_model_name_or_path="os:getcwd"), "which names no model"),
        (lambda: change("adapter", base_model_name_or_path="adapter"), "it is no whole model"),
        (lambda: change("adapter", peft_type="PROMPT_TUNING"), "of the kind PROMPT_TUNING"),
        (lambda: change("adapter", peft_type=["LORA"]), "of the kind ['LORA']"),
        (lambda: change("adapter", megatron_core="os", megatron_config={"a": 1}), "Megatron"),
        (lambda: change("adapter", target_modules=["nothing"]), "the adapter does not fit base"),
        (lambda: change("adapter", r=2), "the adapter does not fit base"),
        (other_base, "does not fit base"),
        (fewer, "it lacks base_model"),
        (drop("adapter_model.safetensors"), "it has no adapter_model.safetensors"),
        (pickled, "adapter_model.bin: a pickle file"),
    ],
)
def test_what_is_refused(damage: Callable[[], None], words: str) -> None:
    write("lora")
    damage()
    done = run("convert", "adapter", *RECIPE, "--out", "out")
    assert done.exit_code in (2, 4), done.output
    assert words in done.stderr.splitlines()[-1]
    assert not Path("out").exists()
    assert not any(Path("made").glob("models/*"))


def test_a_pickled_adapter_where_it_is_allowed() -> None:
    expected = write("lora")
    pickled()
    found = logits(open_model("adapter", allow_pickle=True))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_peft_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    write("lora")

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(adapter.importlib, "import_module", missing)
    with pytest.raises(UpcycleError, match="`pip install peft`"):
        open_model("adapter").load()  # type: ignore[union-attr]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    served = hub_server.Hub({"org/base": {"main": tmp_path / "base"}})
    with hub_server.serving(served):
        hub_server.use(served.url, monkeypatch, tmp_path / "cache")
        yield served
        close_session()


def test_an_adapter_of_a_hub_whose_base_is_another_repository(
    hub: hub_server.Hub, tmp_path: Path
) -> None:
    expected = write("lora", base="org/base")
    shutil.move("adapter", "published")
    Path("published/evil.py").write_text("")
    hub.repositories["org/adapter"] = {"main": tmp_path / "published"}
    assert run("plan", "org/adapter", *RECIPE[:4]).exit_code == 0
    assert hub.downloads(".safetensors") == []
    found = logits(open_model("org/adapter"))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert hub.downloads(".safetensors") == ["adapter_model.safetensors", "model.safetensors"]
    assert hub.downloads(".py") == []
    change("published", base_model_name_or_path="org/base", revision="v7")
    hub.repositories["org/other"] = {"main": shutil.copytree("published", tmp_path / "other")}
    with pytest.raises(UpcycleError, match="org/base: it has no revision v7"):
        open_model("org/other")
