"""Images as the inputs of a model, with Pillow alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from upcycle.errors import UsageError
from upcycle.util.json_text import read_json

SIZE = 224
# Of the pixels of most image models; `preprocessor_config.json` says it better.
MEAN = STD = (0.5, 0.5, 0.5)


def pixels(model: nn.Module, files: Sequence[Path], directory: Path | None = None) -> torch.Tensor:
    """The images as ``pixel_values`` [N, 3, H, W], float32.

    The shorter side is resized (bicubic) to the size of the model, the middle cut out, and
    ``(value / 255 - mean) / std`` computed. Sizes, mean and std are those of
    ``preprocessor_config.json`` in `directory`, else the ``image_size`` of the configuration (224)
    and 0.5. The model's own processor is not run, as it may need torchvision.

    Raises:
        UsageError: Pillow is not installed, or a file is no image.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UsageError(
            "`calibration`: reading images needs Pillow: pip install pillow; or give their pixels "
            "as tensors"
        ) from error
    path = None if directory is None else directory / "preprocessor_config.json"
    processor = read_json(path) if path is not None and path.is_file() else {}
    height, width = _size(model, processor)
    mean_C11 = torch.tensor(processor.get("image_mean") or MEAN).reshape(-1, 1, 1)
    std_C11 = torch.tensor(processor.get("image_std") or STD).reshape(-1, 1, 1)
    rows = []
    for file in files:
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(
                    image.convert("RGB"), (width, height), Image.Resampling.BICUBIC
                )
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UsageError(f"`calibration={file}`: not an image that can be read") from error
        image_HWC = torch.from_numpy(np.array(fitted, dtype=np.float32) / 255)
        rows.append((image_HWC.permute(2, 0, 1) - mean_C11) / std_C11)
    return torch.stack(rows)


def _size(model: nn.Module, processor: dict[str, Any]) -> tuple[int, int]:
    config: Any = getattr(model, "config", None)
    for size in (processor.get("crop_size"), processor.get("size")):
        if isinstance(size, int):
            return size, size
        if isinstance(size, dict) and {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
        if isinstance(size, dict) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    size = getattr(config, "image_size", None) or SIZE
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))
