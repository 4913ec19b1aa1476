"""The models that experts are taken from: open them, hold them against the dense one, merge them.

They have to be the dense model with other numbers: the same class, shapes, tied weights, and the
same configuration wherever it says what is computed.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from upcycle.errors import UsageError
from upcycle.models.checkpoint_fit import fit, lacking
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.models.dense import Source
from upcycle.models.named import open_model
from upcycle.models.tokenizer import tokenizer_in
from upcycle.util.copies import copy_of, tensors_of
from upcycle.util.lazy_tensors import LazyTensors

BASE = "base"
MAX_OTHER_TOKENS = 0.01  # of a vocabulary
log = logging.getLogger(__name__)
# Fields of a configuration that do not change what a model computes in evaluation mode.
_FREE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
         "use_cache", "id2label", "label2id", "initializer_range", "initializer_factor",
         "task_specific_params", "problem_type", "max_position_embeddings")  # fmt: skip
_FREE_ENDINGS = ("_token_id", "dropout", "_dropout_prob", "_pdrop", "drop_rate")


@dataclass(frozen=True)
class Sources:
    """Models of one shape, in the order of the recipe.

    Attributes:
        names: as the recipe has them; a model that was given as a module is called by its class.
        tensors: of each, by the names of the dense model, in its dtypes and on its device; read
            when they are asked for, where the model is a directory of safetensors files.
        directories: of those that are read from files, each once.
    """

    names: tuple[str, ...]
    tensors: tuple[Mapping[str, torch.Tensor], ...]
    directories: tuple[Path, ...] = ()


NO_SOURCES = Sources((), ())


def open_sources(
    wanted: Sequence[nn.Module | str | Path],
    model: nn.Module,
    like: Source | None = None,
    held: Mapping[str, torch.Tensor] | None = None,
) -> Sources:
    """Open the models that experts are taken from.

    Args:
        wanted: modules, or models as the command line names them; ``base`` is `model`.
        model: the dense model that is converted; on the meta device, only shapes can be read.
        like: where `model` comes from: what is allowed there is allowed here.
        held: the tensors of `model`, where it is on the meta device.

    Raises:
        UsageError: one of them is no such model, or has another architecture, other shapes, other
            tied weights, or lacks a tensor.
    """
    held = tensors_of(model) if held is None else held
    opened: dict[object, Mapping[str, torch.Tensor]] = {BASE: held}
    names, tensors, directories = [], [], []
    for one in wanted:
        name = type(one).__qualname__ if isinstance(one, nn.Module) else str(one)
        key: object = one if isinstance(one, nn.Module) else name
        if one is model:
            name = key = BASE
        if key not in opened:
            found, directory = _open(name, one, model, like)
            opened[key] = _like(found, held)
            directories += [directory] if directory else []
        names.append(name)
        tensors.append(opened[key])
    return Sources(tuple(names), tuple(tensors), tuple(directories))


def check_sources(wanted: Sequence[str], skeleton: nn.Module, like: Source) -> None:
    """Refuse what `open_sources` would refuse, without reading a weight."""
    for name in wanted:
        if name != BASE:
            source = _find(name, like)
            _check_same(name, skeleton, source.skeleton())
            _check_tokenizer(name, source, like)


def merged(model: nn.Module, sources: Sources, merge: str | int) -> nn.Module:
    """A copy of `model` with the weights that the sources have in common.

    `merge` is the ``mean`` of all (one that is listed twice counts twice), which is taken in
    float64, the ``first``, or a number. Integer buffers are those of `model`.
    """
    made = copy_of(model)
    state = tensors_of(made)
    with torch.no_grad():
        for name, tensor in merged_tensors(state, sources, merge).items():
            state[name].copy_(tensor)
    return made


def merged_tensors(
    held: Mapping[str, torch.Tensor], sources: Sources, merge: str | int
) -> LazyTensors:
    """What `merged` holds, one tensor at a time: `held`, in its dtypes, after the sources."""
    chosen = sources.tensors
    if merge != "mean":
        chosen = (chosen[0 if merge == "first" else int(merge)],)

    def read(name: str) -> torch.Tensor:
        ours = held[name]
        if not ours.is_floating_point() or not all(name in tensors for tensors in chosen):
            return ours
        total = sum(tensors[name].double() for tensors in chosen)
        return torch.as_tensor(total / len(chosen)).to(ours.dtype)

    return LazyTensors(held, read)


def _like(tensors: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> LazyTensors:
    """The tensors that `held` has, too, in its dtypes and on its devices."""
    names = (name for name in tensors if name in held)
    return LazyTensors(names, lambda name: tensors[name].detach().to(held[name]))


def _find(name: str, like: Source | None) -> Source:
    source = open_model(
        name,
        trust_remote_code=like is not None and like.trust_remote_code,
        allow_pickle=like is not None and like.allow_pickle,
    )
    if not isinstance(source, Source):
        raise UsageError(f"{name}: experts cannot be taken from an ONNX file; give the model")
    return source


def _open(
    name: str, one: Any, model: nn.Module, like: Source | None
) -> tuple[Mapping[str, torch.Tensor], Path | None]:
    """The tensors of a model, and its directory."""
    if isinstance(one, nn.Module):
        _check_same(name, model, one)
        return tensors_of(one), None
    source = _find(name, like).fetched()
    skeleton = source.skeleton()
    _check_same(name, model, skeleton)
    if source.directory is not None and any(source.directory.glob("*.safetensors")):
        found = fit(source.directory, read_tensors(source.directory), skeleton)
        if not isinstance(found, str):
            return found.tensors, source.directory
    tensors: Mapping[str, torch.Tensor] = tensors_of(source.load())
    if (missing := lacking(tensors, model)) is not None:
        raise UsageError(f"{name}: it has no tensor {missing}, which the dense model has")
    return tensors, source.directory


def _check_same(name: str, model: nn.Module, other: nn.Module) -> None:
    ours, theirs = type(model).__qualname__, type(other).__qualname__
    if ours != theirs:
        raise UsageError(
            f"{name}: it is a {theirs}, and the dense model is a {ours}; experts are taken from "
            "models of one architecture"
        )
    shapes = [
        {n: p.shape for n, p in module.named_parameters(remove_duplicate=False)}
        for module in (model, other)
    ]
    for tensor in dict.fromkeys([*shapes[0], *shapes[1]]):
        mine, its = (found.get(tensor) for found in shapes)
        if its is None or mine is None:
            owner = "it" if its is None else "the dense model"
            raise UsageError(f"{name}: {owner} has no tensor {tensor}, and the other model has")
        if mine != its:
            raise UsageError(
                f"{name}: {tensor} is {list(its)}, and {list(mine)} in the dense model; experts "
                "are taken from models of one shape"
            )
    mine_tied, its_tied = (_tied(module) for module in (model, other))
    for tensor in sorted(mine_tied ^ its_tied):
        word = "is tied to another tensor" if tensor in its_tied else "is a tensor of its own"
        raise UsageError(
            f"{name}: {tensor} {word}, unlike in the dense model; save both the same way"
        )
    fields, its_fields = (_computing(getattr(module, "config", None)) for module in (model, other))
    for field in sorted({*fields, *its_fields}):
        if fields.get(field) != its_fields.get(field):
            raise UsageError(
                f"{name}: its configuration has {field} = {its_fields.get(field)}, and the dense "
                f"model's {fields.get(field)}; the two do not compute the same from the same "
                "weights"
            )


def _tied(module: nn.Module) -> set[str]:
    """The names of parameters that have another name, too."""
    first, every = module.named_parameters(), module.named_parameters(remove_duplicate=False)
    return dict(every).keys() - dict(first).keys()


def _computing(config: object) -> dict[str, object]:
    """The fields that say what is computed; those of a tower as ``tower.field``."""
    data = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    found: dict[str, object] = {}
    for field, value in data.items() if isinstance(data, dict) else ():
        if field in _FREE or str(field).endswith(_FREE_ENDINGS):
            continue
        if isinstance(value, dict):
            found |= {f"{field}.{inner}": held for inner, held in _computing(value).items()}
        else:
            found[str(field)] = value
    return found


def _check_tokenizer(name: str, source: Source, like: Source) -> None:
    """Refuse a model that reads other tokens: its rows of an embedding mean something else.

    A few may differ: models give reserved tokens a name of their own.
    """
    ours, theirs = (
        tokenizer_in(one.directory, trust_remote_code=one.trust_remote_code)
        for one in (like, source)
    )
    if ours is None or theirs is None:
        return
    mine, its = ({i: token for token, i in t.get_vocab().items()} for t in (ours, theirs))
    other = sorted(i for i in mine.keys() & its.keys() if mine[i] != its[i])
    if len(other) > MAX_OTHER_TOKENS * len(mine):
        raise UsageError(
            f"{name}: its tokenizer is another: token {other[0]} is {its[other[0]]!r} there and "
            f"{mine[other[0]]!r} in the dense model; experts are taken from models with one "
            "vocabulary"
        )
    if other:
        log.warning("%s: %d tokens have another name than in the dense model", name, len(other))
