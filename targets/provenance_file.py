"""``provenance.json``: what each converted layer is, and the dense neuron behind each neuron.

Neuron i of an expert is row i of its gate and up matrices and column i of its down matrix. They are
written as runs, in their order: ``0-383 500 zero*2 new*3`` are the dense neurons 0 to 383, then
500, two of zero padding, and three that were drawn anew.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from upcycle.errors import UsageError, one_line
from upcycle.ir.spec import Plan
from upcycle.ir.weights import Provenance
from upcycle.util.json_text import read_json

FILE = "provenance.json"
MOST = 2**26  # neurons of a layer: none has a tenth of it
PADDING, DRAWN = -1, -2  # in the place of a dense neuron
_WORDS = {PADDING: "zero", DRAWN: "new"}


class LayerOrigin(TypedDict):
    """A layer in the file.

    Where experts were removed or renumbered afterwards, `was` has the number of each of them in the
    conversion.
    """

    path: str
    dense_neurons: int
    method: str
    router: str
    compensate: dict[str, Any]
    promise: str
    layer: dict[str, Any]
    sources: list[str]
    experts: list[str]
    shared: str
    was: NotRequired[list[int]]


_LAYERS = TypeAdapter(list[LayerOrigin])


def runs(neurons: Iterable[int]) -> str:
    """The neurons as runs; see `PADDING` and `DRAWN`."""
    parts = []
    for _, group in groupby(enumerate(neurons), key=lambda pair: _run(*pair)):
        found = [neuron for _, neuron in group]
        first, last = found[0], found[-1]
        if first in _WORDS:
            parts.append(f"{_WORDS[first]}*{len(found)}")
        else:
            parts.append(f"{first}-{last}" if last > first else f"{first}")
    return " ".join(parts)


def _run(index: int, neuron: int) -> tuple[bool, int]:
    """Equal for neighbours of one run: dense neurons that count up, or equal words."""
    return (True, neuron - index) if neuron >= 0 else (False, neuron)


def runs_of(text: str) -> Iterator[tuple[int, int]]:
    """The first neuron and the length of each run that `runs` wrote.

    Raises:
        ValueError: the text is damaged.
    """
    words = {word: value for value, word in _WORDS.items()}
    for part in text.split():
        word, _, times = part.partition("*")
        if word in words:
            neuron, count = words[word], int(times)
        else:
            first, _, last = part.partition("-")
            neuron, count = int(first), int(last or first) + 1 - int(first)
        if count < 1:
            raise ValueError(f"{part}: no neurons")
        yield neuron, count


def neurons_of(text: str, most: int = MOST) -> list[int]:
    """The neurons that `runs` wrote.

    Raises:
        ValueError: the text is damaged, or names more than `most` neurons.
    """
    found: list[int] = []
    for neuron, count in runs_of(text):
        if len(found) + count > most:
            raise ValueError(f"{neuron}: at most {most} neurons can be here")
        found += [neuron] * count if neuron in _WORDS else range(neuron, neuron + count)
    return found


def rows_of(layer: LayerOrigin) -> tuple[list[list[int]], list[int]]:
    """The neurons of the experts and of the shared expert of a layer in the file.

    Raises:
        KeyError, TypeError, ValueError: the layer is damaged.
    """
    width, shared = layer["layer"]["width"], layer["layer"]["shared"]
    if layer["sources"] and len(layer["sources"]) != len(layer["experts"]):
        raise ValueError("its sources are not those of its experts")
    if len(layer["experts"]) * int(width) + int(shared) > MOST:
        raise ValueError(f"{len(layer['experts'])} experts of {width} neurons are too many")
    if len(layer["experts"]) != layer["layer"]["num_experts"]:
        raise ValueError(f"it has {layer['layer']['num_experts']} experts and other rows")
    experts = [neurons_of(row, width) for row in layer["experts"]]
    always = neurons_of(layer["shared"], shared)
    if {len(row) for row in experts} != {width} or len(always) != shared:
        raise ValueError("its experts have more neurons than rows")
    return experts, always


def write_origins(directory: Path, plan: Plan, provenance: Mapping[str, Provenance]) -> None:
    """Write the file, one line for each layer; `provenance` is by FFN path."""
    layers: list[LayerOrigin] = []
    for spec in plan.specs:
        origin = provenance[spec.ffn.path]
        names = spec.experts.sources
        layer: LayerOrigin = {
            "path": spec.ffn.path,
            "dense_neurons": spec.ffn.d_ff,
            "method": spec.experts.method,
            "router": spec.router.method,
            "compensate": spec.compensate.model_dump(mode="json", exclude_defaults=True),
            "promise": spec.promise,
            "layer": spec.layer_config().to_json(),
            "sources": [names[source] for source in spec.source_E],
            "experts": [runs(row) for row in origin.expert_EI.tolist()],
            "shared": runs(origin.shared_S.tolist()),
        }
        layers.append(layer)
    write_layers(directory, layers)


def write_layers(directory: Path, layers: Iterable[LayerOrigin]) -> None:
    """Write the file, one line for each layer."""
    lines = map(json.dumps, layers)
    text = '{"version": 1, "layers": [\n' + ",\n".join(lines) + "\n]}\n"
    (directory / FILE).write_text(text, encoding="utf-8")


def read_origins(directory: Path) -> list[LayerOrigin] | None:
    """The layers of the file, or None where an older version of upcycle wrote none.

    Raises:
        UsageError: the file is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        return _LAYERS.validate_python(read_json(path, "convert the model again").get("layers"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("layers", *first["loc"])))
        raise UsageError(
            f"{path}: not what this version of upcycle writes ({place}: {first['msg'].lower()}); "
            "convert the model again"
        ) from error


