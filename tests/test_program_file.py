"""A file of `torch.export` is data: what could run is refused, and nothing of it has run."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_blocks
from torch import nn

from upcycle.errors import UsageError
from upcycle.models.program_file import open_program

PLACE = "dense/models/model.json"


class Net(nn.Module):
    """A program with a size that varies, an expression of it, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = zoo_blocks.mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x).reshape(-1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "dense.pt2"
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(
        Net(), (torch.randn(4, zoo_blocks.D),), dynamic_shapes=sizes, strict=False
    )
    torch.export.save(program, path)
    return path


def changed(dense: Path, out: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a program whose entries were changed."""
    with zipfile.ZipFile(dense) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out


def with_json(edit: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        data = json.loads(entries[PLACE])
        edit(data)
        entries[PLACE] = json.dumps(data).encode()

    return change


def test_what_torch_wrote_is_read(dense: Path) -> None:
    x = torch.randn(3, zoo_blocks.D)
    assert open_program(dense).module()(x).shape == (3 * zoo_blocks.D,)


def _size_that_runs(marker: Path) -> Callable[[Any], None]:
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def edit(data: Any) -> None:
        for value in data["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code

    return edit


def _target(name: str) -> Callable[[Any], None]:
    return lambda data: data["graph_module"]["graph"]["nodes"][0].update(target=name)


def _enum(data: Any) -> None:
    signature = data["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["in_spec"])
    context = json.dumps({"__enum__": True, "fqn": "antigravity:geohash", "name": "x"})
    spec[1]["context"] = context
    # escaped once more, so that the word does not stand in the text of the file
    signature["in_spec"] = json.dumps(spec).replace("__enum__", "\\u005f_enum__")


class Touches:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_expression_that_is_code(dense: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = changed(dense, tmp_path / "bad.pt2", with_json(_size_that_runs(marker)))
    with pytest.raises(UsageError, match="is no expression of sizes"):
        open_program(path)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["a.b", "x()", "Symbol('a b')", "().__class__", "[1][0]", "9**99",
                                  "lambda: 0", "'a'", "1" * 5000])  # fmt: skip
def test_other_expressions(dense: Path, tmp_path: Path, text: str) -> None:
    def edit(data: Any) -> None:
        data["graph_module"]["graph"]["sym_int_values"]["s"] = {"as_expr": {"expr_str": text}}

    path = changed(dense, tmp_path / "bad.pt2", with_json(edit))
    with pytest.raises(UsageError, match="is no expression of sizes"):
        open_program(path)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("torch.hub.load", "is no operation of a graph"),
        ("_operator.methodcaller", "is no operation of a graph"),
        ("math.__loader__", "is no operation of a graph"),
        ("#ext:op", "is no operation of a graph"),
        ("torch.ops.aten.from_file.default", "reads a file"),
        ("torch.ops.image.read_file.default", "another library"),
        ("torch.ops.higher_order.hints_wrapper", "another library"),
    ],
)
def test_targets(dense: Path, tmp_path: Path, target: str, reason: str) -> None:
    path = changed(dense, tmp_path / "bad.pt2", with_json(_target(target)))
    with pytest.raises(UsageError, match=reason):
        open_program(path)


def test_a_class_to_import(dense: Path, tmp_path: Path) -> None:
    path = changed(dense, tmp_path / "bad.pt2", with_json(_enum))
    with pytest.raises(UsageError, match="names a class of Python"):
        open_program(path)


@pytest.mark.parametrize("place", ["data/sample_inputs/model.pt", "data/weights/weight_0"])
def test_pickles(dense: Path, tmp_path: Path, place: str) -> None:
    marker = tmp_path / "ran"

    def change(entries: dict[str, bytes]) -> None:
        entries[f"dense/{place}"] = pickle.dumps(Touches(marker))
        name = "dense/data/weights/model_weights_config.json"
        config = json.loads(entries[name])
        first = min(config["config"])
        config["config"][first] |= {"use_pickle": True, "path_name": "weight_0"}
        if "weight" in place:
            entries[name] = json.dumps(config).encode()

    path = changed(dense, tmp_path / "bad.pt2", change)
    with pytest.raises(UsageError, match="a pickle of more than tensors"):
        open_program(path)
    assert not marker.exists()


def _compiled(entries: dict[str, bytes]) -> None:
    entries["dense/data/aotinductor/model/model.so"] = b"\x7fELF"


def _two(entries: dict[str, bytes]) -> None:
    entries["dense/models/other.json"] = entries[PLACE]


def _object(entries: dict[str, bytes]) -> None:
    entries["dense/data/constants/custom_obj_0"] = b"x"


def _no_json(entries: dict[str, bytes]) -> None:
    entries[PLACE] = b"{"


def _deep(entries: dict[str, bytes]) -> None:
    entries[PLACE] = b"[" * 200_000


def _slashless(entries: dict[str, bytes]) -> None:
    entries["version"] = b"8.20"
    entries["serialized_exported_program.json"] = b"{}"


def _two_folders(entries: dict[str, bytes]) -> None:
    entries["other/models/model.json"] = b"{}"


def _other_case(entries: dict[str, bytes]) -> None:
    entries["dense/data/sample_inputs/Model.pt"] = b"x"
    entries["dense/Data/sample_inputs/model.pt"] = b"x"


def _upper(entries: dict[str, bytes]) -> None:
    entries["dense/Data/sample_inputs/other.pt"] = b"x"


def _no_mapping(entries: dict[str, bytes]) -> None:
    entries["dense/data/weights/model_weights_config.json"] = b'{"config": [1]}'


def _lacks_weights(entries: dict[str, bytes]) -> None:
    del entries["dense/data/weights/weight_0"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_compiled, "holds compiled code"),
        (_two, "holds 2 programs"),
        (_object, "an object of a class"),
        (_no_json, "not a program of torch.export"),
        (_deep, "nested too deeply"),
        (_slashless, "several folders|does not write"),
        (_two_folders, "several folders"),
        (_other_case, "one name"),
        (_upper, "does not write"),
        (_no_mapping, "not a program"),
        (_lacks_weights, "cannot read this program|not a program"),
    ],
)
def test_other_archives(dense: Path, tmp_path: Path, change: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        open_program(changed(dense, tmp_path / "bad.pt2", change))


def test_two_files_of_one_name(dense: Path, tmp_path: Path) -> None:
    """torch would read the first, and a check of the last would say nothing of it."""
    path = changed(dense, tmp_path / "two.pt2", lambda entries: None)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(PLACE, b"{}")
    with pytest.raises(UsageError, match="one name"):
        open_program(path)


def test_an_encrypted_archive(dense: Path, tmp_path: Path) -> None:
    path = changed(dense, tmp_path / "locked.pt2", lambda entries: None)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of each entry
        place = content.find(mark)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(mark, place + 4)
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match=r"not a program of torch\.export"):
        open_program(path)


def test_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "text.pt2"
    with pytest.raises(UsageError, match="there is no such file"):
        open_program(path)
    path.write_text("hello")
    with pytest.raises(UsageError, match=r"not a program of torch\.export"):
        open_program(path)


def test_a_size_that_is_a_lie(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(PLACE, b" " * 50_000_000)
    with pytest.raises(UsageError, match="holds more than it does"):
        open_program(path)
