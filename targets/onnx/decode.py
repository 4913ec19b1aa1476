"""Run the ONNX files of a model as for generation: the cache of one run goes into the next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.errors import UnsupportedError
from upcycle.onnx.inputs import Array
from upcycle.onnx.run import described, opened
from upcycle.targets.onnx.file_names import DECODER, ENCODER, FILES, MODEL
from upcycle.targets.traced.cache import PAST, PRESENT

# By their names in ONNX Runtime.
FLOAT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxFiles:
    """The ONNX files of a directory, with the inputs and outputs of the model they were made from.

    Attributes:
        seen: the tensors inside the graphs that `inner` names by file, as they were when `outputs`
            was last called, once for each run.

    With `as_served` the kernels are those of a session without options.

    Raises:
        UnsupportedError: ONNX Runtime cannot load one of them, or not run it.
    """

    def __init__(
        self,
        directory: Path,
        inner: Mapping[str, Sequence[str]] | None = None,
        *,
        as_served: bool = False,
    ) -> None:
        self._runners: dict[str, Any] = {}
        self._inner = inner or {}
        self.seen: dict[str, list[Array]] = {}
        for name in FILES:
            if (directory / name).is_file():
                with described(directory / name):
                    extra = self._inner.get(name, ())
                    self._runners[name] = opened(directory / name, extra, prepack=as_served)

    @property
    def has_cache(self) -> bool:
        """Whether they read and return the past of a text."""
        return DECODER in self._runners or any(
            name.startswith(f"{PAST}.") for name in self._names(MODEL)
        )

    def completed(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`given` with the masks and positions that the files read and a model can do without."""
        if not self.has_cache:
            return dict(given)
        first = ENCODER if ENCODER in self._runners else MODEL
        ids, names = given.get("input_ids"), self._names(first)
        full = dict(given)
        if ids is not None and "attention_mask" in names:
            full.setdefault("attention_mask", torch.ones_like(ids))
        if "position_ids" in names:
            places = full["attention_mask"].cumsum(-1) - 1
            full.setdefault("position_ids", places.clamp(min=0))
        return full

    def outputs(self, given: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """What the model returns, by name.

        With a cache only the logits, and what an encoder made; all tokens but the last are read in
        one run, and the last one in another.
        """
        given, self.seen = self.completed(given), {}
        arrays = {name: tensor.detach().numpy() for name, tensor in given.items()}
        if not self.has_cache:
            names = self._names(MODEL)
            if set(names) != set(arrays):
                raise UnsupportedError(
                    f"the file reads {', '.join(names)}, and the model {', '.join(arrays)}"
                )
            return self._run(MODEL, arrays)
        if DECODER not in self._runners:
            text = {n: arrays[n] for n in self._names(MODEL) if not n.startswith(f"{PAST}.")}
            return {"logits": self._decode(MODEL, text, {})}
        made = self._run(ENCODER, {name: arrays[name] for name in self._names(ENCODER)})
        fixed = {n.replace(PRESENT, PAST): array for n, array in made.items() if PRESENT in n}
        if "encoder_attention_mask" in self._names(DECODER):
            fixed["encoder_attention_mask"] = arrays["attention_mask"]
        text = {"input_ids": arrays["decoder_input_ids"]}
        logits = self._decode(DECODER, text, fixed)
        return {"logits": logits, "encoder_last_hidden_state": made["last_hidden_state"]}

    def _names(self, file: str) -> list[str]:
        return [value.name for value in self._runners[file].get_inputs()]

    def _run(self, file: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [value.name for value in self._runners[file].get_outputs()]
        inputs = self._runners[file].get_inputs()
        types = {value.name: FLOAT_TYPES.get(value.type) for value in inputs}
        given = {n: array.astype(types[n] or array.dtype) for n, array in feeds.items()}
        with described(Path(file)):
            made = dict(zip(names, self._runners[file].run(names, given), strict=True))
        for name in self._inner.get(file, ()):
            self.seen.setdefault(name, []).append(made.pop(name))
        return made

    def _decode(self, file: str, text: Mapping[str, Array], fixed: Mapping[str, Array]) -> Array:
        """Logits of every token of `text`: [batch, sequence] ids, mask and positions."""
        batch, length = text["input_ids"].shape
        past = empty_past(self._runners[file], batch)
        past = {name: array for name, array in past.items() if name not in fixed}
        logits = []
        for start, end in ((0, length - 1), (length - 1, length)):
            if start == end:
                continue
            feeds = {name: array[:, start:end] for name, array in text.items()}
            if "attention_mask" in text:
                feeds["attention_mask"] = text["attention_mask"][:, :end]
            made = self._run(file, {**feeds, **past, **fixed})
            past = {name: made[name.replace(PAST, PRESENT)] for name in past}
            logits.append(made["logits"])
        return np.concatenate(logits, axis=1)


def empty_past(runner: Any, batch: int) -> dict[str, Array]:
    """The past of a text that has none, for each input of a session that reads it."""
    return {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), FLOAT_TYPES[value.type])
        for value in runner.get_inputs()
        if value.name.startswith(f"{PAST}.")
    }
