"""A directory of a mixture of experts, written again after an operation on the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from upcycle.data.verification_inputs import Evaluation, evaluation_for
from upcycle.errors import UnsupportedError, UsageError, VerificationError, reason_of
from upcycle.ir.measured import ModelDistance
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.moe import MoE
from upcycle.layers.pretrained import UpcycledModel
from upcycle.models.companions import copy_companions
from upcycle.models.configuration import check_floats
from upcycle.models.moe_layers import moe_layers
from upcycle.operations.as_own import write_own
from upcycle.targets.files.staging import check_output, staged
from upcycle.targets.history_file import write_history
from upcycle.targets.load import load
from upcycle.targets.provenance_file import read_origins, with_experts, write_layers
from upcycle.util.json_text import read_json
from upcycle.util.modules import eval_mode, model_dtype, set_within
from upcycle.util.progress import Progress, silent, step
from upcycle.util.quiet import quiet_transformers
from upcycle.verification.whole_model import compare_models


@dataclass(frozen=True)
class Rewritten:
    """What was written.

    Attributes:
        out: the directory.
        before: the distance of what was written from the model before.
        bytes_before, bytes_after: of the files with weights.
        given: the same on data of the user, if there is any.
    """

    out: Path
    before: ModelDistance
    bytes_before: int
    bytes_after: int
    given: ModelDistance | None = None


Record = Callable[[Path, ModelDistance], None]


def rewrite(
    directory: Path,
    out: Path,
    change: Callable[[nn.Module], nn.Module],
    *,
    beside: Callable[[Path], None] = lambda folder: None,
    record: Record = lambda folder, found: None,
    judge: Callable[[nn.Module], Evaluation | None] = lambda model: None,
    dense: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Rewritten:
    """Write ``change(model)`` to `out`, for the mixture of experts in `directory`.

    It is loaded again from there, and compared with the changed model and with that before.

    Args:
        directory: of a converted model of transformers, or of a native one.
        change: gets the model, which it may change, and returns what is to be written.
        beside: writes more files into the directory, or changes those of the model.
        record: writes those that tell of the distance; see `recording`.
        judge: data of the user as inputs of the model, on which the distance is measured, too.
        dense: the model may be a dense one.

    Raises:
        UsageError: there is no such model, it is dense, quantised, or `out` exists.
        UnsupportedError: it is a plain module, which has no code in its directory, or transformers
            cannot load the result.
        VerificationError: what is loaded again is not what was written.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such directory")
    check_output(out, overwrite=overwrite, protect=[directory])
    if not (directory / "config.json").is_file():
        raise UnsupportedError(
            f"{directory}: no config.json is here; this works on models of transformers"
        )
    check_floats(directory, read_json(directory / "config.json").get("quantization_config"))
    with step(progress, "loading"):
        before: Any = load(directory, trust_remote_code=trust_remote_code)
        model: Any = load(directory, trust_remote_code=trust_remote_code)
    if not (dense or moe_layers(model)):
        raise UsageError(f"{directory}: no layer of it is a mixture of experts; convert it first")
    evaluation = evaluation_for(before, directory=directory, trust_remote_code=trust_remote_code)
    data = judge(before)
    with step(progress, "changing"):
        changed: Any = change(model)
    with staged(out, overwrite=overwrite, protect=[directory]) as folder:
        with step(progress, "writing"):
            copy_companions(directory, folder, trust_remote_code=trust_remote_code)
            if _is_made_here(changed):
                write_own(changed, folder)
            else:
                with quiet_transformers():
                    changed.save_pretrained(folder)
            beside(folder)
        with step(progress, "loading again"):
            again = _loaded_again(folder, directory, trust_remote_code)
        allowed = ROUNDING[model_dtype(changed)]
        with eval_mode(before, changed, again), _without_router_logits(before, changed, again):
            same = compare_models(changed, again, evaluation, predictions=False)
            if not same.relative <= allowed:
                raise VerificationError(
                    f"{out}: loaded again it is {same.relative:.1e} off what was written, and "
                    f"{allowed:.1e} is allowed"
                )
            found = compare_models(before, changed, evaluation)
            given = None if data is None else compare_models(before, changed, data)
        record(folder, found if given is None else given)
    return Rewritten(out, found, _bytes(directory), _bytes(out), given)


def recording(
    directory: Path, name: str, settings: Mapping[str, Any], chosen: Mapping[str, Sequence[int]]
) -> Record:
    """Keeps what stays true of the conversion: where each of the experts comes from; and tells what
    was done since.

    Args:
        directory: of the model before.
        name: of the operation; `settings` are those it was done with.
        chosen: the experts of each layer by path, in their old numbers; read when they are known.
    """

    def record(folder: Path, found: ModelDistance) -> None:
        origins = read_origins(directory)
        kept = with_experts(origins, chosen) if origins else None
        if kept is not None:
            write_layers(folder, kept)
        write_history(folder, directory, name, settings, found)

    return record


def _is_made_here(model: nn.Module) -> bool:
    """Whether layers of upcycle are in a class that has no code for them yet."""
    has_own = any(isinstance(module, MoE) for module in model.modules())
    return has_own and not isinstance(model, UpcycledModel)


def _loaded_again(folder: Path, directory: Path, trust_remote_code: bool) -> nn.Module:
    try:
        return load(folder, trust_remote_code=trust_remote_code)
    except UsageError as error:
        raise UnsupportedError(
            f"{directory}: transformers cannot load what is made of it: {reason_of(error)}"
        ) from error


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@contextmanager
def _without_router_logits(*models: Any) -> Iterator[None]:
    """They are as many as there are experts, and no output that is to stay."""
    with ExitStack() as undo:
        for model in models:
            if getattr(model.config, "output_router_logits", False):
                set_within(undo, model.config, "output_router_logits", False)
        yield
