"""What a file of `torch.export` may hold, see docs/security.md.

torch reads such a file as code: its expressions of sizes are evaluated, its operations are found by
name, its samples may be pickles, and a compiled library in it is loaded. So all of it is read here
first, as data, and what is not known to be harmless is refused.
"""

import ast
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UsageError
from upcycle.util.json_text import MAX_BYTES, parsed

_OPERATION = re.compile(r"torch\.ops\.(\w+)\.(\w+)(\.\w+)?")
_LIBRARIES = {"aten", "prims", "quantized_decomposed", "upcycle"}
_HIGHER_ORDER = {"cond", "map_impl", "scan", "while_loop", "wrap_with_autocast",
                 "wrap_with_set_grad_enabled"}  # fmt: skip
_OF_FILES = {"from_file"}  # of ATen
_OF_NUMBERS = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|not_|or_|pow|sub|truediv)"
    r"|math\.(ceil|floor|sqrt|trunc)|torch\.sym_(float|int|ite|max|min|not|sqrt|sum)"
)
_SYMBOL = re.compile(r"[a-z_]+\d*")
_FUNCTIONS = {
    "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "Float", "FloatPow",
    "FloatTrueDiv", "FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt", "Identity", "IntTrueDiv",
    "Integer", "LShift", "Le", "LessThan", "Lt", "Max", "Min", "Mod", "ModularIndexing", "Mul",
    "Ne", "Not", "Or", "Pow", "PowByNatural", "PythonMod", "RShift", "Rational", "RoundDecimal",
    "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat",
    "TruncToInt", "Unequality", "Where", "ceiling", "floor",
}  # fmt: skip
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Load, ast.operator, ast.unaryop,
    ast.cmpop, ast.keyword,
)  # fmt: skip
_LONGEST, _LARGEST_POWER = 2000, 16
# How reading something that is no such archive fails: it is cut off, encrypted, or of other data.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, RuntimeError,
)  # fmt: skip


def check_program(path: Path, *, allow_pickle: bool = False, trust: bool = False) -> None:
    """Read a file of `torch.export` without running any of it.

    Args:
        path: of the file.
        allow_pickle: pickles that may run code are accepted.
        trust: operations of other libraries than torch are accepted.

    Raises:
        UsageError: it is no such file, or has something in it that could run or that is not known.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(path, archive, allow_pickle=allow_pickle, trust=trust)
    except _DAMAGED as error:
        raise UsageError(
            f"{path}: not a program of torch.export ({type(error).__name__}: {error}); write it "
            "again with torch.export.save"
        ) from error


def _check_archive(
    path: Path, archive: zipfile.ZipFile, *, allow_pickle: bool, trust: bool
) -> None:
    entries = _entries(archive)
    if sum(info.file_size for info in entries.values()) > 2 * path.stat().st_size:
        raise UsageError(f"{path}: it says that it holds more than it does; download it again")
    compiled = [n for n in entries if "aotinductor" in n or n.endswith((".so", ".dll", ".dylib"))]
    if compiled:
        raise UsageError(
            f"{path}: it holds compiled code (`{compiled[0]}`), which is never run; give the "
            "program that it was compiled from"
        )
    models = [name for name in entries if name.startswith("models/")]
    if models != ["models/model.json"]:
        raise ValueError(f"it holds {len(models)} programs, and one called `model` is read")
    for name, info in entries.items():
        if name.startswith("data/constants/custom_obj"):
            raise UsageError(f"{path}: it holds an object of a class, not a graph alone; export "
                             "the model without it")  # fmt: skip
        if name.endswith(".json"):
            if info.file_size > MAX_BYTES:
                raise UsageError(f"{path}: {info.file_size} bytes are too many for `{name}`")
            _check_values(path, parsed(archive.read(info).decode()), trust=trust)
        elif name.startswith("data/sample_inputs/") and not allow_pickle:
            _check_pickle(path, name, archive.read(info))
    for kind in ("weights", "constants"):
        config = entries.get(f"data/{kind}/model_{kind}_config.json")
        described = parsed(archive.read(config).decode())["config"] if config else {}
        for one in described.values():
            if one.get("use_pickle") and not allow_pickle:
                name = f"data/{kind}/{one['path_name']}"
                _check_pickle(path, name, archive.read(entries[name]))


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """What is in the archive by its path in the one folder there, as torch finds it.

    torch takes a name in any case, the first of two, and a file beside the folder for a program of
    an older version: what is read here could be another file than what torch reads.

    Raises:
        ValueError: it has any of these.
    """
    infos = archive.infolist()
    folders = {info.filename.partition("/")[0] for info in infos}
    entries = {info.filename.partition("/")[2]: info for info in infos}
    known = [name for name in entries if name.lower().startswith(("data/", "models/"))]
    if len(folders) != 1 or len({name.lower() for name in entries}) < len(infos):
        raise ValueError("two of its files have one name, or it has several folders")
    if "" in entries or any(name != name.lower() for name in known):
        raise ValueError("it has files that torch.export.save does not write")
    return entries


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    """Refuse a pickle that holds more than tensors and plain containers."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # of any kind: it is not what torch writes
        raise UsageError(
            f"{path}: `{name}` is a pickle of more than tensors, which can run code when it is "
            "read; pass `allow_pickle=True` if you trust its source"
        ) from error


