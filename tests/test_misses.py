"""A refusal says what, where in the graph, and where in the model's source."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import upcycle
from upcycle.cli import main as cli
from upcycle.ir.ffn import Miss

pytestmark = pytest.mark.usefixtures("one_thread")

D, H = 8, 24
NORM = "return x + self.down(self.norm(F.gelu(self.up(x))))"


class SubNorm(nn.Module):
    """A norm over the hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return x + self.down(self.norm(F.gelu(self.up(x))))


def line_of(code: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{Path(__file__).name}:{[line.strip() for line in lines].index(code) + 1}"


def misses(model: nn.Module) -> tuple[Miss, ...]:
    found = upcycle.locate(model, (torch.zeros(2, 5, D),))
    assert found.ffns == ()
    return found.misses


def test_a_refusal_names_the_node_and_the_line() -> None:
    found = misses(nn.Sequential(*(SubNorm() for _ in range(4))))
    assert [miss.path for miss in found] == [f"{i}.down" for i in range(4)]
    # The third and the fourth repeat the second block.
    nodes = ["layer_norm", "layer_norm_1", "layer_norm_1", "layer_norm_1"]
    assert [miss.node for miss in found] == nodes
    assert {miss.source for miss in found} == {line_of(NORM)}


def test_the_code_of_torch_is_no_source_of_a_model() -> None:
    plain = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.LayerNorm(H), nn.Linear(H, D))
    (miss,) = misses(plain)
    assert (miss.node, miss.source) == ("layer_norm", "")


def test_misses_are_equal_wherever_the_graph_has_their_node() -> None:
    assert Miss("a", "because", "add", "x.py:1") == Miss("a", "because", "add_1")
    assert Miss("a", "because") != Miss("b", "because")


def test_the_command_line_shows_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub_norm.py").write_text(
        "import torch, test_misses\n"
        "make = lambda: test_misses.SubNorm()\n"
        "inputs = lambda: (torch.zeros(2, 5, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["inspect", "sub_norm:make", "--inputs", "sub_norm:inputs"]
    shown = CliRunner().invoke(cli.main, arguments)
    assert line_of(NORM) in shown.output, shown.output
    data = json.loads(CliRunner().invoke(cli.main, [*arguments, "--json"]).output)
    assert data["misses"] == [
        {
            "path": "down",
            "reason": "`layer_norm` mixes the hidden axis",
            "node": "layer_norm",
            "source": line_of(NORM),
        }
    ]


class Lora(nn.Module):
    """A linear map with an adapter of rank 2, as adapter libraries put it around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.dropout = base, nn.Dropout(0.1)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        result = self.base_layer(x)
        return result + self.lora_B(self.lora_A(self.dropout(x))) * 0.5


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


@pytest.mark.parametrize(("which", "words"), [
    ((0,), "(a low-rank adapter on an expansion? merge it into the base weight first)"),
    ((2,), "a low-rank adapter lies on its contraction: merge it first"),
    ((0, 2), "a low-rank adapter on an expansion? merge it into the base weight first)"),
])  # fmt: skip
def test_an_adapter_is_to_be_merged(which: tuple[int, ...], words: str) -> None:
    model = plain()
    for i in which:
        model[i] = Lora(model[i])
    found = [
        m for m in misses(nn.Sequential(model)) if m.path == f"0.2{'.base_layer' * (2 in which)}"
    ]
    assert any(words in miss.reason for miss in found), found


def test_another_reader_is_no_adapter() -> None:
    class Probe(nn.Module):
        """A second, wide branch reads the hidden tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
            self.side = nn.Sequential(nn.Linear(H, H), nn.Linear(H, D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = F.relu(self.up(x))
            return self.down(hidden) + self.side(hidden)

    reasons = [miss.reason for miss in misses(Probe())]
    assert any("its hidden tensor is also read by `linear` in `side.0`" in r for r in reasons)
    assert not any("adapter" in reason for reason in reasons)


@torch.library.custom_op("upcycle_test::gemv_4bit", mutates_args=())
def gemv_4bit(x: torch.Tensor, packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Two weights in a byte, read by a kernel that no graph can look into."""
    weight = torch.stack([packed & 15, packed >> 4], -1).float() - 8
    return x @ weight.view(rows, x.shape[-1]).t()


@gemv_4bit.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


class Linear4bit(nn.Module):
    """Four bits a weight, read by a kernel or unpacked in the forward."""

    def __init__(self, d_in: int, d_out: int, kernel: bool) -> None:
        super().__init__()
        packed = torch.zeros(d_in * d_out // 2, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(d_out))
        self.shape, self.kernel = (d_out, d_in), kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if self.kernel:
            y: torch.Tensor = gemv_4bit(x, self.weight, self.shape[0])
            return y + self.bias
        weight = torch.stack([self.weight & 15, self.weight >> 4], -1).to(x.dtype) - 8
        return F.linear(x, weight.view(self.shape), self.bias)


@pytest.mark.parametrize(
    ("kernel", "packing"), [(True, "int4 for `upcycle_test::gemv_4bit`"), (False, "int4")]
)
def test_quantised_weights_are_named(kernel: bool, packing: str) -> None:
    model = nn.Sequential(Linear4bit(D, H, kernel), nn.SiLU(), Linear4bit(H, D, kernel))
    (miss,) = misses(nn.Sequential(model))
    wanted = f"its weights are quantised ({packing}): start from the model with float weights"
    assert (miss.path, miss.reason) == ("0.2", wanted)


def test_dynamic_quantisation_of_torch_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = torch.ao.quantization.quantize_dynamic(nn.Sequential(plain()), {nn.Linear})
    (miss,) = misses(model)
    assert "are quantised (packed for `quantized::linear_dynamic`)" in miss.reason
