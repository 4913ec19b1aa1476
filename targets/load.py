"""Load a converted model from its directory, whatever form it has."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from upcycle.errors import UsageError, is_out_of_memory, one_line
from upcycle.graphs.install import install
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.models.configuration import check_fields, class_named
from upcycle.models.load_options import DTYPES
from upcycle.routing.steering import Steering
from upcycle.targets.checkpoint import UPCYCLE_JSON
from upcycle.util.json_text import read_json
from upcycle.util.quiet import quiet_transformers
from upcycle.util.untrusted import untrusted_code


def load(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    trust_remote_code: bool = False,
    steering: str | Path | None = None,
) -> nn.Module:
    """Load a converted model, in eval mode and in the dtype that it was written in.

    Nothing that a file there names is imported or called. Models of transformers are built by the
    classes of upcycle and transformers.

    Args:
        directory: as `Conversion.save` or ``upcycle convert`` wrote it.
        model: for a plain module that was converted in memory: a dense instance, which is changed
            in place. Models of transformers need none.
        trust_remote_code: run Python code of the directory: needed where the dense model had code
            of its own.
        steering: a file of `upcycle steer`, by which the model routes from now on.

    Raises:
        UsageError: the directory is no output of upcycle or is damaged, or a plain module needs
            `model`, or code would have to run.
    """
    setting = None if steering is None else Steering.load(steering)
    loaded = _load(Path(directory), model, trust_remote_code)
    if setting is not None:
        setting.attach(loaded)
    return loaded


def _load(directory: Path, model: nn.Module | None, trust_remote_code: bool) -> nn.Module:
    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such directory")
    if (directory / "config.json").is_file():
        return _load_transformers(directory, trust_remote_code)
    description = directory / UPCYCLE_JSON
    if not description.is_file():
        raise UsageError(f"{directory}: neither config.json nor {UPCYCLE_JSON} is here")
    data = read_json(description)
    if model is None:
        named = data.get("factory") or data.get("class")
        raise UsageError(
            f"{directory}: give upcycle.load the dense model ({named}) as `model`; the directory "
            "has its weights and not its code"
        )
    return _load_module(directory, data, model)


def _load_module(directory: Path, description: dict[str, Any], model: nn.Module) -> nn.Module:
    tensors = read_tensors(directory)
    try:
        install(model, description["sites"])
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if name in tensors:
                parameter.data = parameter.data.to(tensors[name].dtype)
        own = {k: v for k, v in model.state_dict().items() if k.endswith(_EXTRA_STATE_KEY_SUFFIX)}
        model.load_state_dict({**own, **tensors}, strict=True)
    except ValueError as error:
        raise UsageError(f"{directory / UPCYCLE_JSON}: {error}") from error
    except (AttributeError, RuntimeError) as error:
        raise UsageError(
            f"{directory}: its weights are not those of a {type(model).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return model.eval()


def check_opens(directory: Path) -> None:
    """Open what was just written as far as it goes without reading numbers.

    Raises:
        UsageError: transformers cannot, or config.json does not describe the tensors of the files.
    """
    if (directory / "config.json").is_file():
        skeleton_of(directory, trust_remote_code=True)


def skeleton_of(directory: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a directory with a ``config.json``, on the meta device.

    Raises:
        UsageError: transformers cannot build it, or its files hold other tensors.
    """
    options = {"device_map": "meta", "ignore_mismatched_sizes": True}
    return _load_transformers(directory, trust_remote_code, **options)


def _load_transformers(directory: Path, trust_remote_code: bool, **options: Any) -> nn.Module:
    config = read_json(directory / "config.json")
    read_tensors(directory)  # says which file is damaged
    model_class = _class_of(directory, config)
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")  # transformers warns about its own classes
        try:
            model, info = model_class.from_pretrained(
                directory,
                trust_remote_code=trust_remote_code,
                dtype="auto",
                local_files_only=True,
                output_loading_info=True,
                **_kernel(config),
                **options,
            )
        except Exception as error:  # what a damaged config.json raises is of many types
            if is_out_of_memory(error):
                raise
            failed = UsageError(f"{directory}: transformers cannot load it: {one_line(error)}")
            raise untrusted_code(directory, "the model", error) or failed from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UsageError(
                f"{directory}: {len(info[problem])} {problem.replace('_', ' ')}, first "
                f"{min(map(str, info[problem]))}; the files do not fit config.json"
            )
    loaded: nn.Module = model.eval()
    compressor = getattr(getattr(loaded, "hf_quantizer", None), "compressor", None)
    if compressor is not None and not options:
        with quiet_transformers():  # else linear maps have no weights before the first forward
            compressor.decompress_model(loaded)
    return loaded


def _class_of(directory: Path, config: dict[str, Any]) -> Any:
    """The class of transformers, or the Auto class for one of another module, to load it with."""
    check_fields(directory / "config.json", config)
    written = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    autos = [(str(a), str(home)) for a, home in (config.get("auto_map") or {}).items()]
    # AutoModel last: it holds the classes that have no Auto class of their own
    autos.sort(key=lambda item: (item[0] == "AutoModel", item[0]))
    name = next((auto for auto, home in autos if home.endswith(f".{written}")), written)
    found = class_named(name)
    if found is None:
        raise UsageError(
            f"{directory / 'config.json'}: transformers {transformers.__version__} has no model "
            f"class {name}"
        )
    return found


def _kernel(config: dict[str, Any]) -> dict[str, str]:
    """``eager`` where torch's grouped_mm, the default, refuses a native architecture.

    It has no float64, and wants rows whose length in bytes is a multiple of 16.
    """
    size = DTYPES.get(str(config.get("dtype")), torch.float32).itemsize
    named = ("hidden_size", "moe_intermediate_size", "intermediate_size")
    widths = [config[name] for name in named if isinstance(config.get(name), int)]
    fits = size <= 4 and all(width * size % 16 == 0 for width in widths)
    return {} if fits or "auto_map" in config else {"experts_implementation": "eager"}
