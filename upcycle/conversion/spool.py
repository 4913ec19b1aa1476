"""Layers that were made before the files of the result are written, on disk until then."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from upcycle.ir.layer_weights import empty_layer, weights_of
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import MoEWeights, Provenance


class Spool:
    """The weights of layers, each in a file of its own in `directory`, which is made."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._kept: dict[str, tuple[Path, Provenance]] = {}

    def put(self, spec: MoESpec, made: MoEWeights) -> None:
        """Write the weights; of where they come from, only the numbers of neurons are kept."""
        file = self._directory / f"{len(self._kept)}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in made.tensors().items()}
        save_file(tensors, file)
        self._kept[spec.ffn.path] = file, made.provenance

    def get(self, spec: MoESpec) -> MoEWeights:
        """The weights as they were put, memory-mapped."""
        file, provenance = self._kept[spec.ffn.path]
        layer = empty_layer(spec.layer_config())
        layer.load_state_dict(load_file(file), assign=True)
        return weights_of(layer, provenance)
