"""A linear map of which only a part is the FFN's: the rest computes what it did, stored once."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import zoo
from click.testing import CliRunner
from palm_model import PalmConfig, PalmModel
from safetensors.torch import load_file
from test_streaming import convert as convert_cli
from test_streaming import digests
from torch import nn
from torch.nn import functional as F
from zoo_torch import FusedProjection

import upcycle
from upcycle.cli.main import main
from upcycle.layers.moe import MoE
from upcycle.layers.tap import PartialTap, TappedMoE
from upcycle.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

D, H = zoo.D, zoo.H
RELATIVE = 1e-5  # the float32 budget of `upcycle.ir.rounding.ROUNDING`, whose derivation is there
SPLIT_ALL = Recipe.model_validate(
    {
        "experts": {"method": "contiguous", "count": 5},
        "router": {"method": "avg_key", "top_k": "all", "weights": "one"},
    }
)
ORDERS = [
    {"gated": gated, "mlp_first": mlp_first, "joined": joined}
    for gated in (False, True)
    for mlp_first in (False, True)
    for joined in (False, True)
]


def dense_of(build: Callable[[], nn.Module]) -> nn.Module:
    return zoo.drawn(zoo.Case(build, 0, "", ""))


def fused(blocks: int = 3, **options: bool) -> nn.Module:
    return dense_of(lambda: nn.Sequential(*(FusedProjection(**options) for _ in range(blocks))))


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(seed))


def split(model: nn.Module) -> upcycle.Conversion:
    return upcycle.convert(model, SPLIT_ALL, (tokens(),))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "-".join(k for k, v in o.items() if v))
def test_every_order_of_a_split(options: dict[str, bool]) -> None:
    model, x = fused(**options), tokens()
    done = split(model)  # verified: rows traced, each layer, end to end
    assert len(done.plan.specs) == 3
    with torch.no_grad():
        assert relative(done.model(x), model(x)) < RELATIVE
        for module in done.model.modules():
            if isinstance(module, MoE):
                module.experts.down_proj.zero_()
        assert relative(done.model(x), model(x)) > 1e-2


def test_what_stays_is_stored_once_and_is_what_it_was() -> None:
    model = fused(1, joined=True, gated=True)
    done = split(model)
    state, dense = done.model.state_dict(), model.state_dict()
    assert torch.equal(state["0.into.weight"], dense["0.into.weight"][: 3 * D])
    assert torch.equal(state["0.into.bias"], dense["0.into.bias"][: 3 * D])
    assert torch.equal(state["0.out.kept_weight"], dense["0.out.weight"][:, :D])
    assert torch.equal(state["0.out.output_bias"], dense["0.out.bias"])
    router = sum(tensor.numel() for name, tensor in state.items() if "router" in name)
    padding = (5 * -(-H // 5) - H) * (3 * D + 2)
    numbers = sum(tensor.numel() for tensor in dense.values())
    assert sum(tensor.numel() for tensor in state.values()) == numbers + router + padding
    assert done.report.costs.parameters_after == numbers + router + padding
    assert isinstance(done.model.get_submodule("0.into"), PartialTap)
    assert isinstance(done.model.get_submodule("0.out"), TappedMoE)


def test_copies_files_and_state_dicts() -> None:
    model, x = fused(2, joined=True), tokens()
    done = split(model)
    with torch.no_grad():
        expected = done.model(x)
        assert torch.equal(copy.deepcopy(done.model)(x), expected)
        file = io.BytesIO()
        torch.save(done.model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        other = split(fused(2, joined=True)).model
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(done.model.state_dict())
        assert torch.equal(other(x), expected)


def test_a_plain_module_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = fused(2, joined=True, mlp_first=True), tokens()
    done = split(model)
    done.save(tmp_path / "moe")
    loaded = upcycle.load(tmp_path / "moe", model=fused(2, joined=True, mlp_first=True))
    with torch.no_grad():
        assert torch.equal(loaded(x), done.model(x))


@pytest.mark.parametrize("joined", [False, True])
def test_gradients_are_the_dense_ones_and_training_merges_back(joined: bool) -> None:
    model, x = fused(2, joined=joined), tokens()
    done = split(model)
    for each in (model, done.model):
        each(x).square().sum().backward()
    found, dense = dict(done.model.named_parameters()), dict(model.named_parameters())
    for name in ("0.into.weight", "1.into.bias", "0.norm.weight"):
        got, want = found[name].grad, dense[name].grad
        assert got is not None
        assert want is not None
        assert relative(got, want[: len(got)]) < RELATIVE
    with torch.no_grad():
        for parameter in done.model.parameters():
            parameter.mul_(1.01)  # the padding of the experts stays zero
        merged = done.to_dense()
        with upcycle.layers.moe.all_experts(done.model):
            assert relative(merged(x), done.model(x)) < RELATIVE


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_it_compiles_and_exports() -> None:
    done, x = split(fused(1, joined=True)), tokens()
    with torch.no_grad():
        expected = done.model(x)
        compiled = torch.compile(done.model, backend="aot_eager", fullgraph=True)
        assert relative(compiled(x), expected) < RELATIVE
        program = torch.export.export(done.model, (x,)).module()
        assert relative(program(x), expected) < RELATIVE


def test_other_dtypes_devices_and_frozen_weights() -> None:
    model, x = fused(2, joined=True, gated=True), tokens()
    model[0].into.weight.requires_grad_(False)
    done = split(model)
    assert not done.model.get_parameter("0.into.weight").requires_grad
    assert done.model.get_parameter("1.into.weight").requires_grad
    with torch.no_grad():
        expected = done.model(x)
        assert relative(copy.deepcopy(done.model).double()(x.double()), expected) < RELATIVE
        assert done.model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = nn.Sequential(FusedProjection(joined=True), FusedProjection(joined=True))
    made = upcycle.convert(empty, "sparse-upcycling", (x,), verify=False).model
    assert all(parameter.is_meta for parameter in made.parameters())
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    wanted = (3 * D, D), (D, D)
    assert (shapes["1.into.weight"], shapes["1.out.kept_weight"]) == wanted


def test_it_is_exported_to_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flux.py").write_text(
        "import test_shared_projections as t\n"
        "make = lambda: t.fused(2, joined=True, gated=True)\n"
        "inputs = lambda: (t.tokens(),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["flux:make", "--inputs", "flux:inputs", "--recipe", "split-all", "--out", "moe"]
    result = CliRunner().invoke(main, ["convert", *arguments, "--target", "onnx"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "moe/report.json").read_text())
    assert all(check["passed"] for check in report["checks"])
    assert any("ONNX" in check["what"] for check in report["checks"]), report["checks"]


class Columns(nn.Module):
    """The contraction reads the hidden tensor beside something that is none."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, 24, 1), nn.Conv2d(32, 8, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 8, H, W] -> same."""
        return self.down(F.dropout(torch.cat([F.relu(self.up(x)), x], 1), 0.0, self.training))


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_connection_between_convolutions(bias: bool) -> None:
    model = dense_of(lambda: nn.Sequential(Columns(bias), Columns(bias)))
    x = torch.randn(2, 8, 5, 3)
    done = upcycle.convert(model, SPLIT_ALL, (x,))
    (first, _) = done.plan.specs
    assert (first.ffn.contraction.columns, first.ffn.axis) == ((0, 24), 1)
    with torch.no_grad():
        assert relative(done.model(x), model(x)) < RELATIVE


