"""The data that methods which look at activations are shown, as inputs of the model.

Shape suffixes: N sequences in all, B of one batch, L places of a sequence.
"""

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from upcycle.capture.capture import ExampleInputs
from upcycle.data.calibration_files import HELD_OUT, CalibrationInput
from upcycle.data.default_data import EXAMPLE, RANDOM, for_calibration
from upcycle.data.images import pixels
from upcycle.data.text import (
    SEQUENCE,
    check_tokens,
    decoder_inputs,
    is_language_model,
    longest,
    sequences,
)
from upcycle.data.text_domains import text_domains
from upcycle.data.verification_inputs import MIN_CHARACTERS, cast_floats, evaluation_for
from upcycle.errors import UsageError
from upcycle.ir.measured import Calibrated, Usage
from upcycle.models.tokenizer import tokenizer_in
from upcycle.passes.plan.plan import needs
from upcycle.recipe.schema import Calibration, Recipe
from upcycle.util.modules import device_of, model_dtype

MOST_BATCHES = 16  # each has a thread and a residual stream
LEAST_PLACES = 2048  # tokens of a batch, if there are as many
PER_IMAGE = 256  # tokens that an image counts as

Data = str | CalibrationInput | Iterable[str] | Iterable[ExampleInputs]


@dataclass(frozen=True)
class CalibrationData:
    """Inputs of the model, in batches.

    Attributes:
        batches: in the dtype and on the device of the model.
        what: where they come from, in a few words.
        domains: the kind of text of each sequence, int64 [B], for each batch; or None.
        from_dense: layers see what the dense model gives, whatever `calibration.sequential` says.
    """

    batches: Sequence[ExampleInputs]
    what: str
    domains: Sequence[torch.Tensor] | None = None
    from_dense: bool = False

    def describe(self, layers: Sequence[Usage], *, sequential: bool) -> Calibrated:
        """For the report, with what its tokens make of the layers."""
        domains = None
        if self.domains is not None:
            domains = int(torch.cat(list(self.domains)).bincount().count_nonzero())
        sequential = sequential and not self.from_dense
        return Calibrated(self.what, len(self.batches), sequential, domains, tuple(layers))

    @property
    def digest(self) -> str:
        """Of all that a conversion reads of it."""
        made = hashlib.sha256()
        for leaf in pytree.tree_leaves([list(self.batches), list(self.domains or ())]):
            is_tensor = isinstance(leaf, torch.Tensor)
            plain = leaf.cpu().contiguous().flatten() if is_tensor else leaf
            made.update(plain.view(torch.uint8).numpy().tobytes() if is_tensor else b"")
            made.update(repr((plain.dtype, leaf.shape) if is_tensor else leaf).encode())
        return made.hexdigest()


def given_data(data: Data | None) -> CalibrationInput | None:
    """What a caller in Python gives: a text, several, batches of inputs, or what a file held.

    Raises:
        UsageError: it is empty, or something else.
    """
    if data is None or isinstance(data, CalibrationInput):
        return data
    if isinstance(data, str):
        return CalibrationInput("the given text", texts=(data,))
    items: list[Any] = list(data)
    if items and all(isinstance(item, str) for item in items):
        return CalibrationInput("the given texts", texts=tuple(items))
    if items and all(isinstance(item, Mapping | tuple) for item in items):
        return CalibrationInput("the given batches", batches=tuple(items))
    raise UsageError(
        "calibration: give a text, several texts, or batches, each a dict or a tuple of tensors"
    )


@contextmanager
def called_data() -> Iterator[None]:
    """Within it sentences call the data `data`, which in a conversion is `calibration`."""
    try:
        yield
    except UsageError as error:
        sentence = str(error).replace("`calibration`", "`data`").replace("`calibration=", "`data=")
        raise UsageError(sentence.replace("calibration.", "")) from error


def needs_domains(recipe: Recipe) -> bool:
    """Whether the methods read the domain of the text that a token is from."""
    experts = recipe.experts
    by_domain = experts.method.startswith("gradient_domain") or experts.shared_by == "domains"
    return by_domain or recipe.router.method == "assigned"