def _check_values(path: Path, content: Any, *, trust: bool) -> None:
    for key, value in _strings(content):
        if key == "__enum__":
            raise UsageError(
                f"{path}: it names a class of Python for an input or output, and none is imported; "
                "export a model whose inputs are tensors and numbers"
            )
        if key == "expr_str" and not _is_arithmetic(value):
            raise UsageError(f"{path}: `{value[:80]}` is no expression of sizes; write it again")
        if key == "target" and (problem := _problem(value, trust=trust)):
            raise UsageError(f"{path}: {problem}")


def _strings(content: Any) -> Iterator[tuple[str, str]]:
    """Each key with its text; what is JSON inside of a text is looked into, too."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
            for key, inner in value.items():
                yield key, inner if isinstance(inner, str) else ""
        elif isinstance(value, str) and value[:1] in "[{":
            try:
                todo.append(parsed(value))
            except ValueError:
                continue


def _problem(target: str, *, trust: bool) -> str | None:
    """Why a node may not have this target, if so."""
    if _OF_NUMBERS.fullmatch(target) or not target:
        return None
    found = _OPERATION.fullmatch(target)
    if found is None:
        return f"its node `{target[:80]}` is no operation of a graph; export the model again"
    library, name = found[1], found[2]
    if library == "higher_order" and name in _HIGHER_ORDER:
        return None
    if library == "aten" and name in _OF_FILES:
        return f"its node `{target}` reads a file, and a program may not"
    if library in _LIBRARIES or trust:
        return None
    return (
        f"its node `{target}` is an operation of another library; pass `trust_remote_code=True` if "
        "you trust the file, and import that library"
    )


def _is_arithmetic(text: str) -> bool:
    """Whether it is a sum, a product or the like of sizes: no other name, no attribute, no call."""
    if len(text) > _LONGEST:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    words = {id(a) for c in ast.walk(tree) if isinstance(c, ast.Call) for a in c.args[:1]
             if isinstance(c.func, ast.Name) and c.func.id == "Symbol"}  # fmt: skip
    return all(_is_allowed(node, id(node) in words) for node in ast.walk(tree))


def _is_allowed(node: ast.AST, is_word: bool) -> bool:
    if isinstance(node, ast.Constant):
        number = isinstance(node.value, bool | int | float)
        return bool(_SYMBOL.fullmatch(str(node.value))) if is_word else number
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power = node.right.value if isinstance(node.right, ast.Constant) else None
        return isinstance(power, int) and 0 <= power <= _LARGEST_POWER
    return isinstance(node, _ARITHMETIC)
