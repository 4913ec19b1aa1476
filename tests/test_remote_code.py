"""A written directory with its own code works where upcycle is not installed.

The directories are written here, and opened in one other process in which ``import upcycle`` fails.
"""

import ast
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner
from remote_case import without_upcycle
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from upcycle.cli.main import main
from upcycle.conversion.api import convert
from upcycle.data.verification_inputs import evaluation_for, outputs_of
from upcycle.layers.routers import ROUTER_KINDS
from upcycle.targets.remote_code import auto_classes, modeling_text

RECIPES = {
    "bert": "split-all",
    "gpt2": "sparse-upcycling",
    "vit": "granular",
    "t5": "sparse-upcycling",
    "whisper": "dynamic-dino",
    "opt": "moefication",
    "llama": "moefication",
}
GENERATING = ("gpt2", "t5", "opt", "llama")

# Run with the folder as the argument; prints one JSON object with what was found for each model.
ELSEWHERE = """
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    about = json.loads((folder / "about.json").read_text())
    auto = getattr(transformers, about["auto"])
    example = load_file(folder / "example.safetensors")
    expected = example.pop("expected")
    result = found[folder.name] = {}
    try:
        auto.from_pretrained(folder / "moe", trust_remote_code=False)
    except ValueError as error:
        result["without trust"] = "trust_remote_code" in str(error)
    model = auto.from_pretrained(folder / "moe", trust_remote_code=True).eval()
    result["class"] = type(model).__name__
    result["error"] = relative(floats(model, example), expected)
    if about["generates"]:
        prompt = {k: v[:1] for k, v in example.items() if k == "input_ids"}
        tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        result["generated"] = tokens.shape[1]
    model.save_pretrained(folder / "again")
    again = auto.from_pretrained(folder / "again", trust_remote_code=True).eval()
    result["saved again"] = relative(floats(again, example), expected)
    half = auto.from_pretrained(folder / "moe", trust_remote_code=True, dtype=torch.bfloat16)
    types = {str(p.dtype) for n, p in half.named_parameters() if ".router." in n}
    types |= {str(b.dtype) for n, b in half.named_buffers() if ".router." in n}
    result["router"] = sorted(types)
    names = [n for n, p in half.named_parameters() if ".experts." in n]
    result["experts"] = sorted({str(half.get_parameter(n).dtype) for n in names})
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in example.items()}
    result["bfloat16"] = relative(floats(half.eval(), halves), expected)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    out = model(**example)
    (out.logits if "logits" in out else out[0]).float().pow(2).mean().backward()
    optimizer.step()
    result["trained"] = sum(not torch.equal(before[n], model.get_parameter(n)) for n in names)
    result["trainable"] = len(names)
print(json.dumps(found))
"""