def provenance_in(directory: Path) -> dict[str, Provenance]:
    """The dense neurons behind each layer, by path of its FFN; none where the file is not.

    Raises:
        UsageError: the file is damaged.
    """
    found = {}
    for layer in read_origins(directory) or ():
        try:
            found[layer["path"]] = _provenance(layer)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(directory, error) from error
    return found


def _provenance(layer: LayerOrigin) -> Provenance:
    experts, shared = rows_of(layer)
    return Provenance(
        torch.tensor(experts, dtype=torch.int64), torch.tensor(shared, dtype=torch.int64)
    )


def _damaged(directory: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{directory / FILE}: not what upcycle writes ({one_line(error)}); convert the model again"
    )


def with_experts(
    layers: Sequence[LayerOrigin], chosen: Mapping[str, Sequence[int]]
) -> list[LayerOrigin] | None:
    """The layers with these of their experts, in this order; `chosen` is by path.

    None if the file is one of other layers. A layer that loses experts is ``approximate``.
    """
    if len(layers) != len(chosen):
        return None
    paths = [layer["path"] for layer in layers]
    # A native block may have another name than the FFN that it was made of, in the same order.
    known = [chosen[p] for p in paths] if set(paths) == set(chosen) else [*chosen.values()]
    both = list(zip(layers, known, strict=True))
    if any(max(experts) >= len(layer["experts"]) for layer, experts in both):
        return None
    return [_with_experts(layer, experts) for layer, experts in both]


def _with_experts(layer: LayerOrigin, experts: Sequence[int]) -> LayerOrigin:
    made, count = layer["layer"], len(experts)
    was = layer.get("was") or range(len(layer["experts"]))
    return {
        **layer,
        "promise": layer["promise"] if count == len(layer["experts"]) else "approximate",
        "layer": made | {"num_experts": count, "router": made["router"] | {"num_experts": count}},
        "sources": [layer["sources"][e] for e in experts] if layer["sources"] else [],
        "experts": [layer["experts"][e] for e in experts],
        "was": [was[e] for e in experts],
    }


def as_made(plan: Plan, directory: Path) -> tuple[Plan, dict[str, Provenance]]:
    """The plan with the widths that the layers in `directory` have, and their provenance.

    A recipe may choose widths from its data, and in older versions all experts had one output bias
    in common. Without ``provenance.json``, which those did not write, the layers are taken to be as
    planned then.

    Raises:
        UsageError: the file is damaged, or the layers are those of another model.
    """
    layers = read_origins(directory)
    if layers is None:
        specs = tuple(replace(spec, expert_bias=False) for spec in plan.specs)
        return replace(plan, specs=specs), {}
    there, sizes, provenance = [], [], {}
    try:
        for layer in layers:
            made = layer["layer"]
            facts = (layer["dense_neurons"], made["d_model"], made["num_experts"])
            there.append((layer["path"], *facts))
            found = {"width": made["width"], "shared": made["shared"]}
            sizes.append({**found, "expert_bias": made.get("expert_bias", False)})
            provenance[layer["path"]] = _provenance(layer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(directory, error) from error
    planned = [(s.ffn.path, s.ffn.d_ff, s.ffn.d_model, s.num_experts) for s in plan.specs]
    if there != planned:
        raise UsageError(
            f"{directory}: its {len(there)} layers ({there[:1]}, ...) are not those of the dense "
            "model; name the model that it was made from"
        )
    specs = tuple(replace(spec, **size) for spec, size in zip(plan.specs, sizes, strict=True))
    return replace(plan, specs=specs), provenance
