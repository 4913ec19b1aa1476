"""The configuration of a Hugging Face directory, which is data and nothing else."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from upcycle.errors import UnsupportedError, UsageError, one_line
from upcycle.util.json_text import read_json
from upcycle.util.untrusted import check_links, untrusted_code

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
          "encoder_layers", "depth")  # fmt: skip
MAX_LAYERS = 2000  # building more takes minutes, and no model has a quarter of it


def read_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """The configuration of a Hugging Face directory.

    Raises:
        UsageError: config.json is no JSON, or names a model type that transformers does not know.
    """
    data = read_json(directory / "config.json")
    check_fields(directory / "config.json", data)
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if not trust_remote_code:  # no code is read, so none has to come with the result
            vars(config).pop("auto_map", None)
        return config
    except Exception as error:
        problem = UsageError(f"{directory}/config.json: {one_line(error)}")
        raise untrusted_code(directory, "the model", error) or problem from error


def check_fields(path: Path, data: dict[str, Any]) -> None:
    """Raise UsageError for a field that decides what is built, where it cannot be what it is."""
    classes, dtype = data.get("architectures"), data.get("dtype", data.get("torch_dtype"))
    wrong = None
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        wrong = "architectures"
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        wrong = "dtype"
    if not isinstance(data.get("auto_map") or {}, dict):
        wrong = "auto_map"
    parts = [data, *(part for part in data.values() if isinstance(part, dict))]
    counts = {name: part[name] for part in parts for name in LAYERS if name in part}
    for name, count in counts.items():
        if isinstance(count, int | float) and not 0 <= count <= MAX_LAYERS:
            wrong = name
    if wrong is not None:
        raise UsageError(f"{path}: its field {wrong} is damaged; copy or download it again")


def class_named(name: str) -> Any:
    """The model class, or Auto class, of transformers that a configuration names, or None."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model or (name.startswith("AutoModel") and found) else None


def check_files(directory: Path) -> None:
    """Refuse a directory that is no dense model, from the names of its files.

    Raises:
        UsageError: a file is a link that leads out of it.
        UnsupportedError: upcycle made it, or it holds an adapter beside a model.
    """
    check_links(directory)
    if (directory / "modeling_upcycle.py").is_file() or (directory / "upcycle.json").is_file():
        raise UnsupportedError(
            f"{directory}: it was made by upcycle and is a mixture of experts already; convert the "
            "dense model, or write other formats of it with `upcycle export`"
        )
    adapter = directory / "adapter_config.json"
    if adapter.is_file() and (directory / "config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise UnsupportedError(
            f"{directory}: it holds a PEFT adapter of {base} (adapter_config.json), which is not "
            "applied; merge it into its base and save that, or remove the file if it is merged"
        )


def check_dense(directory: Path, config: Any) -> None:
    """Raise UnsupportedError for quantised weights and for a mixture of experts."""
    check_floats(directory, getattr(config, "quantization_config", None))
    for field, count in count_of_experts(partial(_field, config)).items():
        raise UnsupportedError(
            f"{directory}: it is already a mixture of experts ({field} = {count}), and a "
            "conversion starts from a dense model; `upcycle export` writes other formats of it"
        )


def check_floats(directory: Path, quantised: Any) -> None:
    """Raise UnsupportedError if a configuration says how its weights are quantised."""
    if quantised:
        data = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = data.get("quant_method", "unknown method")
        raise UnsupportedError(
            f"{directory}: its weights are quantised ({method}); dequantise them and save the "
            "model first"
        )


def _field(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def count_of_experts(field: Callable[[str], Any]) -> dict[str, int]:
    """The fields of a configuration, asked for by name, that say that there are several experts."""
    named = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    counts = {name: field(name) for name in named}
    return {name: count for name, count in counts.items() if isinstance(count, int) and count > 1}


def with_text(config: Any) -> list[Any]:
    """The configuration and that of its language model, if that is another."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]