def calibration_data(
    model: nn.Module,
    recipe: Recipe,
    given: CalibrationInput | None = None,
    *,
    directory: Path | None = None,
    trust_remote_code: bool = False,
    example: ExampleInputs | None = None,
    domains: int = 1,
    whole: bool = False,
) -> CalibrationData:
    """Inputs for `model`, from what verification does not read.

    Args:
        model: the dense model, perhaps on the meta device; its data is then on the CPU.
        recipe: how many tokens in sequences of what length, and whether domains are needed. Those
            that are not given are found by clustering the sequences.
        given: by the user. If None, what `upcycle.data.default_data` has; without a tokenizer
            random inputs, from which nothing is to be learned.
        directory: where its tokenizer is, if it has one.
        trust_remote_code: run code that the tokenizer brings.
        example: inputs that the user gave for the capture, which are better than random ones.
        domains: how many the methods want, if they want any.
        whole: also what verification reads of `given`.

    Raises:
        UsageError: the data is too short, or not of the kind that the model reads.
    """
    wanted = recipe.calibration
    kind = getattr(model, "main_input_name", None)
    reads_text = kind == "input_ids"
    tokenizer = tokenizer_in(directory if reads_text else None, trust_remote_code=trust_remote_code)
    if given is None and example is not None:
        return _placed(model, [example], EXAMPLE)
    if given is None and tokenizer is None:
        return _placed(model, evaluation_for(model, seed=1000 + recipe.seed).batches, RANDOM)
    if given is None or not whole:
        given = for_calibration(given, with_code=is_language_model(model))
    if given.batches:
        return _placed(model, given.batches, given.what)
    if given.tensors is not None or given.images:
        return _placed(model, _examples(model, given, wanted, directory), given.what)
    _check_reads(model, "input_ids", "a text", unnamed="input_ids")
    if tokenizer is None:
        raise UsageError(
            f"`calibration`: a text needs a tokenizer, and {directory or 'the model'} has none"
        )
    ids, domain_N = _sequences(model, tokenizer, given, wanted)
    if domain_N is None and needs_domains(recipe):
        generator = torch.Generator().manual_seed(recipe.seed)
        domain_N = text_domains(ids, domains, generator)
    length = max(map(len, ids))
    rows = max(1, LEAST_PLACES // length, -(-len(ids) // MOST_BATCHES))
    batches = [
        decoder_inputs(model, _padded(tokenizer, ids[start : start + rows]))
        for start in range(0, len(ids), rows)
    ]
    split = None if domain_N is None else torch.split(domain_N, rows)
    return _placed(model, batches, given.what, split)


def verification_inputs(
    model: nn.Module,
    recipe: Recipe,
    given: CalibrationInput | None,
    *,
    directory: Path | None = None,
) -> tuple[str | None, ExampleInputs | None]:
    """A text or inputs to verify on, of what the user gave: all if nothing is calibrated.

    Raises: as `calibration_data`.
    """
    if given is None:
        return None, None
    is_shared = bool(needs(recipe))
    held = given.parts()[0] if is_shared else given
    if held.batches:
        return None, cast_floats(held.batches[0], model_dtype(model))
    if held.images or held.tensors is not None:
        batches = _examples(model, held, recipe.calibration, directory)
        return None, cast_floats(batches[0], model_dtype(model))
    _check_reads(model, "input_ids", "a text", unnamed="input_ids")
    size = sum(len(text.strip()) for text in given.texts)
    if is_shared and size < HELD_OUT * MIN_CHARACTERS:
        raise UsageError(
            f"`calibration`: the text has {size} characters; give at least "
            f"{HELD_OUT * MIN_CHARACTERS}, of which a quarter is held out to verify on"
        )
    return "\n\n".join(held.texts), None


def _check_reads(model: nn.Module, kind: str, given: str, *, unnamed: str) -> None:
    """The main input of `model` must be `kind`; `unnamed` is what a module without a name reads."""
    read = getattr(model, "main_input_name", unnamed)
    if read != kind:
        raise UsageError(f"`calibration`: {given}, and the model reads {read}; give that")


def _sequences(
    model: nn.Module, tokenizer: Any, given: CalibrationInput, wanted: Calibration
) -> tuple[list[list[int]], torch.Tensor | None]:
    """Tokens in sequences, as many of each kind of text."""
    is_running = is_language_model(model)
    length = min(wanted.length if is_running else SEQUENCE, longest(model))
    kinds = sorted(set(given.domains)) or [""]
    share = -(-wanted.tokens // len(kinds))
    ids: list[list[int]] = []
    domains: list[int] = []
    for number, kind in enumerate(kinds):
        of = given.domains or [""] * len(given.texts)
        texts = [text for text, domain in zip(given.texts, of, strict=True) if domain == kind]
        found = sequences(tokenizer, texts, length, most=share, is_running=is_running)
        if not found:
            where = f" of domain {kind!r}" if kind else ""
            raise UsageError(
                f"`calibration`: the text{where} has less than one sequence of {length} tokens; "
                "give more, or set `calibration.length`"
            )
        ids += found
        domains += [number] * len(found)
    check_tokens(model, torch.tensor([max(map(max, ids))]))
    return ids, torch.tensor(domains) if given.domains else None


def _padded(tokenizer: Any, ids: list[list[int]]) -> dict[str, Any]:
    if len({len(row) for row in ids}) == 1:
        input_ids = torch.tensor(ids)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    padded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    return {name: padded[name] for name in ("input_ids", "attention_mask")}


def _check_arguments(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    main: str | None = getattr(model, "main_input_name", None)
    if main is not None and main not in tensors and "inputs_embeds" not in tensors:
        raise UsageError(
            f"`calibration`: there is no {main} among the tensors {', '.join(sorted(tensors))}"
        )
    for name in tensors:
        if name not in parameters and not takes_any:
            raise UsageError(
                f"`calibration`: the model has no argument {name}; it has {', '.join(parameters)}"
            )


def _examples(
    model: nn.Module, given: CalibrationInput, wanted: Calibration, directory: Path | None
) -> list[dict[str, Any]]:
    """Images or tensors in batches."""
    tensors = given.tensors
    if not tensors:
        _check_reads(model, "pixel_values", "images", unnamed="tensors")
        files = given.images[: max(4, wanted.tokens // PER_IMAGE)]
        tensors = {"pixel_values": pixels(model, files, directory)}
    _check_arguments(model, tensors)
    rows = max(4, -(-len(next(iter(tensors.values()))) // MOST_BATCHES))
    pieces = {name: torch.split(tensor, rows) for name, tensor in tensors.items()}
    return [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]


def _placed(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    what: str,
    domains: Sequence[torch.Tensor] | None = None,
) -> CalibrationData:
    """In the dtype and on the device of the model."""
    device = device_of(model)
    batches = [cast_floats(batch, model_dtype(model)) for batch in batches]
    if device.type != "meta":
        batches = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batches)
    return CalibrationData(batches, what, domains)
