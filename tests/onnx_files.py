"""Small ONNX files: made by hand in every spelling of an FFN, and exported by torch."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from torch import nn

t: Any = transformers  # its classes have no types that a checker could follow
D, F = 16, 32
MS = "com.microsoft"
OTHER = "somebody.else"


class Graph:
    """Nodes and weights of a file; each method returns the name of a tensor."""

    def __init__(self, seed: int = 0, dtype: Any = np.float32, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.dtype = dtype
        self.prefix = prefix  # of tensors; those of a subgraph may not have the names outside
        self._generator = np.random.default_rng(seed)

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        return self.many(op_type, *inputs, domain=domain, **attributes)[0]

    def many(
        self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        names = [f"{self.prefix}{op_type}_{len(self.nodes)}.{i}" for i in range(outputs)]
        node = helper.make_node(
            op_type, inputs, names, f"{op_type}_{len(self.nodes)}", domain=domain, **attributes
        )
        self.nodes.append(node)
        return names

    def add(self, array: Any, name: str = "") -> str:
        name = name or f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def number(self, value: float) -> str:
        return self.add(np.array(value, self.dtype))

    def drawn(self, *shape: int) -> str:
        """A weight for pre-activations of about one."""
        scale = shape[0] ** 0.5 if len(shape) > 1 else 2
        return self.add((self._generator.standard_normal(shape) / scale).astype(self.dtype))

    def linear(self, x: str, d_in: int = D, d_out: int = F, *, bias: bool = True) -> str:
        y = self.op("MatMul", x, self.drawn(d_in, d_out))
        return self.op("Add", self.drawn(d_out), y) if bias else y


def write(
    path: Path,
    graph: Graph,
    output: str,
    *,
    opset: int = 17,
    shape: Iterable[Any] = ("batch", "sequence", D),
    external: bool = False,
) -> Path:
    """The file of `graph`, from a float input `x` to `output`."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(graph.dtype))
    shape = list(shape)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "hand",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(output, kind, shape)],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid(*o) for o in (("", opset), (MS, 1), (OTHER, 1))],
        ir_version=8,
    )
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 100}
    onnx.save(model, path, **(options if external else {}))
    return path


def _erf(g: Graph, z: str) -> str:
    inner = g.op("Erf", g.op("Div", z, g.number(2**0.5)))
    return g.op("Mul", g.op("Mul", z, g.op("Add", inner, g.number(1))), g.number(0.5))


def _tanh(g: Graph, z: str) -> str:
    cubic = g.op("Mul", g.op("Pow", z, g.number(3)), g.number(0.044715))
    inner = g.op("Mul", g.op("Add", z, cubic), g.number((2 / np.pi) ** 0.5))
    one = g.op("Add", g.number(1), g.op("Tanh", inner))
    return g.op("Mul", g.op("Mul", g.number(0.5), z), one)


def _plain(activation: Callable[[Graph, str], str]) -> Callable[[Graph, str], str]:
    return lambda g, x: g.linear(activation(g, g.linear(x)), F, D)


def _gemm_erf(g: Graph, x: str) -> str:
    flat = g.op("Reshape", x, g.add(np.array([-1, D])))
    up, bias = g.drawn(F, D), g.drawn(F)
    hidden = _erf(g, g.op("Gemm", flat, up, bias, transB=1))
    y = g.op("Gemm", hidden, g.drawn(F, D), g.drawn(D))
    return g.op("Reshape", y, g.op("Shape", x))


def _bias_activation(name: str) -> Callable[[Graph, str], str]:
    def build(g: Graph, x: str) -> str:
        z = g.linear(x, bias=False)
        return g.linear(g.op(name, z, g.drawn(F), domain=MS), F, D)

    return build


def _swiglu(g: Graph, x: str) -> str:
    gate, up = g.linear(x, bias=False), g.linear(x, bias=False)
    gate = g.op("Mul", gate, g.op("Sigmoid", gate))
    return g.linear(g.op("Mul", gate, up), F, D, bias=False)


def _swiglu_split(g: Graph, x: str) -> str:
    both = g.linear(x, D, 2 * F)
    gate, up = g.many("Split", both, g.add(np.array([F, F])), outputs=2, axis=-1)
    gate = g.op("Mul", g.op("Sigmoid", gate), gate)
    return g.linear(g.op("Mul", up, gate), F, D)


def _geglu_slices(g: Graph, x: str) -> str:
    both = g.linear(x, D, 2 * F)

    def half(start: int, end: int) -> str:
        limits = (g.add(np.array([i])) for i in (start, end, -1))
        return g.op("Slice", both, *limits)

    return g.linear(g.op("Mul", half(0, F), _erf(g, half(F, 2**31))), F, D)


