"""PEFT adapters: the directory of one stands for its base with the adapter merged into it."""

import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from upcycle.errors import UnsupportedError, UpcycleError, UsageError, is_out_of_memory, one_line
from upcycle.models.companions import copy_companions
from upcycle.models.unpacked import kept
from upcycle.util.json_text import read_json
from upcycle.util.quiet import quiet_transformers
from upcycle.util.untrusted import names_code

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# The kinds that are a change of the base's own weights, and read nothing else.
MERGED = ("LORA", "IA3", "LOHA", "LOKR", "OFT", "HRA")


@dataclass(frozen=True)
class Adapter:
    """An adapter, and what its configuration says it belongs to."""

    directory: Path
    base: str


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory; its weights are not read.

    Raises:
        UsageError: its configuration names no base model, or names Python code.
        UnsupportedError: it is of a kind that cannot be merged.
    """
    path = directory / CONFIG
    data = read_json(path)
    kind, base, revision = (
        data.get(field) for field in ("peft_type", "base_model_name_or_path", "revision")
    )
    if kind not in MERGED:
        raise UnsupportedError(
            f"{directory}: a PEFT adapter of the kind {kind}, which is not merged here; merge it "
            f"with peft, save the model and convert that ({', '.join(MERGED)} are merged)"
        )
    if data.get("megatron_config"):  # peft imports the package that it names
        raise UnsupportedError(
            f"{path}: an adapter of Megatron, whose configuration names Python code; merge it with "
            "peft, save the model and convert that"
        )
    if not isinstance(base, str) or not base or names_code(base):
        raise UsageError(
            f"{path}: its base_model_name_or_path is {base!r}, which names no model; write the "
            "directory or the hub id of the base there"
        )
    if isinstance(revision, str) and not Path(base).exists() and "@" not in base:
        base = f"{base}@{revision}"
    return Adapter(directory, base)


def check_weights(directory: Path, *, allow_pickle: bool) -> Path:
    """The file with the weights of an adapter.

    Raises:
        UsageError: there is none, or a pickle file that is not allowed.
    """
    if (directory / WEIGHTS).is_file():
        return directory / WEIGHTS
    if not (directory / PICKLE).is_file():
        raise UsageError(f"{directory}: it has no {WEIGHTS}; copy or download it again")
    if not allow_pickle:
        raise UsageError(
            f"{directory / PICKLE}: a pickle file, which can run code when it is read; save the "
            "adapter as safetensors, or pass `allow_pickle=True` if you trust its source"
        )
    return directory / PICKLE


def check_peft() -> Any:
    """The package peft.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UsageError(
            f"a PEFT adapter is merged by peft, which cannot be imported ({one_line(error)}); "
            "`pip install peft`, or merge it elsewhere"
        ) from error


class Base(Protocol):
    """What is asked of the base model: `upcycle.models.dense.Source` has it."""

    trust_remote_code: bool
    allow_pickle: bool

    def load(self) -> nn.Module:
        """The model, which is changed in place."""
        ...


def merged(adapter: Adapter, folder: Path, base: Base) -> Path:
    """A directory in the cache with the base model and the adapter merged into it.

    Args:
        adapter: with its weights.
        folder: of the base, for its tokenizer; that of the adapter comes first.
        base: the model; pickles and Python files are taken if they may be of it.

    Raises:
        UsageError: the adapter is damaged, or does not fit the base.
    """
    weights = check_weights(adapter.directory, allow_pickle=base.allow_pickle)
    files = [weights, adapter.directory / CONFIG]
    files += [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")]

    def make(made: Path) -> None:
        model = _apply(adapter, base.load())
        with quiet_transformers():
            model.save_pretrained(made)
        for source in (folder, adapter.directory):
            copy_companions(source, made, trust_remote_code=base.trust_remote_code)

    return kept(adapter.directory.name, files, make)


def _apply(adapter: Adapter, model: nn.Module) -> Any:
    """The base with the adapter merged into its weights."""
    peft = check_peft()
    where = f"{adapter.directory}: the adapter does not fit {adapter.base}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(adapter.directory))
            config.inference_mode = True
            wrapped = peft.get_peft_model(model, config)
            stored = peft.load_peft_weights(str(adapter.directory), device="cpu")
            found = peft.set_peft_model_state_dict(wrapped, stored)
    except UpcycleError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{where}: {one_line(error)}") from error
    lacking = [name for name in found.missing_keys if ".default" in name]
    for problem, names in (("has", found.unexpected_keys), ("lacks", lacking)):
        if names:
            raise UsageError(f"{where}: it {problem} {names[0]}; is it of another model?")
    return wrapped.merge_and_unload(safe_merge=True)
