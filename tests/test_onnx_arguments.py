"""What a forward is given, in its ONNX file: tensors are inputs, all else is constant."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upcycle
from upcycle.errors import UnsupportedError
from upcycle.onnx.run import session
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.traced.arguments import apart, arguments_of, identifiers

pytestmark = pytest.mark.usefixtures("one_thread")

D, WIDTH = 8, 16
# A few sums of at most 16 float32 products of numbers of about one; a dropped argument is off by 1.
TOLERANCE = 16 * 8 * torch.finfo(torch.float32).eps


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.ffn = FFN()
        self.eval()


class Scaled(Model):
    def forward(self, x: torch.Tensor, k: float = 3.0, flag: bool = False) -> torch.Tensor:
        return self.ffn(x) * k + (1.0 if flag else 0.0)


class Nested(Model):
    def forward(self, obs: Any, pair: Any, *rest: Any, **more: Any) -> torch.Tensor:
        return self.ffn(obs["a"]) + 2 * pair[0] - 3 * pair[1][0] + 5 * rest[0] * more["class"]


class Difference(Model):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.ffn(a) - 2 * b


class Output(Model):
    def forward(self, output: torch.Tensor) -> torch.Tensor:
        return self.ffn(output)


class Back(Model):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x, "y": self.ffn(x)}


class Repeated(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = F.normalize(x + self.ffn(x), dim=-1)
        return x


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def outputs(path: Path, *tensors: torch.Tensor) -> list[torch.Tensor]:
    runner = session(path)
    names = [value.name for value in runner.get_inputs()]
    feeds = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in runner.run(None, feeds)]


def is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def export(model: nn.Module, example: Any, **more: Any) -> Path:
        return export_onnx(model, example, path=tmp_path / "model.onnx", stored={}, **more)

    return export


def test_numbers_and_flags_are_constants_of_the_graph(file: Any) -> None:
    model, x = Scaled(), drawn(2, 5, D)
    path = file(model, {"x": x, "k": 2.0, "flag": True})
    (made,) = outputs(path, x)
    assert is_close(made, model(x, 2.0, True).detach())
    assert not is_close(made, model(x).detach())
    (by_position,) = outputs(file(model, (x, 2.0, True)), x)
    assert torch.equal(by_position, made)


def test_constants_are_told_of_and_verified(tmp_path: Path, caplog: Any) -> None:
    example = {"x": drawn(2, 5, D), "k": 2.0, "flag": False}
    changes = ["experts.count=4"]
    result = upcycle.convert(Scaled(), "split-all", example_inputs=example, overrides=changes)
    result.save(tmp_path / "out", targets=["safetensors", "onnx"])
    assert "the ONNX file computes with k=2.0, as" in caplog.text
    (made,) = outputs(tmp_path / "out" / "model.onnx", example["x"])
    assert is_close(made, result.model(**example).detach())


def test_tensors_inside_of_arguments_are_inputs(file: Any) -> None:
    a, b, c, d = (drawn(2, 3, D) + i for i in range(4))
    model: nn.Module = Nested()
    arguments = arguments_of(model, ({"a": a}, [b, (c, None)], d))
    assert list(arguments.tensors) == ["obs.a", "pair.0", "pair.1.0", "rest.0"]
    assert arguments.constants == {"pair.1.1": None}
    named = {"obs": {"a": a}, "pair": [b, (c, None)], "class": 2.0}

    class ByName(Nested):
        def forward(self, obs: Any, pair: Any, **more: Any) -> torch.Tensor:  # type: ignore[override]
            return super().forward(obs, pair, obs["a"], **more)

    model = ByName()
    path = file(model, named)
    assert [v.name for v in session(path).get_inputs()] == ["obs.a", "pair.0", "pair.1.0"]
    given = [drawn(4, 6, D) + i for i in range(3)]
    (made,) = outputs(path, *given)
    expected = model({"a": given[0]}, [given[1], (given[2], None)], **{"class": 2.0})
    assert is_close(made, expected.detach())


def test_one_tensor_given_twice_is_two_inputs(file: Any) -> None:
    model, x = Difference(), drawn(2, 5, D)
    a, b = drawn(3, 4, D), drawn(3, 4, D) + 1
    (made,) = outputs(file(model, (x, x)), a, b)
    assert is_close(made, model(a, b).detach())
    assert not is_close(made, model(a, a).detach())


@pytest.mark.parametrize(
    ("model", "inputs", "results"),
    [(Output(), ["output"], ["output_1"]), (Back(), ["x"], ["x_1", "y"])],
)
def test_inputs_keep_their_names(
    model: nn.Module, inputs: list[str], results: list[str], file: Any
) -> None:
    graph = onnx.load(file(model, (drawn(2, 5, D),)), load_external_data=False).graph
    assert [v.name for v in graph.input] == inputs
    assert [v.name for v in graph.output] == results
    for value in (*graph.input, *graph.output):
        axes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert axes == ["batch", "sequence", D]


@pytest.mark.parametrize(
    "change", ["form=fused", "form=unrolled", "form=quantised", "tokens=[1,256]"]
)
def test_a_layer_that_is_applied_again_has_names_of_its_own(change: str, tmp_path: Path) -> None:
    model, x = Repeated(), drawn(2, 5, D)
    changes = ["experts.count=2", f"onnx.{change}"]
    result = upcycle.convert(model, "split-all", example_inputs=(x,), overrides=changes)
    result.save(tmp_path / "out", targets=["safetensors", "onnx"])
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    last = "by_length" if change.startswith("tokens") else "MoE"
    layers = [node.name for node in nodes if node.name.endswith(f"/{last}")]
    assert layers == [f"ffn/{last}", f"ffn/1/{last}", f"ffn/2/{last}"]
    names = [name for node in nodes for name in node.output if name]
    assert len(set(names)) == len(names)
    if change != "form=quantised":
        other = drawn(3, 7, D)
        (made,) = outputs(tmp_path / "out" / "model.onnx", other)
        assert is_close(made, model(other).detach())


def test_float_inputs_of_a_file_in_float16(tmp_path: Path) -> None:
    changes = ["experts.count=4", "onnx.dtype=float16", "onnx.form=unrolled"]
    model, x = Scaled(), drawn(2, 5, D)
    result = upcycle.convert(model, "split-all", example_inputs=(x,), overrides=changes)
    result.save(tmp_path / "out", targets=["safetensors", "onnx"])
    runner = session(tmp_path / "out" / "model.onnx")
    assert [value.type for value in runner.get_inputs()] == ["tensor(float16)"]
    (made,) = runner.run(None, {"x": x.numpy().astype(np.float16)})
    expected = model(x).detach().numpy()
    gap = np.abs(made.astype(np.float32) - expected).max()
    assert gap <= 16 * 8 * 2.0**-11 * np.abs(expected).max()


def test_what_a_graph_cannot_have_is_refused() -> None:
    class Box:
        tensor = drawn(2, D)

    with pytest.raises(UnsupportedError, match="its input x is a Box, and a graph has tensors"):
        arguments_of(Scaled(), (Box(),))
    with pytest.raises(UnsupportedError, match=r"do not fit the forward: .*'x'"):
        arguments_of(Scaled(), {"xs": drawn(2, D)})


def test_sizes_that_depend_on_the_data(tmp_path: Path) -> None:
    """Torch exports it by reading the code, after it could not by running it."""

    class Counted(Model):
        def forward(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
            size = int(group.max()) + 1
            return torch.zeros(size, D).index_add_(0, group, self.ffn(x))

    model, inputs = Counted(), (drawn(5, D), torch.tensor([0, 0, 1, 1, 1]))
    changes = ["experts.count=4"]
    result = upcycle.convert(model, "split-all", example_inputs=inputs, overrides=changes)
    result.save(tmp_path / "out", targets=["safetensors", "onnx"])
    other = (drawn(5, D), torch.tensor([0, 1, 2, 2, 0]))
    (made,) = outputs(tmp_path / "out" / "model.onnx", *other)
    assert is_close(made, model(*other).detach())


def test_a_refusal_of_the_exporter_comes_alone(tmp_path: Path, capfd: Any) -> None:
    class Branching(Model):
        def forward(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
            return self.ffn(x) if int(group.max()) > 0 else x

    inputs, changes = (drawn(5, D), torch.tensor([0, 0, 1, 1, 1])), ["experts.count=4"]
    result = upcycle.convert(Branching(), "split-all", example_inputs=inputs, overrides=changes)
    capfd.readouterr()
    with pytest.raises(UnsupportedError, match="cannot export this model"):
        result.save(tmp_path / "out", targets=["safetensors", "onnx"])
    assert "def forward" not in "".join(capfd.readouterr())


def test_names_are_kept_apart() -> None:
    assert apart(["x", "x", "y"], ["y"]) == ["x", "x_1", "y_1"]
    words = identifiers(["obs.a", "obs_a", "class", "0"])
    assert words == ["obs_a", "obs_a_1", "_class", "_0"]
    assert all(word.isidentifier() for word in words)