def write(name: str, folder: Path) -> None:
    dense = small_models.build(name)
    done = convert(dense, RECIPES[name], verify=False)
    done.save(folder / "moe", verify=False)
    inputs: Any = evaluation_for(dense).batches[0]
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    outputs = outputs_of(done.model, inputs)
    tensors["expected"] = outputs["logits"].double()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "example.safetensors")
    about = {"auto": auto_classes(dense)[0], "generates": name in GENERATING}
    (folder / "about.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in RECIPES:
        (folder / name).mkdir()
        write(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    """What another process found, by model."""
    results: dict[str, dict[str, Any]] = without_upcycle(ELSEWHERE, folder)
    return results


@pytest.mark.parametrize("name", RECIPES)
def test_it_computes_the_same(name: str, found: dict[str, dict[str, Any]]) -> None:
    """The same operations on the same numbers: only the order of threads may differ."""
    assert found[name]["class"].startswith("Upcycle")
    assert found[name]["error"] < 1e-6


@pytest.mark.parametrize("name", RECIPES)
def test_without_trust_it_does_not_load(name: str, found: dict[str, dict[str, Any]]) -> None:
    """It must never load as the dense class with fresh weights and a warning."""
    assert found[name]["without trust"] is True


@pytest.mark.parametrize("name", GENERATING)
def test_it_generates(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["generated"] > 1


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_saved_and_loaded_again(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["saved again"] < 1e-6


@pytest.mark.parametrize("name", RECIPES)
def test_in_bfloat16_the_router_stays_in_float32(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[name]["router"] == ["torch.float32"]
    assert found[name]["experts"] == ["torch.bfloat16"]
    if RECIPES[name] != "moefication":  # there a token near the border changes its expert
        assert found[name]["bfloat16"] < 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_moves_the_experts(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["trained"] == found[name]["trainable"] > 0


def test_the_same_class_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    write("bert", tmp_path / "bert")
    names = sorted(p.name for p in (tmp_path / "bert" / "moe").iterdir())
    assert "modeling_upcycle.py" in names
    for name in names:
        first, second = (root / "bert" / "moe" / name for root in (folder, tmp_path))
        assert first.read_bytes() == second.read_bytes(), name


def test_the_file_does_not_mention_upcycle_in_an_import(folder: Path) -> None:
    for name in RECIPES:
        text = (folder / name / "moe" / "modeling_upcycle.py").read_text()
        lines = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert lines
        assert not any("upcycle" in line for line in lines)


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def clashes(text: str) -> list[str]:
    """Top-level names of a module that mean two things; the same import twice is one."""
    origins: dict[str, set[object]] = defaultdict(set)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            origins[node.name].add(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            home = getattr(node, "module", None)
            for alias in node.names:
                origins[alias.asname or alias.name].add((home, alias.name))
        else:
            inner = [n.generators for n in ast.walk(node) if isinstance(n, COMPREHENSIONS)]
            own = {id(name) for loops in inner for loop in loops for name in ast.walk(loop.target)}
            stored = [n for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in own]
            for name in stored:
                if isinstance(name.ctx, ast.Store):
                    origins[name.id].add(node)
    return sorted(name for name, found in origins.items() if len(found) > 1)


def test_no_two_files_that_become_one_share_a_name() -> None:
    """Two constants of one name, each right in its own file, would be one here: the later."""
    dense = {"AutoModel": BertModel, "AutoModelForMaskedLM": BertForMaskedLM}
    sites = [{"layer": {"router": {"kind": kind}}} for kind in ROUTER_KINDS]
    text = modeling_text(BertConfig, dense, sites)
    assert all(f"class {router.__name__}" in text for router in ROUTER_KINDS.values())
    assert clashes(text) == []
    for again in ("ROUTER_KINDS", "TableRouter", "BertModel", "F"):
        assert clashes(f"{text}\n{again} = 1\n") == [again]
    assert clashes(f"{text}\nA_NEW_NAME = 1\n") == []


@pytest.mark.parametrize("tied", [True, False])
def test_tied_stays_tied_and_untied_untied(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = small_models.llama(tie_word_embeddings=tied).eval()
    if not tied:  # equal numbers in one memory, and a config that says they are two tensors
        dense.lm_head.weight = dense.model.embed_tokens.weight
    for recipe, form in (("moefication", "upcycle_llama"), ("sparse-upcycling", "mixtral")):
        out = tmp_path / form
        convert(dense, recipe, verify=False).save(out, verify=False)
        config = json.loads((out / "config.json").read_text())
        assert config["model_type"] == form
        assert config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        head, embedding = loaded.lm_head.weight, loaded.model.embed_tokens.weight
        assert (head.data_ptr() == embedding.data_ptr()) is tied
        assert torch.equal(head, dense.lm_head.weight)


MODEL_FILE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class TinyConfig(PreTrainedConfig):
    model_type = "tiny_of_a_test"
    def __init__(self, width=16, **kwargs):
        self.width = width
        super().__init__(**kwargs)

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    main_input_name = "x"
    def __init__(self, config):
        super().__init__(config)
        self.up = nn.Linear(config.width, 32)
        self.down = nn.Linear(32, config.width)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, x):
        return {"hidden": self.down(torch.relu(self.up(x)))}
"""


def test_a_dense_model_that_brings_its_own_code(tmp_path: Path) -> None:
    """Its file is copied, and the new file takes the dense class from it."""
    dense, out = tmp_path / "dense", tmp_path / "moe"
    dense.mkdir()
    (dense / "modeling_tiny.py").write_text(MODEL_FILE)
    auto_map = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    config = {"model_type": "tiny_of_a_test", "width": 16, "auto_map": auto_map}
    (dense / "config.json").write_text(json.dumps(config | {"architectures": ["TinyModel"]}))
    g = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (32, 16), "up.bias": (32,), "down.weight": (16, 32), "down.bias": (16,)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    arguments = ["convert", str(dense), "--recipe", "sparse-upcycling", "--out", str(out)]
    arguments += ["--target", "safetensors"]

    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "brings its own Python code; pass --trust-remote-code" in refused.stderr

    done = CliRunner().invoke(main, [*arguments, "--trust-remote-code"])
    assert done.exit_code == 0, done.stderr
    x = torch.randn(2, 3, 16, generator=g)
    hidden = torch.relu(x @ tensors["up.weight"].t() + tensors["up.bias"])
    expected = hidden @ tensors["down.weight"].t() + tensors["down.bias"]
    loaded = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__name__ == "UpcycleTinyModel"
    assert loaded.config.model_type == "upcycle_own_tiny_of_a_test"  # not one that upcycle knows
    error = (loaded(x)["hidden"] - expected).abs().max() / expected.abs().max()
    assert error < 1e-6
