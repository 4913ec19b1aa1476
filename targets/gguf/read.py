"""Read the tensors of a GGUF file back, under their names in the model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from upcycle.targets.gguf.write import Written


class GgufTensors:
    """The tensors of a file; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(path)
        self.by_name: dict[str, Any] = {tensor.name: tensor for tensor in self.reader.tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        """In float32 and in torch's order of axes."""
        tensor = self.by_name[name]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return torch.from_numpy(values).reshape([int(n) for n in tensor.shape[::-1]])

    def steps(self, name: str) -> torch.Tensor:
        """The scale of every number of a tensor in Q8_0."""
        tensor = self.by_name[name]
        assert tensor.tensor_type == GGMLQuantizationType.Q8_0
        blocks = np.ascontiguousarray(tensor.data).reshape(-1, 34)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        shape = [int(n) for n in tensor.shape[::-1]]
        return torch.from_numpy(scales).expand(-1, 32).reshape(shape)

    def of_model(self, content: Written, name: str) -> torch.Tensor:
        """The tensor `name` of the model, put together from its parts."""
        place = content.places[name]
        parts = [self[part] for part in place.names]
        return place.join(parts, content.tensors[name].shape)
