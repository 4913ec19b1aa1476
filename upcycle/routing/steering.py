"""Steer a model: experts of a behaviour, found by two kinds of prompts, suppressed or forced."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from upcycle.errors import UsageError
from upcycle.routing.override import Override, override, steer
from upcycle.routing.statistics import resonance
from upcycle.routing.trace import Trace
from upcycle.util.json_text import read_json
from upcycle.util.text_file import write_text

_FORM = 1  # of the file
Layer = int | str  # by number, or by path


class _File(BaseModel):
    """The file of a `Steering`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    form: Literal[1]
    about: str = Field("", max_length=1000)
    suppress: list[tuple[Layer, int]] = Field([], max_length=100_000)
    force: list[tuple[Layer, int]] = Field([], max_length=100_000)


@dataclass(frozen=True)
class Steering:
    """Experts that are suppressed and forced, each with its layer: by path, or by number from 0.

    Attributes:
        about: what it is for, in words.
    """

    suppress: tuple[tuple[Layer, int], ...] = ()
    force: tuple[tuple[Layer, int], ...] = ()
    about: str = ""

    def on(self, model: nn.Module) -> AbstractContextManager[Override]:
        """`upcycle.override` with these experts."""
        return override(model, suppress=self.suppress, force=self.force)

    def attach(self, model: nn.Module) -> None:
        """Steer `model` for as long as it lives. Weights stay as they are, and a saved model does
        not know of it."""
        steer(model, suppress=self.suppress, force=self.force)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        text = json.dumps(
            {
                "form": _FORM,
                "about": self.about,
                "suppress": [list(one) for one in self.suppress],
                "force": [list(one) for one in self.force],
            },
            indent=1,
        )
        write_text(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Steering":
        """Read what `save` wrote.

        Raises:
            UsageError: there is no such file, or it is no steering.
        """
        try:
            found = _File.model_validate_json(json.dumps(read_json(Path(path))))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UsageError(
                f"{path}: no steering that `upcycle steer` wrote ({place}: {first['msg'].lower()})"
            ) from error
        return cls(tuple(found.suppress), tuple(found.force), found.about)


def found_by(
    trace: Trace,
    of: str,
    *,
    top: int = 10,
    action: Literal["suppress", "force"] = "suppress",
    about: str = "",
) -> Steering:
    """The `top` experts that resonate most with a class of the sequences of a trace.

    Args:
        of: the class of the behaviour; the other sequences lack it.
        top: experts of all layers together.
        action: what is to be done with them.

    Raises:
        UsageError: there are not both kinds of sequences, or not so many experts that resonate.

    Source:
        Dahlke et al., "MoTE", 2025, https://arxiv.org/abs/2502.11096
    """
    found = [one for one in resonance(trace, trace.classes, of) if one.value > 0]
    if not 1 <= top <= len(found):
        raise UsageError(
            f"top: {top}: {len(found)} experts are visited more by {of} than by the rest; choose 1 "
            f"to {len(found)}"
            if found
            else f"no expert is visited more by {of} than by the rest, as experts that are equal "
            "are not; train the model, or give other prompts"
        )
    experts = tuple((trace.paths[one.layer], one.expert) for one in found[:top])
    chosen: dict[str, Any] = {action: experts}
    return Steering(**chosen, about=about)
