"""Read the tensors of a checkpoint directory by name, each only when it is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from upcycle.errors import UsageError
from upcycle.util.json_text import read_json
from upcycle.util.lazy_tensors import LazyTensors
from upcycle.util.untrusted import inside, without_escape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MAPPED = 2**28  # bytes
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


class SafetensorsReader:
    """Reads tensors by name out of one or several safetensors files.

    Only the file that was used last is kept mapped by this object, and it is mapped anew after each
    `MAPPED` bytes of tensors: pages that were read count as memory of the process as long as their
    mapping lives.
    """

    def __init__(self, file_of: Mapping[str, Path]) -> None:
        self._file_of = file_of
        self._open: tuple[Path, Any] | None = None
        self._given = 0

    def __call__(self, name: str) -> torch.Tensor:
        """A view of the memory-mapped file, so asking for its shape reads nothing."""
        path = self._file_of[name]
        held = self._open  # another thread may put another file there
        if held is None or held[0] != path or self._given > MAPPED:
            self._open = held = (path, _safe_open(path))
            self._given = 0
        tensor: torch.Tensor = held[1].get_tensor(name)
        self._given += tensor.nbytes
        return tensor


def read_tensors(source: Path, *, allow_pickle: bool = False) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint, by name, in the order of its files.

    Headers are read at once, so a damaged file is reported here; tensors are read when they are
    asked for. Pickle files are loaded with torch's restricted unpickler, one after the other.

    Args:
        source: a directory in the layout of Hugging Face, or one safetensors or pickle file.
        allow_pickle: also read ``.bin``, ``.pt`` and ``.pth`` files, which can hold code.

    Raises:
        UsageError: there are no weights, a file is missing or damaged, or a pickle file is met
            and not allowed.
    """
    if not source.exists():
        raise UsageError(f"{source}: no such file or directory")
    if source.is_file() and source.suffix in PICKLE_SUFFIXES:
        return _read_pickles([source], allow_pickle)
    named = _named_weights(source) if source.is_dir() else None
    if named is not None and named.name.endswith(".index.json"):
        return _mapped(_checked_index(named))
    single = named or (source if source.is_file() else source / SINGLE)
    if single.is_file():
        return _mapped(_names_in([single]))
    if (source / INDEX).is_file():
        return _mapped(_checked_index(source / INDEX))
    if (source / PICKLE_INDEX).is_file():
        return _read_pickles(_shards_of(_read_index(source / PICKLE_INDEX), source), allow_pickle)
    pickles = sorted(p for p in source.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if not pickles:
        raise UsageError(f"{source}: there is neither {SINGLE} nor {INDEX}; is it a checkpoint?")
    main = source / "pytorch_model.bin"
    return _read_pickles([main] if main in pickles else pickles, allow_pickle)


def has_weights(directory: Path, *, allow_pickle: bool = False) -> bool:
    """Whether a directory holds weights that `read_tensors` reads."""
    kinds = (".safetensors", ".safetensors.index.json", *(PICKLE_SUFFIXES if allow_pickle else ()))
    return any(path.name.endswith(kinds) for path in directory.iterdir())


def has_metadata(directory: Path) -> bool:
    """Whether the index of a directory has what transformers looks up there; else true."""
    index = directory / INDEX
    return not index.is_file() or "metadata" in read_json(index)


def _named_weights(directory: Path) -> Path | None:
    """The file that ``transformers_weights`` of config.json names, if it does."""
    config = directory / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    return None if name is None else inside(directory, str(name), config.name)


def _mapped(file_of: Mapping[str, Path]) -> LazyTensors:
    return LazyTensors(file_of, SafetensorsReader(file_of))


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(without_escape(path, path.parent), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _names_in(paths: list[Path]) -> dict[str, Path]:
    return {name: path for path in paths for name in _safe_open(path).offset_keys()}


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{index}: not an index of weight files; download it again") from error


def _shards_of(weight_map: Mapping[str, str], directory: Path) -> list[Path]:
    shards = [inside(directory, name, "the index") for name in sorted(set(weight_map.values()))]
    for path in shards:
        if not path.is_file():
            raise UsageError(f"{path}: the index names this file and it is missing; download it")
    return shards


def _checked_index(index: Path) -> dict[str, Path]:
    weight_map = _read_index(index)
    present = _names_in(_shards_of(weight_map, index.parent))
    for name, file in weight_map.items():
        if present.get(name) != index.parent / file:
            raise UsageError(
                f"{index}: says that {name} is in {file}, and it is not; download both again"
            )
    return {name: path for name, path in present.items() if name in weight_map}


def _read_pickles(paths: list[Path], allow_pickle: bool) -> dict[str, torch.Tensor]:
    if not allow_pickle:
        raise UsageError(
            f"{paths[0]}: a pickle file, which can run code when it is read; "
            f"convert it to safetensors, or pass `allow_pickle=True` if you trust its source"
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types, and none says which file
            raise UsageError(f"{path}: torch cannot read it as plain tensors ({error})") from error
        if not isinstance(content, dict):
            raise UsageError(f"{path}: holds a {type(content).__name__}, not tensors by name")
        tensors |= {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    return tensors
