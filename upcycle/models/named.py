"""Find the model that a user names: a directory, a repository, a file, or a Python callable."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import UpcycleError, UsageError
from upcycle.graphs.program import example_of
from upcycle.models import adapter
from upcycle.models.configuration import check_dense, read_config
from upcycle.models.dense import Source
from upcycle.models.load_options import device_named, dtype_named
from upcycle.models.places import Place, find
from upcycle.models.program_file import is_program
from upcycle.util.named_callable import call_named, inputs_named
from upcycle.util.progress import Progress, silent, step

if TYPE_CHECKING:
    from upcycle.models.onnx_file import OnnxSource


def open_model(
    model: str,
    *,
    inputs: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> "Source | OnnxSource":
    """Find the model that MODEL names; its weights are neither read nor downloaded.

    Raises:
        UsageError: there is no such model, or `inputs`, `dtype` or `device` is no good.
        UnsupportedError: its weights are quantised, or it is a mixture of experts already.
    """
    chosen = dtype_named(dtype)
    if model.endswith(".onnx") and not Path(model).is_dir():
        from upcycle.models.onnx_file import open_onnx  # onnx is not imported for other models

        example = call_named(inputs, dict, "a dict of tensors or arrays") if inputs else None
        elsewhere = device not in (None, "cpu")
        return open_onnx(model, example, {"dtype": dtype, "device": elsewhere})
    options: dict[str, Any] = {
        "example": inputs_named(inputs),
        "dtype": chosen,
        "device": device_named(device),
    }
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    if is_program(model):
        return _of_program(Source(model, None, **options, **trust))
    place = find(model, progress, **trust)
    if place is None:
        return Source(model, None, **options, **trust)
    if place.adapter is None:
        return _of(model, place, **options, **trust)
    base = _base(place.adapter, progress, trust)
    assert base.directory is not None
    held = replace(place, directory=base.directory, weights=partial(_merged, place, base))
    return _of(model, held, **options, **trust)


def _of_program(source: Source) -> Source:
    """With the inputs that the program was exported with, if the user gave none."""
    for name, value in (("dtype", source.dtype), ("device", source.device != "cpu")):
        if value:
            raise UsageError(
                f"{source.name}: `{name}`: a program keeps the type and the device that it was "
                "exported with; leave it out"
            )
    found = source.example if source.example is not None else example_of(source.program)
    if found is None:
        raise UsageError(f"{source.name}: it holds no example of its inputs; give `example_inputs`")
    source.example = found
    return source


def _of(name: str, place: Place, **options: Any) -> Source:
    source = Source(name, place.directory, hub=place.hub, weights=place.weights, **options)
    config = read_config(place.directory, trust_remote_code=source.trust_remote_code)
    check_dense(place.directory, config)
    return source


def _base(held: adapter.Adapter, progress: Progress, trust: dict[str, bool]) -> Source:
    """The model that an adapter belongs to."""
    try:
        place = find(held.base, progress, **trust)
        if place is None or place.adapter is not None:
            raise UsageError(f"{held.base}: it is no whole model; merge the two elsewhere")
        return _of(held.base, place, **trust)
    except UpcycleError as error:
        raise type(error)(f"{held.directory}: the base of this adapter: {error}") from error


def _merged(place: Place, base: Source, progress: Progress) -> Path:
    """The directory with the base and the adapter in one."""
    assert place.adapter is not None
    adapter.check_peft()
    if place.weights is not None:
        place.weights(progress)
    whole = base.fetched(progress)
    assert whole.directory is not None
    with step(progress, "merging the adapter"):
        return adapter.merged(place.adapter, whole.directory, whole)
