"""The usual forms of the arguments of models, by their names and the numbers of a configuration."""

import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

# Sizes that differ from each other, so that a mix-up of axes shows.
BATCH, LENGTH, DECODER_LENGTH = 2, 7, 5
_FRAMES = 50  # of raw audio, after its convolutions
_GRID = 4  # patches along each side of an image that comes as patches; they are merged in squares


def unknown_arguments(config: Any, arguments: Mapping[str, inspect.Parameter]) -> list[str]:
    """The required arguments of a forward whose form is not known."""
    return [
        name
        for name in required(arguments)
        if next(values_of(name, config, torch.float32, arguments), None) is None
    ]


def required(arguments: Mapping[str, inspect.Parameter]) -> list[str]:
    """The arguments of a forward that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in arguments.items() if p.default is p.empty and p.kind in kinds]


def values_of(
    name: str, config: Any, dtype: torch.dtype, arguments: Collection[str]
) -> Iterator[torch.Tensor]:
    """The usual forms of the argument `name`; none if unknown.

    Floats, of `dtype`, and tokens are zeros, masks are ones, and grids are numbers of patches.
    `arguments` are all names of the forward.
    """
    if name in _GRIDS:
        yield torch.tensor([_GRIDS[name]] * BATCH)
        return
    whole = name.endswith(("_ids", "tokens", "codes", "labels")) or name in ("bbox", "freq")
    for shape in _shapes_of(name, config, not _GRIDS.keys().isdisjoint(arguments)):
        if "mask" in name:
            yield torch.ones(shape, dtype=dtype if "observed" in name else torch.long)
        elif name == "is_longer":
            yield torch.zeros(shape, dtype=torch.bool)
        else:
            categorical = whole or "categorical" in name
            yield torch.zeros(shape, dtype=torch.long if categorical else dtype)


def _shapes_of(name: str, config: Any, packed: bool) -> Iterator[tuple[int, ...]]:
    images = "pixel_values" in name or name in ("image", "images")
    if name in _SHAPES:
        yield from _SHAPES[name](config)
    elif packed and name == "pixel_attention_mask":
        yield (BATCH, _GRID**2)
    elif packed and (images or name == "hidden_states"):
        yield from _patches(config)
    elif images:
        yield from _images(config)
    elif name.endswith(("embeds", "hidden_states", "hidden_state")):
        encoder = name.startswith("encoder")
        width = _number(config, *(["encoder_hidden_size"] if encoder else []), *_WIDTHS)
        if width:
            yield (BATCH, LENGTH, width)
    elif name.removesuffix("_mask") in _SHAPES:
        yield from ((BATCH, shape[-1]) for shape in _SHAPES[name.removesuffix("_mask")](config))
    elif name.endswith(("_ids", "_mask", "tokens", "labels")):
        yield (BATCH, DECODER_LENGTH if name.startswith("decoder") else LENGTH)


_GRIDS: dict[str, Any] = {
    "grid_thw": [1, _GRID, _GRID],
    "image_grid_thw": [1, _GRID, _GRID],
    "grid_hws": [_GRID, _GRID],
    "spatial_shapes": [_GRID, _GRID],
    "merge_sizes": 2,
    "pixel_position_ids": [[i % _GRID, i // _GRID] for i in range(_GRID**2)],
}
_WIDTHS = ("hidden_size", "d_model", "embed_dim", "dim", "n_embd")
# Of images whose size the configuration does not have; the larger ones are for detectors and depth
# estimators.
_SIDES = (224, 640, 1536)


def _images(config: Any) -> Iterator[tuple[int, ...]]:
    part = part_of(config, "vision") or config
    size = _first(part, config, "image_size") or _deep(config, "image_size")
    for side in (size,) if size else _SIDES:
        yield from _images_of(side, part, config)


def _images_of(size: Any, part: Any, config: Any) -> Iterator[tuple[int, ...]]:
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    channels = _first(part, config, "num_channels", "in_channels", "num_image_channels") or 3
    frames = _first(part, config, "num_frames", "frames_per_clip") or 0
    if frames:
        yield (BATCH, frames, channels, height, width)
    yield (BATCH, channels, height, width)
    if not frames:
        yield (BATCH, 2, channels, height, width)  # pairs
    patch = _first(part, config, "patch_size") or 16
    if isinstance(patch, int):  # flattened patches
        yield (BATCH, (height // patch) * (width // patch), channels * patch * patch)


def _patches(config: Any) -> Iterator[tuple[int, ...]]:
    """Images cut into patches: those of all images in a row, flat or not, or image by image."""
    part = part_of(config, "vision") or config
    side = _first(part, config, "patch_size") or 14
    area = side**2 if isinstance(side, int) else math.prod(side)
    channels = _first(part, config, "num_channels", "in_channels", "in_chans") or 3
    frames = _first(part, config, "temporal_patch_size") or 1
    yield (BATCH * _GRID**2, channels * frames * area)
    if isinstance(side, int):
        yield (BATCH * _GRID**2, channels, side, side)
    yield (BATCH, _GRID**2, channels * area)


def _waves(config: Any) -> Iterator[tuple[int, ...]]:
    part = part_of(config, "audio") or config
    strides = getattr(part, "conv_stride", None)
    samples = _FRAMES * math.prod(strides) if isinstance(strides, list | tuple) else 16000
    bins = _number(part, "num_mel_bins")
    if bins and strides is None:
        yield (BATCH, _number(part, "max_length") or 1024, bins)
    yield (BATCH, samples)
    yield (BATCH, _number(part, "audio_channels", "num_channels") or 1, samples)
    yield (BATCH, LENGTH, bins or 80)
    yield (BATCH, LENGTH, _number(config, *_WIDTHS) or bins or 80)


def _spectra(config: Any) -> Iterator[tuple[int, ...]]:
    part = part_of(config, "audio") or part_of(config, "encoder") or config
    frames = 2 * (_number(part, "max_source_positions") or 1500)
    mels = _number(part, "num_mel_bins") or 80
    if _number(part, "input_feat_per_channel", "feature_projection_input_dim") is None:
        yield (BATCH, mels, frames)
    named = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
    wide = _number(part, *named, "input_dim", "feature_size", "input_feat_size", "n_mels") or 80
    yield (BATCH, 64, wide)
    yield (BATCH, 1, 1001, mels)


def _series(config: Any) -> Iterator[tuple[int, ...]]:
    lags = getattr(config, "lags_sequence", None)
    length = _number(config, "context_length") or _number(config, "prediction_length") or 32
    channels = _number(config, "num_input_channels", "input_size") or 1
    if lags:
        length += max(lags)
        yield (BATCH, length) if channels == 1 else (BATCH, length, channels)
        return
    yield (BATCH, length, channels)
    yield (BATCH, length)


def _future(config: Any) -> Iterator[tuple[int, ...]]:
    length = _number(config, "prediction_length") or 1
    channels = _number(config, "num_input_channels", "input_size") or 1
    yield (BATCH, length) if channels == 1 else (BATCH, length, channels)


def _time_features(of: Any) -> Any:
    def shapes(config: Any) -> Iterator[tuple[int, ...]]:
        length = next(of(config))[1]
        yield (BATCH, length, _number(config, "num_time_features") or 0)

    return shapes


def _shape(*axes: Any) -> Any:
    """One shape, whose axes are sizes, or names of settings followed by the default."""

    def shapes(config: Any) -> list[tuple[int, ...]]:
        return [tuple(a if isinstance(a, int) else _number(config, *a[:-1]) or a[-1] for a in axes)]

    return shapes


_SHAPES: dict[str, Any] = {
    "input_values": _waves,
    "input_features": _spectra,
    "past_values": _series,
    "past_observed_mask": _series,
    "past_values_padding": _series,
    "past_time_features": _time_features(_series),
    "future_values": _future,
    "future_time_features": _time_features(_future),
    "static_categorical_features": _shape(BATCH, ("num_static_categorical_features", 0)),
    "static_real_features": _shape(BATCH, ("num_static_real_features", 0)),
    "bbox": _shape(BATCH, LENGTH, 4),
    "is_longer": _shape(BATCH, 1),
    "freq": _shape(BATCH, 1),
    "pixel_mask": lambda config: [(BATCH, *next(_images(config))[-2:])],
    "query_embeds": _shape(BATCH, ("num_query_tokens", LENGTH), (*_WIDTHS, 768)),
    "visual_feats": _shape(BATCH, DECODER_LENGTH, ("visual_feat_dim", 2048)),
    "visual_pos": _shape(BATCH, DECODER_LENGTH, 4),
    "flattened_patches": lambda config: [
        (BATCH, LENGTH, 2 + (_number(config, "patch_embed_hidden_size") or 768))
    ],
    "decoder_input_values": _shape(BATCH, DECODER_LENGTH, (*_WIDTHS, 80)),
    "audio_values": _waves,
    "input_audio": _waves,
    "audio_codes": _shape(BATCH, ("num_codebooks", "num_quantizers", 8), LENGTH),
}


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """The configurations within one, with the names of their attributes."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield name, value


def part_of(config: Any, word: str) -> Any:
    """The first configuration within `config` whose name has `word` in it, or None."""
    return next((part for name, part in _parts(config) if word in name), None)


def _number(config: Any, *names: str) -> int | None:
    """The first of these settings that is a positive integer, in `config` or one of its parts."""
    for holder in (config, *(part for _, part in _parts(config))):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _deep(config: Any, name: str) -> Any:
    """A setting of a part of a part."""
    inner = [deeper for _, part in _parts(config) for _, deeper in _parts(part)]
    return next((value for part in inner if (value := getattr(part, name, None))), None)


def _first(part: Any, config: Any, *names: str) -> Any:
    for holder in (part, config):
        for name in names:
            value = getattr(holder, name, None)
            if value and isinstance(value, int | list | tuple):
                return value
    return None
