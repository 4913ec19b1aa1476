"""Load a converted model from its directory, whatever form it has."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from upcycle.errors import UsageError, one_line
from upcycle.layers.tap import install
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.targets import remote_code
from upcycle.targets.checkpoint import UPCYCLE_JSON
from upcycle.util.json_text import read_json
from upcycle.util.named_callable import call_named
from upcycle.util.quiet import quiet_transformers


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a converted model, in eval mode and in the dtype that it was written in.

    A directory in the form ``remote_code`` brings its own Python file, which is run, as
    ``trust_remote_code=True`` does in transformers: load only what you trust.

    Args:
        directory: as `Conversion.save` or ``upcycle convert`` wrote it.
        model: for a plain module that was converted in memory: a dense instance, which is changed
            in place. Transformers models and ``package.module:callable`` models need none.

    Raises:
        UsageError: the directory is no output of upcycle or is damaged, or a plain module needs
            `model`.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return _load_transformers(directory)
    description = directory / UPCYCLE_JSON
    if not description.is_file():
        raise UsageError(f"{directory}: neither config.json nor {UPCYCLE_JSON} is here")
    data = read_json(description)
    if model is None:
        if not data["factory"]:
            raise UsageError(
                f"{directory}: give upcycle.load a dense {data['class']} as `model`; the directory "
                "has its weights and not its code"
            )
        model = call_named(data["factory"], nn.Module, "an nn.Module")
    return _load_module(directory, data, model)


def _load_module(directory: Path, description: dict[str, Any], model: nn.Module) -> nn.Module:
    tensors = read_tensors(directory)
    try:
        install(model, description["sites"])
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if name in tensors:
                parameter.data = parameter.data.to(tensors[name].dtype)
        model.load_state_dict(dict(tensors), strict=True)
    except ValueError as error:
        raise UsageError(f"{directory / UPCYCLE_JSON}: {error}") from error
    except (AttributeError, RuntimeError) as error:
        raise UsageError(
            f"{directory}: its weights are not those of a {type(model).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return model.eval()


def _load_transformers(directory: Path) -> nn.Module:
    config = read_json(directory / "config.json")
    read_tensors(directory)  # says which file is damaged
    has_code = (directory / remote_code.FILE).is_file()
    written = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    autos = config.get("auto_map", {}).items()
    # AutoModel last: it holds the classes that have no Auto class of their own
    autos = sorted(autos, key=lambda item: (item[0] == "AutoModel", item[0]))
    name = next((auto for auto, home in autos if home.endswith(f".{written}")), written)
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")  # transformers warns about its own classes
        try:
            model, info = getattr(transformers, name).from_pretrained(
                directory,
                trust_remote_code=has_code,
                dtype="auto",
                local_files_only=True,
                output_loading_info=True,
                **_kernel(config),
            )
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{directory}: transformers cannot load it: {one_line(error)}"
            ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UsageError(
                f"{directory}: {len(info[problem])} {problem.replace('_', ' ')}, first "
                f"{min(map(str, info[problem]))}; the files do not fit config.json"
            )
    loaded: nn.Module = model.eval()
    return loaded


def _kernel(config: dict[str, Any]) -> dict[str, str]:
    """``eager`` where torch's grouped_mm, the default, refuses a native architecture.

    It has no float64, and wants rows whose length in bytes is a multiple of 16.
    """
    size = getattr(torch, str(config.get("dtype", "float32"))).itemsize
    named = ("hidden_size", "moe_intermediate_size", "intermediate_size")
    widths = [config[name] for name in named if isinstance(config.get(name), int)]
    fits = size <= 4 and all(width * size % 16 == 0 for width in widths)
    return {} if fits or "auto_map" in config else {"experts_implementation": "eager"}
