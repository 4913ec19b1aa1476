"""Models in a GGUF file, as llama.cpp reads them: unpacked to a Hugging Face directory.

A header says the configuration and has the tokenizer; weights become float32.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upcycle.errors import UnsupportedError, UsageError, has_a_sentence, one_line
from upcycle.models.unpacked import kept
from upcycle.util.progress import Progress, step

SUFFIX = ".gguf"
_ALONE = f"model{SUFFIX}"


def chosen(place: str, files: Sequence[str]) -> str:
    """The GGUF file among the files of a directory or repository; there has to be one.

    `place` and the name of a file are what a person writes: ``directory/``, or ``org/name:``.

    Raises:
        UsageError: there are several.
    """
    found = sorted(file for file in files if file.lower().endswith(SUFFIX))
    if len(found) != 1:
        listed = ", ".join(place + file for file in found[:20])
        raise UsageError(f"{place[:-1]}: it has several GGUF files; name one of them: {listed}")
    return found[0]


def configuration(file: Path) -> Path:
    """A directory in the cache with the configuration and the tokenizer of a GGUF file.

    Raises:
        UsageError: the file is damaged, or a part of one.
        UnsupportedError: transformers does not know the architecture.
    """
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name):
        raise UnsupportedError(
            f"{file}: one part of a model that was split; join the parts with "
            "llama-gguf-split of llama.cpp"
        )
    return kept(f"{file.stem}-configuration", [file], lambda folder: _describe(file, folder))


def unpacked(file: Path, progress: Progress) -> Path:
    """The same with the weights, in float32."""

    def unpack(folder: Path) -> None:
        with step(progress, f"unpacking {file.name}"):
            shutil.copytree(configuration(file), folder, dirs_exist_ok=True)
            _write_weights(file, folder)

    return kept(file.stem, [file], unpack)


def unpack_gguf(folder: Path, file: str, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face directory in float32."""
    _describe(folder / file, directory)
    _write_weights(folder / file, directory)


def _describe(file: Path, directory: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    with _opened(file) as alone:
        config = AutoConfig.from_pretrained(alone, gguf_file=_ALONE)
        config.architectures = config.architectures or [_class_for(config).__name__]
        config.save_pretrained(directory)
        AutoTokenizer.from_pretrained(alone, gguf_file=_ALONE).save_pretrained(directory)


def _write_weights(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, GgufConfig

    cls = _class_for(AutoConfig.from_pretrained(directory, local_files_only=True))
    with _opened(file) as alone:
        model = cls.from_pretrained(
            alone,
            gguf_file=_ALONE,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(directory)


def _class_for(config: Any) -> Any:
    """The model class for a configuration out of a GGUF file: one that writes text."""
    import transformers

    for names in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    ):
        if type(config) in names:
            return names[type(config)]
    raise UnsupportedError(f"no language model has the configuration {type(config).__name__}")


@contextmanager
def _opened(file: Path) -> Iterator[Path]:
    """A directory with nothing but the file, so that no file beside it has a say."""
    from upcycle.util.quiet import quiet_transformers  # samples are listed without transformers

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UsageError(f"{file}: not a GGUF file; copy or download it again")
    with TemporaryDirectory() as folder:
        alone = Path(folder)
        (alone / _ALONE).symlink_to(file.resolve())
        try:
            with quiet_transformers(), redirect_stderr(StringIO()):  # it has bars of its own
                yield alone
        except Exception as error:
            if has_a_sentence(error):
                raise
            raise UsageError(
                f"{file}: transformers cannot read this GGUF file: {one_line(error)}"
            ) from error
