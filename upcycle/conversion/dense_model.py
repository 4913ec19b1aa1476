"""What the pipeline asks of a dense model, whatever it is: a module, a checkpoint, an ONNX file."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch

from upcycle.conversion.make import Layers, Made
from upcycle.conversion.options import Options
from upcycle.ir.report import DType, HubSource, Published, Report
from upcycle.ir.spec import Plan
from upcycle.passes.plan.costs import costs
from upcycle.util.progress import Progress
from upcycle.version import __version__

Written = TypeVar("Written")  # what a kind of model knows of its files


@dataclass(frozen=True)
class Facts:
    """What reports say of a dense model.

    `size` is how many parameters it has, and the bytes of one; `streamed` how it is converted, if
    it is never whole in memory; `unread` the tensors of its files that nothing in it reads; `hub`
    the repository that it comes from; `published` what its card says.
    """

    label: str
    dtype: torch.dtype
    size: tuple[int, int]
    streamed: str | None = None
    unread: tuple[str, ...] = ()
    hub: HubSource | None = None
    published: Published | None = None


class DenseModel(Layers, Protocol[Written]):
    """A dense model that was captured and planned; all that can be refused has been."""

    @property
    def facts(self) -> Facts:
        """For reports."""
        ...

    @property
    def options(self) -> Options:
        """How it is converted and written."""
        ...

    def output(self, out: Path) -> AbstractContextManager[Path]:
        """A directory that becomes `out` when the block ends well."""
        ...

    def write(self, directory: Path, scratch: Path, made: Made, progress: Progress) -> Written:
        """Write the converted model, and nothing that describes it."""
        ...

    def verify(
        self, report: Report, directory: Path, made: Made, written: Written, progress: Progress
    ) -> Report:
        """The report with what was measured of `directory`, and the checks of it."""
        ...


def header(plan: Plan, facts: Facts) -> Report:
    """The report before anything is measured."""
    return Report(
        upcycle=__version__,
        model=facts.label,
        recipe=plan.recipe_name,
        resolved_recipe=plan.recipe.model_dump(mode="json"),
        promise=plan.promise,
        dtype=cast(DType, str(facts.dtype).removeprefix("torch.")),
        torch=torch.__version__,
        source=facts.hub,
        published=facts.published,
        costs=costs(plan, *facts.size),
        streamed=facts.streamed,
        unread=facts.unread or None,
    )
