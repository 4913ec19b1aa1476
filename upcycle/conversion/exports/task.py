"""What each target of an export gets, and what it returns."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from upcycle.data.verification_inputs import Evaluation
from upcycle.ir.measured import Check, Distance, OnnxFacts
from upcycle.models.companions import copy_companions
from upcycle.util.progress import Progress


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        form: ``onnx``, ``gguf`` with the type of its weights, or the native architecture.
        checks: the files against the model; empty if it was not verified.
        onnx: how far an ONNX file that is not float32 is from the model.
        rounded: how far the outputs are with the rounded weights of a GGUF file.
    """

    form: str
    checks: tuple[Check, ...]
    onnx: OnnxFacts | None = None
    rounded: Distance | None = None


@dataclass(frozen=True)
class Task:
    """What each target gets: the model of `source`, and the `folder` to write into."""

    source: Path
    folder: Path
    model: nn.Module
    evaluation: Evaluation
    trust_remote_code: bool
    verify: bool
    progress: Progress

    def copy_companions(self) -> None:
        """Copy what loaders look for beside the weights."""
        copy_companions(self.source, self.folder, trust_remote_code=self.trust_remote_code)
