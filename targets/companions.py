"""Copy what a checkpoint directory holds beside its weights: tokenizer, templates, processors."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

WEIGHT_SUFFIXES = (
    *(".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".onnx_data", ".ot"),
    *(".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tflite"),
)
MAX_BYTES = 64 * 2**20  # the largest tokenizers are about half of this


def copy_companions(source: Path, destination: Path) -> list[str]:
    """Copy every small file of a dense model that is not weights, ``config.json`` or a README.

    Folders inside `source` are taken if a loader asks for them: ``additional_chat_templates``, and
    those that ``modules.json`` names (sentence-transformers). A file that `destination`, an
    existing directory, has already is left as it is. Returns the names of the copied files,
    relative to `destination`, sorted.
    """
    copied = []
    for path in sorted(source.iterdir()):
        if path.name != "config.json" and _is_companion(path):
            copied += _copy(path, destination, path.name)
    for folder in _folders(source):
        for path in sorted((source / folder).iterdir()):
            if _is_companion(path) or path.suffix == ".safetensors":
                copied += _copy(path, destination, f"{folder}/{path.name}")
    return sorted(copied)


def _is_companion(path: Path) -> bool:
    return (
        path.is_file()
        and not path.name.startswith(".")
        and not path.name.lower().startswith("readme")
        and not path.name.endswith(".index.json")
        and path.suffix.lower() not in WEIGHT_SUFFIXES
        and path.stat().st_size <= MAX_BYTES
    )


def _copy(path: Path, destination: Path, name: str) -> list[str]:
    target = destination / name
    if target.exists():
        return []
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    return [name]


def _folders(source: Path) -> list[str]:
    names = ["additional_chat_templates"]
    modules = source / "modules.json"
    if modules.is_file():
        # another file of this name is copied and otherwise left alone
        with suppress(ValueError, KeyError, TypeError):
            names += [str(module["path"]) for module in json.loads(modules.read_text("utf-8"))]
    return [n for n in names if n and n == Path(n).name and (source / n).is_dir()]
