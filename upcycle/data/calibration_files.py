"""Calibration data in files: texts, records, data sets, images, tensors.

Each reader gives plain data; what a model makes of it is up to `upcycle.data.calibration`.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.errors import UsageError
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.util.json_text import parsed, read_json
from upcycle.util.untrusted import inside

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TENSORS = (".safetensors", ".npz", ".pt", ".pth")
RECORDS = (".jsonl", ".ndjson")
HELD_OUT = 4  # verification reads one part in four, and calibration the rest


@dataclass(frozen=True)
class CalibrationInput:
    """Calibration data; one of `texts`, `images`, `tensors` and `batches` is not empty.

    Attributes:
        what: where it comes from, in a few words for reports; never a path of this machine.
        texts: running text, each of one kind.
        domains: the kind of each text, or empty if it is not known.
        images: files.
        tensors: arguments of the model by name, the examples along the first axis.
        batches: inputs of the model.
    """

    what: str
    texts: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    tensors: Mapping[str, torch.Tensor] | None = None
    batches: tuple[Any, ...] = ()

    def parts(self) -> tuple["CalibrationInput", "CalibrationInput"]:
        """What verification may read, and what calibration may: they have nothing in common.

        A quarter is held out: every fourth text, image, example or batch; of fewer than four texts
        the first quarter of each. Fewer than four of the others serve both.
        """
        if 0 < len(self.texts) < HELD_OUT:
            held = tuple(text[: len(text) // HELD_OUT] for text in self.texts)
            rest = tuple(text[len(text) // HELD_OUT :] for text in self.texts)
            return replace(self, texts=held), replace(self, texts=rest)
        return self._part(is_held=True), self._part(is_held=False)

    def _part(self, *, is_held: bool) -> "CalibrationInput":
        def chosen(items: Sequence[Any]) -> tuple[Any, ...]:
            if len(items) < HELD_OUT:
                return tuple(items)
            return tuple(x for i, x in enumerate(items) if (i % HELD_OUT == 0) == is_held)

        tensors = self.tensors
        if tensors is not None:
            rows = list(chosen(range(_examples(tensors))))
            tensors = {name: tensor[rows] for name, tensor in tensors.items()}
        return replace(
            self,
            texts=chosen(self.texts),
            domains=chosen(self.domains),
            images=chosen(self.images),
            tensors=tensors,
            batches=chosen(self.batches),
        )


def read_calibration(
    paths: Sequence[str], *, field: str = "text", allow_pickle: bool = False
) -> CalibrationInput:
    """What ``--calibration PATH`` names; several paths are several domains of text.

    Args:
        paths: a text file, ``.jsonl`` records, a directory that ``datasets`` saved, a directory
            of images, or a file of tensors (``.safetensors``, ``.npz``, ``.pt``).
        field: of a record, or column of a data set, that holds the text. One named ``domain``
            says what kind of text it is.
        allow_pickle: also read ``.pt`` and ``.pth`` files, which can hold code.

    Raises:
        UsageError: there is no such file, it is damaged, or it has no data of a known kind.
    """
    given = [_read(Path(path), field, allow_pickle) for path in paths]
    if len(given) == 1:
        return given[0]
    wrong = next((path for path, g in zip(paths, given, strict=True) if not g.texts), None)
    if wrong is not None:
        raise UsageError(
            f"`calibration={wrong}`: several sources are several kinds of text, and this one is no "
            "text; give one"
        )
    return CalibrationInput(
        what="; ".join(g.what for g in given),
        texts=tuple(text for g in given for text in g.texts),
        domains=tuple(str(i) for i, g in enumerate(given) for _ in g.texts),
    )


def _read(path: Path, field: str, allow_pickle: bool) -> CalibrationInput:
    where = f"`calibration={path}`"
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _of_records(_data_set(path, field, where), field, f"data set {path.name}", where)
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
        if images:
            return CalibrationInput(f"{len(images)} images of {path.name}", images=tuple(images))
        raise UsageError(
            f"{where}: the directory has neither images nor a data set that `datasets` saved"
        )
    if not path.is_file():
        raise UsageError(f"{where}: there is no such text file or directory")
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        return CalibrationInput("1 image", images=(path,))
    if suffix in TENSORS:
        tensors = _tensors(path, where, allow_pickle)
        return CalibrationInput(f"the tensors of {path.name}", tensors=tensors)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not a text file in UTF-8") from error
    if suffix in RECORDS:
        return _of_records(_lines(text, where), field, f"the texts of {path.name}", where)
    return CalibrationInput("the given text", texts=(text,))


def _lines(text: str, where: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = parsed(line)
        except ValueError as error:
            raise UsageError(f"{where}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}:{number}: not a record, as {{...}}")
        yield record


def _of_records(
    records: Iterator[Mapping[str, Any]], field: str, what: str, where: str
) -> CalibrationInput:
    texts, domains = [], []
    for number, record in enumerate(records, start=1):
        text = record.get(field)
        if not isinstance(text, str):
            found = ", ".join(name for name, value in record.items() if isinstance(value, str))
            raise UsageError(
                f"{where}: record {number} has no text {field!r}; its texts are {found or 'none'}, "
                "and `field` names the one to read"
            )
        texts.append(text)
        domains.append(None if record.get("domain") is None else str(record["domain"]))
    with_domain = tuple(domain for domain in domains if domain is not None)
    if 0 < len(with_domain) < len(domains):
        lacking = domains.index(None) + 1
        raise UsageError(f"{where}: record {lacking} has no `domain`, and others have one")
    return CalibrationInput(what, tuple(texts), with_domain)


def _data_set(path: Path, column: str, where: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a directory that ``datasets.save_to_disk`` wrote; its first split, or "train"."""
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise UsageError(
            f"{where}: reading a data set needs pyarrow: pip install pyarrow; or write its texts "
            "to a .jsonl file"
        ) from error
    try:
        if (path / "dataset_dict.json").is_file():
            splits = read_json(path / "dataset_dict.json")["splits"]
            name = "train" if "train" in splits else str(splits[0])
            path = inside(path, name, "dataset_dict.json")
        state = read_json(path / "state.json")
        files = [inside(path, str(f["filename"]), "state.json") for f in state["_data_files"]]
    except (OSError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{where}: not a whole data set ({error}); save it again") from error
    for file in files:
        try:
            table = ipc.open_stream(file).read_all()
        except Exception as error:  # pyarrow has many types, and the text says what is wrong
            raise UsageError(f"{where}: {file.name} cannot be read: {error}") from error
        if column not in table.column_names:
            raise UsageError(
                f"{where}: the data set has no text column {column!r}; its columns are "
                f"{', '.join(table.column_names)}, and `field` names the one to read"
            )
        wanted = [name for name in (column, "domain") if name in table.column_names]
        yield from table.select(wanted).to_pylist()


def _tensors(path: Path, where: str, allow_pickle: bool) -> Mapping[str, torch.Tensor]:
    if path.suffix.lower() == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found: Mapping[str, Any] = {n: torch.from_numpy(arrays[n]) for n in arrays.files}
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{where}: not a file of plain arrays ({error})") from error
    else:
        found = dict(read_tensors(path, allow_pickle=allow_pickle))
    if not found:
        raise UsageError(f"{where}: it holds no tensors by name")
    _examples(found, where)
    return found


def _examples(tensors: Mapping[str, torch.Tensor], where: str = "calibration") -> int:
    counts = {name: t.shape[0] if t.ndim else 0 for name, t in tensors.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise UsageError(
            f"{where}: the first axis of every tensor counts the examples, and here it does not: "
            f"{shapes}"
        )
    return next(iter(counts.values()))
