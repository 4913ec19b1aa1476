"""The axes of the inputs of a graph that may vary."""

from collections.abc import Mapping

from torch import Tensor

Axes = Mapping[str, Mapping[int, str]]  # input -> axis -> its name


def default_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Axis 0 is ``batch``; axis 1 of token ids, masks and [batch, sequence, width] ``sequence``.

    It is ``decoder_sequence`` for inputs of a decoder and ``samples`` for raw audio. The sizes of
    images are those of the example; beside texts their number is ``image_batch``.
    """
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in inputs.items():
        several = name == "pixel_values" and "input_ids" in inputs
        axes[name] = {0: "image_batch" if several else "batch"} if tensor.dim() > 0 else {}
        if tensor.dim() == (3 if tensor.is_floating_point() else 2):
            axes[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
        elif tensor.dim() == 2 and name == "input_values":
            axes[name][1] = "samples"
    return axes
