"""Some experts of a mixture in a file of their own, to be trained and served beside the others.

Shape suffixes: E experts, N experts of an adapter in one layer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from upcycle.errors import UsageError, one_line
from upcycle.routing.contract import RoutedLayer, routed_layers

_FORM = 1  # of the file


class _Header(TypedDict):
    form: int
    experts: dict[str, list[int]]
    of: dict[str, int]


_HEADER = TypeAdapter(_Header)


class ExpertAdapter(nn.Module):
    """Experts that stand in for some of a model's, chosen by its routers as those would be.

    Its parameters are the stacks of the layers, cut down to these experts, [N, ...].

    Attributes:
        experts: by path of the layer, which of its experts they replace, N different numbers.
        of: by path of the layer, how many experts the model has there.

    Source:
        Wang et al., "Expert-Specialized Fine-Tuning", 2024, https://arxiv.org/abs/2407.01906
    """

    def __init__(
        self,
        experts: Mapping[str, Sequence[int]],
        of: Mapping[str, int],
        stacks: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        super().__init__()
        self.experts = {path: tuple(numbers) for path, numbers in experts.items()}
        self.of = dict(of)
        for path, named in stacks.items():
            for name, rows in named.items():
                self.register_parameter(_key(path, name), nn.Parameter(rows))

    @classmethod
    def taken(cls, model: nn.Module, experts: Mapping[str, Sequence[int]]) -> "ExpertAdapter":
        """Copies of these `experts` of `model`, by path of the layer.

        Raises:
            UsageError: the model has no such layer or expert.
        """
        layers = {layer.path: layer for layer in routed_layers(model)}
        stacks = {}
        for path, numbers in experts.items():
            layer = layers.get(path)
            if layer is None or not set(numbers) <= set(range(layer.num_experts)):
                first = next(iter(layers.values()))
                raise UsageError(
                    f"{path}: the model has no such layer with experts {_listed(numbers)}; its "
                    f"first one is {first.path}, with {first.num_experts} experts"
                )
            chosen = torch.tensor(list(numbers), dtype=torch.int64)
            stacks[path] = {
                name: stack.detach()[chosen.to(stack.device)].clone()
                for name, stack in stacks_of(layer).items()
            }
        of = {path: layers[path].num_experts for path in experts}
        return cls(experts, of, stacks)

    def stacks(self, path: str) -> dict[str, nn.Parameter]:
        """The parameters of a layer by the names that the model's stacks have."""
        start = _key(path, "")
        named = dict(self.named_parameters(recurse=False))
        return {key[len(start) :]: rows for key, rows in named.items() if key.startswith(start)}

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Write the experts over those of `model`, in place.

        Raises:
            UsageError: they are those of another model.
        """
        for layer in self.layers_in(model):
            for name, stack in stacks_of(layer).items():
                stack[list(self.experts[layer.path])] = self.stacks(layer.path)[name].to(stack)

    def layers_in(self, model: nn.Module) -> list[RoutedLayer]:
        """The layers of `model` that the experts are of.

        Raises:
            UsageError: they are those of another model.
        """
        found = [layer for layer in routed_layers(model) if layer.path in self.experts]
        there = {
            (layer.path, name): stack.shape
            for layer in found
            for name, stack in stacks_of(layer).items()
        }
        own = {
            (path, name): (self.of[path], *rows.shape[1:])
            for path in self.experts
            for name, rows in self.stacks(path).items()
        }
        if there != own:
            raise UsageError(
                f"the adapter has experts of {len(self.experts)} layers of another model; make one "
                "of this model with `upcycle esft`"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file: the rows under the names of the model's stacks, and which
        experts they are in its metadata."""
        tensors = {
            f"{layer}.experts.{name}": rows.detach().contiguous()
            for layer in self.experts
            for name, rows in self.stacks(layer).items()
        }
        header = {"form": _FORM, "experts": self.experts, "of": self.of}
        save_file(tensors, path, metadata={"format": "pt", "upcycle": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "ExpertAdapter":
        """Read what `save` wrote.

        Raises:
            UsageError: there is no such file, or it is no adapter.
        """
        try:
            with safe_open(path, "pt") as file:
                header = _HEADER.validate_json((file.metadata() or {}).get("upcycle", ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(header["experts"], header["of"], _stacks(header, tensors))
        except ValidationError as error:
            reason = "its metadata does not say which experts it has"
            raise UsageError(f"{path}: no adapter of `upcycle esft`: {reason}") from error
        except (OSError, SafetensorError, ValueError) as error:
            raise UsageError(f"{path}: no adapter of `upcycle esft`: {one_line(error)}") from error


def stacks_of(layer: RoutedLayer) -> dict[str, Tensor]:
    """The parameters with an entry for each expert, [E, ...]."""
    named: dict[str, Any] = dict(layer.experts.named_parameters(recurse=False))
    return {name: stack for name, stack in named.items() if len(stack) == layer.num_experts}


def _stacks(header: _Header, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by layer.

    Raises:
        ValueError: they are not what the header says.
    """
    found: dict[str, dict[str, Tensor]] = {path: {} for path in header["experts"]}
    for full, tensor in tensors.items():
        path, _, name = full.rpartition(".experts.")
        numbers = header["experts"].get(path)
        if numbers is None or "." in name or len(tensor) != len(numbers):
            raise ValueError(f"{full} is not of its experts")
        found[path][name] = tensor
    for path, numbers in header["experts"].items():
        count = header["of"].get(path, 0)
        if len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(count)):
            raise ValueError(f"{path}: it has no experts {_listed(numbers)}")
    return found


def _key(path: str, name: str) -> str:
    """A name for a parameter of a module, which may have no dot."""
    return f"{path}:{name}".replace(".", "/")


def _listed(numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > 8 else ""
    return ", ".join(map(str, list(numbers)[:8])) + more
