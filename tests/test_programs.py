"""Programs of `torch.export` and other graphs of torch.fx: found by their nodes, and rewritten."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import zoo
import zoo_blocks
from command_line import run
from torch import fx, nn
from torch.nn import functional as F
from zoo_facts import SPLIT_ALL
from zoo_programs import converted, exported, model_and_inputs

import upcycle
from upcycle.errors import UnsupportedError
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.moe import MoE

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each: module, siblings, inline, shared by several layers, convolutions, two stacks,
# functional, called several times.
NAMES = (
    *("bert", "albert", "llama", "phi3", "opt", "convnext", "encoder"),
    *("functional", "interleaved", "matmul", "sequential", "conv", "called_twice", "placed_twice"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_converts_as_its_module(name: str) -> None:
    found = converted(name)
    assert not found.missing
    assert not found.unequal
    assert found.error <= ROUNDING[torch.float32]
    graph = found.indirect.model
    assert isinstance(graph, fx.GraphModule)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    layers = [node for node in calls if isinstance(graph.get_submodule(str(node.target)), MoE)]
    assert len({node.target for node in layers}) == zoo.ZOO[name].ffns
    left = {parameter for spec in found.indirect.plan.specs for parameter in spec.ffn.parameters}
    assert left.isdisjoint(dict(graph.named_parameters()))


@pytest.mark.parametrize("name", ["phi3", "distilbert", "convnext"])
def test_the_operations_that_torch_decomposes_into_are_known(name: str) -> None:
    program = exported(*model_and_inputs(name)).run_decompositions()
    found = converted(name, program)
    assert not found.missing
    assert not found.unequal
    assert found.error <= ROUNDING[torch.float32]


def test_another_batch_and_another_length() -> None:
    found = converted("llama")
    ids = torch.randint(0, zoo.VOCABULARY, (3, 11))
    text = {**dict(found.inputs), "input_ids": ids}
    text |= {"attention_mask": torch.ones_like(ids)} if "attention_mask" in text else {}
    with torch.no_grad():
        expected, actual = zoo.run(found.model, text), zoo.run(found.indirect.model, text)
    assert (actual - expected).abs().max() <= ROUNDING[torch.float32] * expected.abs().max()


def test_the_program_and_its_graph_are_left_alone() -> None:
    model, inputs = model_and_inputs("gpt2")
    program = exported(model, inputs)
    before, code = zoo.run(program.module(), inputs), program.graph_module.code
    upcycle.convert(program, SPLIT_ALL, verify=False)
    assert torch.equal(zoo.run(program.module(), inputs), before)
    assert program.graph_module.code == code


class Traced(nn.Module):
    """Linear maps as modules, as raw weights, and of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)
        self.w1, self.w2 = (nn.Parameter(torch.randn(32, 8)), nn.Parameter(torch.randn(8, 32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.second(F.gelu(self.first(x)))
        return x + F.linear(torch.relu(F.linear(x, self.w1)), self.w2)


def test_a_graph_of_any_tracer() -> None:
    torch.manual_seed(0)
    model, x = Traced(), torch.randn(3, 5, 8)
    graph = fx.symbolic_trace(model)
    done = upcycle.convert(graph, SPLIT_ALL, (x,), overrides=())
    assert [spec.ffn.place for spec in done.plan.specs] == ["second", "w2"]
    assert sorted(name for name, _ in done.model.named_children()) == ["second", "w2"]
    off = (done.model(x) - model(x)).abs().max() / model(x).abs().max()
    assert off <= ROUNDING[torch.float32]
    assert "relu" not in done.model.code  # type: ignore[operator]


def test_a_converted_graph_trains() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    done = upcycle.convert(fx.symbolic_trace(Traced()), SPLIT_ALL, (x,))
    done.model.train()
    done.model(x).square().sum().backward()
    layers = [module for module in done.model.modules() if isinstance(module, MoE)]
    assert all(float(layer.experts.down_proj.grad.abs().sum()) > 0 for layer in layers)


class Noisy(nn.Module):
    """Its FFN has a dropout between the linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = zoo_blocks.mlp()
        self.mlp.insert(2, nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_that_of_the_mode_it_was_exported_in(training: bool) -> None:
    program = exported(Noisy().train(training), (torch.randn(4, zoo_blocks.D),))
    (ffn,) = upcycle.locate(program).ffns
    assert ffn.hidden_dropout == (0.5 if training else 0.0)


class Quantised(nn.Module):
    """Its first weight is stored in eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("up", torch.randint(-9, 9, (32, 8), dtype=torch.int8))
        self.down = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(F.linear(x, self.up.float() * 0.1)))


def test_quantised_weights_are_refused_with_the_reason() -> None:
    located = upcycle.locate(exported(Quantised(), (torch.randn(4, 8),)))
    assert not located.ffns
    assert ["quantised (int8)" in miss.reason for miss in located.misses] == [True]


class Joined(nn.Module):
    """One matrix for the gate and for what goes around the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 40), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around, hidden = self.into(x).split([8, 32], -1)
        return around + self.out(F.gelu(hidden))


def test_a_matrix_that_does_more_is_refused_with_the_reason() -> None:
    located = upcycle.locate(exported(Joined(), (torch.randn(4, 8),)))
    assert not located.ffns
    (miss,) = located.misses
    assert "one matrix also does something else: convert the module" in miss.reason


def test_an_assertion_about_the_hidden_tensor_goes_with_it() -> None:
    class Asserts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = F.relu(self.up(x))
            torch._check(hidden.shape[0] > 0)
            return self.down(hidden.to(torch.float32))

    done = upcycle.convert(exported(Asserts(), (torch.randn(4, 8),)), SPLIT_ALL)
    assert "hidden" not in done.model.code  # type: ignore[operator]
    assert all(check.passed for check in done.report.checks)


# -- programs out


@pytest.fixture(scope="module")
def llama_programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A converted llama as a program in each form, with a cache."""
    dense = small_models.build("llama").eval()
    text = {"input_ids": torch.arange(12).reshape(2, 6)}
    changes = ["layers.skip_first=0", "verify.max_relative_error=100"]
    shown = [{"input_ids": torch.arange(200).reshape(4, 50)}]
    done = upcycle.convert(dense, "moefication", text, shown, overrides=changes)
    folder = tmp_path_factory.mktemp("programs")
    for form in ("portable", "fused"):
        done.save(folder / form, targets=["safetensors", "pt2"], pt2_form=form)  # type: ignore[arg-type]
    done.save(folder / "plain", targets=["safetensors"])
    return {name: folder / name for name in ("portable", "fused", "plain")}


ALONE = """
import sys
sys.modules["upcycle"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
given = torch.load(sys.argv[2])
torch.save(program(**given), sys.argv[3])
print(len([name for name in sys.modules if name.startswith(("upcycle.", "transformers"))]))
"""


def test_a_portable_program_needs_torch_alone(
    llama_programs: dict[str, Path], tmp_path: Path
) -> None:
    path = llama_programs["portable"] / "model.pt2"
    past = {
        f"past_key_values_{i}_{what}": torch.zeros(3, 2, 0, 8)
        for i in (0, 1)
        for what in ("key", "value")
    }
    text = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    given = {
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "position_ids": torch.arange(9).expand(3, 9),
        **past,
    }
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-c", ALONE, path, tmp_path / "given.pt", tmp_path / "out.pt"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "0"
    made = torch.load(tmp_path / "out.pt")
    model = upcycle.load(llama_programs["plain"])
    with torch.no_grad():
        expected = model(input_ids=text).logits
    error = (made["logits"] - expected).abs().max() / expected.abs().max()
    assert error <= ROUNDING[torch.float32]
    assert made["present.0.key"].shape == (3, 2, 9, 8)


def test_a_fused_program_has_one_node_for_the_experts(llama_programs: dict[str, Path]) -> None:
    program = torch.export.load(llama_programs["fused"] / "model.pt2")
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.upcycle.moe.default]
    assert len(nodes) == 2


def test_a_graph_that_torch_cannot_export_is_refused(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = zoo_blocks.mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) if float(x.sum()) > -1e9 else x

    x = torch.randn(4, zoo_blocks.D)
    located = upcycle.locate(zoo_blocks.mlp(), (x,))
    assert located.ffns
    done = upcycle.convert(nn.Sequential(zoo_blocks.mlp()), SPLIT_ALL, (x,))
    vars(done.model)["forward"] = lambda x: Reads()(x)
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot take this model"):
        done.save(tmp_path / "out", targets=["safetensors", "pt2"])
    assert not (tmp_path / "out").exists()


# -- the command line


def test_convert_reads_and_writes_programs(tmp_path: Path) -> None:
    path = tmp_path / "dense.pt2"
    torch.export.save(exported(*model_and_inputs("bert")), path)
    out: Any = run("convert", path, "--recipe", "sparse-upcycling", "--out", tmp_path / "moe",
                   "--set", "layers.every=1", "--set", "layers.start=1")  # fmt: skip
    assert "exported program loaded again" in out.output
    assert sorted(p.name for p in (tmp_path / "moe").glob("model.*")) == [
        "model.pt2",
        "model.safetensors",
    ]
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "library_name: pytorch" in card
    assert "pipeline_tag" not in card
    verified: Any = run("verify", path, tmp_path / "moe")
    assert "exported program loaded again" in verified.output
    inspected: Any = run("inspect", path)
    assert "bert.encoder.layer.{0..2}" in inspected.output
    assert path.is_file()


def test_what_a_program_keeps_cannot_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "dense.pt2"
    torch.export.save(exported(*model_and_inputs("functional")), path)
    refused: Any = run("convert", path, "--recipe", "emoe", "--dtype", "bfloat16", "--out",
                       tmp_path / "moe", code=2)  # fmt: skip
    assert "a program keeps the type" in refused.output
    every = ("--set", "layers.every=1", "--set", "layers.start=1", "--set", "layers.skip_first=0")
    refused = run("convert", path, "--recipe", "sparse-upcycling", *every, "--stream", "--out",
                  tmp_path / "moe", code=2)  # fmt: skip
    assert "piece by piece" in refused.output


def test_a_mixture_of_transformers_becomes_a_program(tmp_path: Path) -> None:
    hf: Any = small_models.t
    config = hf.MixtralConfig(**small_models.DECODER, num_local_experts=4, num_experts_per_tok=2)
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    done = upcycle.export(tmp_path / "mixtral", tmp_path / "out", target="pt2", pt2_form="fused")
    assert done.form == "pt2, fused"
    assert [check.passed for check in done.checks] == [True, True]
    assert (tmp_path / "out" / "model.pt2").is_file()
    refused: Any = run("export", tmp_path / "mixtral", "--out", tmp_path / "o", "--target", "onnx",
                       "--pt2-form", "fused", code=2)  # fmt: skip
    assert "--pt2-form fused: it is for --target pt2" in refused.output
