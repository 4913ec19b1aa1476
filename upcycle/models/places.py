"""Where MODEL is: a directory, a file in one, a sample, or a repository of a hub.

Configuration and tokenizer are there at once. `Place.weights` brings the weights when they are
needed: from the hub, or out of a GGUF file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from glob import escape
from itertools import islice
from pathlib import Path

from upcycle.errors import UsageError
from upcycle.ir.report import HubSource
from upcycle.models import gguf_file, hub, samples
from upcycle.models.adapter import CONFIG, PICKLE, WEIGHTS, Adapter, read_adapter
from upcycle.models.checkpoint_tensors import INDEX, PICKLE_SUFFIXES, SINGLE
from upcycle.models.configuration import check_files
from upcycle.util.json_text import read_json
from upcycle.util.progress import Progress

Fetch = Callable[[Progress], Path]
MODEL = (
    "MODEL is a Hugging Face directory, a hub id (org/name), a .gguf, .onnx or .pt2 file, a PEFT "
    "adapter, sample:NAME or package.module:callable"
)


@dataclass(frozen=True)
class Place:
    """A model on this machine, or on its way to it.

    Attributes:
        directory: has the configuration and the tokenizer; of an adapter, only the adapter.
        weights: brings them, and returns the directory that has all; None if that is `directory`.
        hub: the repository that it comes from.
        adapter: what is there instead of a model.
    """

    directory: Path
    weights: Fetch | None = None
    hub: HubSource | None = None
    adapter: Adapter | None = None


def find(
    model: str, progress: Progress, *, trust_remote_code: bool, allow_pickle: bool
) -> Place | None:
    """The place of a model; None for a Python callable.

    Raises:
        UsageError: there is no such model, or no configuration with it.
        UnsupportedError: upcycle made it, or it is an adapter that cannot be merged.
    """
    if model.startswith(samples.PREFIX):
        return Place(samples.path(model))
    path = Path(model)
    if path.is_dir():
        return _in_directory(path)
    if path.exists():
        return _of_file(path)
    if (named := hub.parsed(model)) is not None:
        try:
            _refuse_sample(model)
            found = hub.snapshot(named, trust_remote_code=trust_remote_code)
        except hub.NotFoundError as error:
            raise UsageError(f"{error}{_hint(model)}") from error
        return _in_repository(named, found, progress, allow_pickle=allow_pickle)
    if ":" in model and "/" not in model.partition(":")[0] and not model.endswith(".gguf"):
        return None
    raise UsageError(f"{model}: there is no such file or directory{_hint(model)}; {MODEL}")


def _in_directory(directory: Path) -> Place:
    check_files(directory)
    names = [path.name for path in directory.iterdir()]
    weights = [name for name in names if name.endswith((".safetensors", *PICKLE_SUFFIXES))]
    if not weights and any(name.lower().endswith(gguf_file.SUFFIX) for name in names):
        return _of_gguf(directory / gguf_file.chosen(f"{directory}/", names))
    if (directory / "config.json").is_file():
        return Place(directory)
    if (directory / CONFIG).is_file():
        return Place(directory, adapter=read_adapter(directory))
    raise UsageError(f"{directory}: not a model directory, it has no config.json; {MODEL}")


def _of_file(path: Path) -> Place:
    """What a file means: a GGUF file is a model, one of a model directory its directory."""
    folder, index = path.parent, path.parent / INDEX
    if path.suffix.lower() == gguf_file.SUFFIX:
        return _of_gguf(path)
    parts = read_json(index).get("weight_map") if index.is_file() else None
    known = {"config.json", SINGLE, INDEX, *(parts.values() if isinstance(parts, dict) else ())}
    if path.name in known and (folder / "config.json").is_file():
        return _in_directory(folder)
    if path.name in (CONFIG, WEIGHTS) and (folder / CONFIG).is_file():
        return _in_directory(folder)
    if path.suffix == ".safetensors":
        raise UsageError(
            f"{path}: a file of weights, and no model directory names it; put config.json beside "
            f"it, call it {SINGLE}, and give the directory"
        )
    if path.suffix in PICKLE_SUFFIXES:
        raise UsageError(
            f"{path}: a pickle file says no configuration; give its directory, with config.json "
            "and `allow_pickle=True`, or a Python function that loads it (package.module:callable)"
        )
    raise UsageError(f"{path}: not a model; {MODEL}")


def _of_gguf(path: Path) -> Place:
    return Place(gguf_file.configuration(path), partial(gguf_file.unpacked, path))


def _in_repository(
    named: hub.HubId, found: hub.Snapshot, progress: Progress, *, allow_pickle: bool
) -> Place:
    origin = HubSource(found.repo, found.commit, named.file)
    safe = [name for name in found.files if name.endswith(".safetensors")]
    ggufs = [name for name in found.files if name.lower().endswith(gguf_file.SUFFIX)]
    if named.file is not None or (ggufs and not safe):
        file = named.file or gguf_file.chosen(f"{found.repo}:", ggufs)
        if file not in ggufs:
            listed = f"it has {', '.join(ggufs)}" if ggufs else "it has no GGUF file"
            raise UsageError(f"{found.repo}: there is no {file}; {listed}")
        found.fetch([escape(file)], progress)
        return replace(_of_gguf(found.directory / file), hub=replace(origin, file=file))
    check_files(found.directory)
    weights = partial(_with_weights, found, allow_pickle)
    if (found.directory / "config.json").is_file():
        return Place(found.directory, weights, origin)
    if (found.directory / CONFIG).is_file():
        return Place(found.directory, weights, origin, read_adapter(found.directory))
    raise UsageError(
        f"{found.repo}: it has no config.json, so it is no model of transformers; name another "
        "repository, or download it and give a directory that has one"
    )


def _with_weights(found: hub.Snapshot, allow_pickle: bool, progress: Progress) -> Path:
    """The snapshot with its safetensors files, or with its pickle files where only those are."""
    config = found.directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    wanted = [*hub.WEIGHTS, *([escape(named)] if isinstance(named, str) else [])]
    pickles = (PICKLE, "pytorch_model.bin", "pytorch_model.bin.index.json")
    main = {SINGLE, INDEX, WEIGHTS, named}
    if not main & set(found.files) and any(name in pickles for name in found.files):
        if not allow_pickle:
            raise UsageError(
                f"{found.repo}: its weights are pickle files, which can run code when they are "
                "read; name a revision with safetensors, or pass `allow_pickle=True` if you trust "
                "its source"
            )
        wanted += hub.PICKLES
    elif found.sizes is not None and not main & set(found.files):
        raise UsageError(f"{found.repo}: it has no {SINGLE}; name a repository with safetensors")
    return found.fetch(wanted, progress)


def _refuse_sample(model: str) -> None:
    if model in samples.SAMPLES:
        raise hub.NotFoundError(f"{model}: there is no such directory")


def _hint(model: str) -> str:
    """What `model` was perhaps meant to be: a sample, or a directory beside it."""
    if near := get_close_matches(model, samples.SAMPLES, n=1, cutoff=0.75):
        return f"; did you mean {samples.PREFIX}{near[0]}?"
    path = Path(model)
    beside = path.parent.iterdir() if path.parent.is_dir() else iter(())
    names = [one.name for one in islice(beside, 1000) if not one.name.startswith(".")]
    if near := get_close_matches(path.name, names, n=1, cutoff=0.75):
        return f"; did you mean {path.parent / near[0]}?"
    return ""