def test_of_two_branches_the_wider_is_converted() -> None:
    class Branches(nn.Module):
        """Two hidden tensors of one x, and one contraction."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, H), nn.Linear(D, 2 * H)
            self.out = nn.Linear(3 * H, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.out(torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], -1))

    model, x = dense_of(Branches), tokens()
    done = split(model)
    (spec,) = done.plan.specs
    assert (spec.ffn.pointwise.name, spec.ffn.contraction.columns) == ("tanh", (H, 3 * H))
    with torch.no_grad():
        assert relative(done.model(x), model(x)) < RELATIVE


def test_odd_readers_of_a_projection() -> None:
    class Odd(FusedProjection):
        """An empty part in the concatenation, and bits of the query read as integers."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.into(self.norm(x))
            hidden = F.gelu(z[..., 3 * D :])
            bits = z[..., :D].view(torch.int32) & 1
            both = torch.cat([z.new_zeros(2, 7, 0), z[..., D : 2 * D] * bits, hidden], -1)
            return x + self.out(both)

    model, x = dense_of(lambda: Odd(joined=True)), tokens()
    done = split(model)
    (spec,) = done.plan.specs
    assert spec.ffn.contraction.columns == (D, D + H)
    with torch.no_grad():
        assert relative(done.model(x), model(x)) < RELATIVE

    class Bits(Odd):
        """The bits of the hidden tensor are read."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.into(self.norm(x))
            return self.out(
                torch.cat([z[..., :D] * z.view(torch.int32)[..., -D:], F.gelu(z[..., 3 * D :])], -1)
            )

    (miss,) = upcycle.locate(Bits(joined=True), (x,)).misses
    assert "its hidden tensor is also read by `view`" in miss.reason


def test_a_hidden_element_that_goes_elsewhere_is_still_seen() -> None:
    class Leaks(FusedProjection):
        """The first neuron is also the query's."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.into(self.norm(x))
            hidden = F.gelu(z[..., 3 * D :])
            return x + self.attention_out(z[..., 2 * D + 1 : 3 * D + 1]) + self.mlp_out(hidden)

    found = upcycle.locate(Leaks(), (tokens(),))
    assert found.ffns == ()
    assert "its hidden tensor is also read by `linear` in `attention_out`" in found.misses[0].reason


def test_an_onnx_file_with_a_fused_projection_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fused.onnx"
    torch.onnx.export(fused(1), (tokens(),), path, dynamo=True, verbose=False)
    onnx.checker.check_model(path)
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    (miss,) = json.loads(result.output)["misses"]
    assert "its linear maps also compute something else" in miss["reason"]


@pytest.fixture(scope="module", params=[False, True], ids=["palm", "flux"])
def palm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    PalmConfig.register_for_auto_class()
    PalmModel.register_for_auto_class("AutoModel")
    folder = tmp_path_factory.mktemp("palm")
    PalmModel(PalmConfig(joined=request.param)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "split-all"])
def test_a_directory_is_converted_whole_or_piece_by_piece(
    palm: Path, recipe: str, tmp_path: Path
) -> None:
    for out, how in (("whole", "--no-stream"), ("pieces", "--stream")):
        options = ("--recipe", recipe, how, "--trust-remote-code")
        result = convert_cli(palm, tmp_path / out, *options)
        assert result.exit_code == 0, result.output
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")
    stored = load_file(tmp_path / "pieces/model.safetensors")
    dense = load_file(palm / "model.safetensors")
    q, _, k, _, v = dense["blocks.1.into.weight"].split([32, 64, 32, 64, 32])
    assert torch.equal(stored["blocks.1.into.weight"], torch.cat([q, k, v]))
    loaded: Any = upcycle.load(tmp_path / "pieces", trust_remote_code=True)
    assert type(loaded).__name__ == "UpcyclePalmModel"
    original: Any = PalmModel.from_pretrained(palm)
    prompt = torch.arange(20).view(2, 10)
    with torch.no_grad():
        error = relative(loaded(prompt).logits, original(prompt).logits)
    assert error < RELATIVE
