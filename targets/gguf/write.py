"""Write a mixture of experts of transformers as one GGUF file, a tensor at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

from upcycle.errors import UnsupportedError
from upcycle.targets.gguf.architectures import GgufArchitecture, architecture_of
from upcycle.targets.gguf.metadata import add_metadata, rope_factors
from upcycle.targets.gguf.names import EMBEDDINGS, OUTPUT, Place, places
from upcycle.targets.gguf.tokenizer import add_tokenizer
from upcycle.util.copies import untied_tensors

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
TYPE_OF: dict[torch.dtype, GgufType] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
# Small, and what decides which experts a token visits: always in float32, as llama.cpp has them.
SINGLE = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "rope_freqs.weight")


@dataclass(frozen=True)
class Written:
    """What a file has to hold.

    Attributes:
        entry: the architecture.
        tensors: of the model, by their names there.
        places: where each of them is.
        extra: tensors of the file that no tensor of the model is, or that repeat one.
    """

    entry: GgufArchitecture
    tensors: dict[str, torch.Tensor]
    places: dict[str, Place]
    extra: dict[str, torch.Tensor]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the file in their order; views where no row changes its place."""
        for name, place in self.places.items():
            yield from zip(place.names, place.split(self.tensors[name]), strict=True)
        yield from self.extra.items()


def prepared(model: Any) -> Written:
    """What the file of `model` holds.

    Raises:
        UnsupportedError: llama.cpp does not run it.
    """
    entry = architecture_of(model)
    tensors = untied_tensors(model)
    found = places(tensors, entry, model.config)
    extra = {}
    at = {place.names[0]: name for name, place in found.items()}
    if OUTPUT not in at and entry.own_output:
        extra[OUTPUT] = tensors[at[EMBEDDINGS]]
    if (factors := rope_factors(model.config)) is not None:
        extra["rope_freqs.weight"] = factors
    return Written(entry, tensors, found, extra)


def type_in_file(name: str, shape: torch.Size, kind: GgufType) -> GGMLQuantizationType:
    """The type of one tensor of the file, by the rules of llama.cpp's converter."""
    if len(shape) < 2 or name.endswith(SINGLE):
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind.upper()]


def exactly(tensor: torch.Tensor, to: GGMLQuantizationType) -> torch.Tensor:
    """A float32 tensor rounded to a float type of a file, in float32."""
    dtypes = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    return tensor.to(dtypes.get(to, torch.float32)).float()


def write_gguf(path: Path, model: Any, tokenizer: Any, kind: GgufType, name: str) -> Written:
    """Write `model` and its tokenizer to `path`.

    Raises:
        UnsupportedError: llama.cpp runs no such model or tokenizer, or a weight is out of float16's
            range.
    """
    content = prepared(model)
    writer = GGUFWriter(path, content.entry.name)
    add_metadata(writer, model, content.entry, name, FILE_TYPES[kind])
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    for label, tensor in content:
        to = type_in_file(label, tensor.shape, kind)
        size = _bytes(tensor.shape, to)
        writer.add_tensor_info(label, tensor.shape, np.dtype(np.float32), size, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for label, tensor in content:
            writer.write_tensor_data(_quantised(label, tensor, kind))
    finally:
        writer.close()
    return content


def _bytes(shape: torch.Size, to: GGMLQuantizationType) -> int:
    return int(np.prod(quants.quant_shape_to_byte_shape(shape, to)))


def _quantised(label: str, tensor: torch.Tensor, kind: GgufType) -> np.ndarray[Any, Any]:
    array = tensor.detach().cpu().float().contiguous().numpy()
    to = type_in_file(label, tensor.shape, kind)
    largest = np.abs(array).max(initial=0.0)
    if to == GGMLQuantizationType.F16 and largest > np.finfo(np.float16).max:
        raise UnsupportedError(
            f"`gguf_type={kind}`: {label} has a weight of {largest:.3g}, which float16 has not; "
            "take bf16 or f32"
        )
    return quants.quantize(array, to)