def _constant_nodes(g: Graph, x: str) -> str:
    """Weights in Constant nodes, the expansion transposed, both behind an Identity."""
    rows = g.drawn(F, D), g.drawn(F, D)
    made = [g.weights.pop() for _ in rows][::-1]
    up, down = (g.op("Identity", g.op("Constant", value=tensor)) for tensor in made)
    hidden = g.op("Relu", g.op("MatMul", x, g.op("Transpose", up, perm=[1, 0])))
    return g.op("MatMul", hidden, down)


def _convolution(g: Graph, x: str) -> str:
    """1x1 convolutions of [batch, D, rows, columns]."""
    up = g.add(np.random.default_rng(1).standard_normal((F, D, 1, 1)).astype(g.dtype) / 4)
    down = g.add(np.random.default_rng(2).standard_normal((D, F, 1, 1)).astype(g.dtype) / 6)
    return g.op("Conv", g.op("Relu", g.op("Conv", x, up, g.drawn(F))), down, g.drawn(D))


# name -> how an FFN of x is written, and its usual name
FORMS: dict[str, tuple[Callable[[Graph, str], str], str]] = {
    "gemm-erf": (_gemm_erf, "gelu"),
    "erf": (_plain(_erf), "gelu"),
    "tanh": (_plain(_tanh), "gelu_tanh"),
    "bias-gelu": (_bias_activation("BiasGelu"), "gelu"),
    "fast-gelu": (_bias_activation("FastGelu"), "gelu_tanh"),
    "quick-gelu": (_plain(lambda g, z: g.op("QuickGelu", z, domain=MS)), "quick_gelu"),
    "relu": (_plain(lambda g, z: g.op("Relu", z)), "relu"),
    "silu": (_plain(lambda g, z: g.op("Mul", z, g.op("Sigmoid", z))), "silu"),
    "hard-swish": (_plain(lambda g, z: g.op("HardSwish", z)), "hardswish"),
    "swiglu": (_swiglu, "swiglu"),
    "swiglu-split": (_swiglu_split, "swiglu"),
    "geglu-slices": (_geglu_slices, "geglu"),
    "constant-nodes": (_constant_nodes, "relu"),
    "convolution": (_convolution, "relu"),
}


def by_hand(path: Path, form: str, *, layers: int = 2, **options: Any) -> Path:
    """A file of residual FFNs in one of `FORMS`."""
    graph = Graph(dtype=options.pop("dtype", np.float32))
    x = "x"
    for _ in range(layers):
        x = graph.op("Add", x, FORMS[form][0](graph, x))
    if form == "convolution":
        options["shape"] = ("batch", D, 4, 4)
    return write(path, graph, x, **options)


class _Outputs(nn.Module):
    """A transformers model as a function of tensors in order."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, args, strict=True))
        result: torch.Tensor = self.model(**given, return_dict=False)[0]
        return result


_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def exported(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model to export, and its inputs."""
    torch.manual_seed(0)
    tokens = {
        "input_ids": torch.randint(0, 50, (2, 9)),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
    }
    if name == "mlp":
        layers = [nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.LayerNorm(16)]
        more = [nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16)]
        return nn.Sequential(*layers, *more), {"x": torch.randn(4, 16)}
    if name == "vit":
        model = t.ViTModel(t.ViTConfig(**_SMALL, image_size=16, patch_size=8))
        images = {"pixel_values": torch.randn(2, 3, 16, 16)}
        return _Outputs(model, list(images)), images
    small = _SMALL | {"vocab_size": 50, "max_position_embeddings": 32}
    if name == "bert":
        return _Outputs(t.BertModel(t.BertConfig(**small)), list(tokens)), tokens
    config = t.LlamaConfig(**small, num_key_value_heads=2, use_cache=False)
    return _Outputs(t.LlamaModel(config), list(tokens)), tokens


def export(path: Path, name: str, *, dynamo: bool) -> Path:
    """The file that torch writes of a tiny model; the new exporter puts weights beside it."""
    model, inputs = exported(name)
    names = list(inputs)
    options: dict[str, Any] = {"dynamo": dynamo, "input_names": names}
    if dynamo:
        options |= {"verbose": False, "external_data": True}
    else:
        axes = {0: "batch", **({1: "sequence"} if "input_ids" in inputs else {})}
        options["dynamic_axes"] = dict.fromkeys(names, axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), tuple(inputs.values()), path, **options)
    return path


FLOAT = TensorProto.FLOAT
