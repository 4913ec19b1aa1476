"""The library's own functions: locate, convert, and what a conversion is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import nn
from torch.export import ExportedProgram

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.dense_model import header
from upcycle.conversion.in_memory import InMemory
from upcycle.conversion.make import Made, making
from upcycle.conversion.open import in_memory
from upcycle.conversion.options import Options, check_targets
from upcycle.conversion.pipeline import SCRATCH, finish
from upcycle.conversion.workers import HERE, Workers
from upcycle.data.calibration import Data, given_data
from upcycle.data.verification_inputs import Evaluation
from upcycle.errors import UsageError
from upcycle.graphs.program import example_of, module_of
from upcycle.ir.ffn import Located
from upcycle.ir.report import Report
from upcycle.ir.spec import Plan
from upcycle.ir.weights import Provenance
from upcycle.models.dense import Source
from upcycle.models.expert_sources import open_sources
from upcycle.models.named import open_model
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.merge import merge
from upcycle.passes.plan.model_problems import check_model
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.reader import Override, load_recipe
from upcycle.recipe.schema import Recipe
from upcycle.targets.checkpoint import Checkpoint, planned_layers
from upcycle.targets.files.tensor_file import MAX_SHARD_SIZE
from upcycle.targets.pt2.export import programs
from upcycle.util.modules import unwrapped
from upcycle.util.progress import Progress, silent, step
from upcycle.verification.checks import raise_if_failed


@dataclass(frozen=True)
class Emission:
    """What was written: the checkpoint, and the names of all files."""

    checkpoint: Checkpoint
    files: tuple[str, ...]


@dataclass
class Conversion:
    """A converted model.

    Attributes:
        model: the converted module, a normal `nn.Module`.
        made: the plan, and where the layers come from.
        opened: the dense module, which is unchanged, and the inputs of the verification.
        measured: the report of the conversion; without checks if verification was not run.
        report: the same, and after `save` with what was measured of the files.
    """

    model: nn.Module
    made: Made = field(repr=False)
    opened: InMemory = field(repr=False)
    measured: Report = field(repr=False)
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.report = self.measured

    @property
    def plan(self) -> Plan:
        """What was found and decided."""
        return self.made.plan

    @property
    def provenance(self) -> dict[str, Provenance]:
        """FFN path -> the dense neurons behind its layer."""
        return self.made.provenance

    @property
    def dense(self) -> nn.Module:
        """The module that was converted."""
        return self.opened.dense

    @property
    def evaluation(self) -> Evaluation:
        """The inputs of the verification."""
        return self.opened.evaluation

    def save(
        self,
        out: str | Path,
        *,
        targets: Sequence[str] = ("safetensors",),
        runtimes: Sequence[str] = (),
        architecture: str | None = None,
        overwrite: bool = False,
        fresh: bool = False,
        max_shard_size: int = MAX_SHARD_SIZE,
        pt2_form: Literal["portable", "fused"] = "portable",
        verify: bool = True,
        progress: Progress = silent,
    ) -> Emission:
        """Write the model in one or several formats; nothing is left behind on failure.

        Args:
            out: the directory; it is written beside its place and renamed at the end.
            targets: of ``safetensors``, ``onnx`` (a file that reads the safetensors beside it) and
                ``pt2``, a program of `torch.export`.
            pt2_form: of its layers: ``portable``, operations of ATen alone; or ``fused``, one node
                ``upcycle::moe``, which a process that imports upcycle can load.
            runtimes: what has to run the checkpoint: transformers, vllm, sglang, llama.cpp, ...
            architecture: the MoE architecture of transformers to write; by default what fits.
            overwrite: replace an existing directory.
            fresh: remove what an interrupted ``upcycle convert`` left beside `out`.
            max_shard_size: bytes of one safetensors file.
            verify: load the files again and compare (tiers T3 and T4).
            progress: called as each stage begins and ends.

        Raises:
            UsageError: the directory exists, or a target is unknown.
            UnsupportedError: the model cannot be written as one of the targets.
            ResourceError: the disk is too small.
            VerificationError: a loaded file is not the model.
        """
        check_targets(targets, verify=verify)
        opened = self.opened
        opened.options = Options(
            targets=targets,
            overwrite=overwrite,
            fresh=fresh,
            max_shard_size=max_shard_size,
            pt2_form=pt2_form,
        )
        made = replace(self.made, plan=self.plan.requiring(runtimes, architecture))
        with opened.output(Path(out)) as directory:
            written = opened.write(directory, directory / SCRATCH, made, progress)
            check = opened.verify_files if verify else None
            name = Path(out).absolute().name
            self.report = finish(
                opened, made, written, self.measured, directory, name, check, progress
            )
            return Emission(written, tuple(sorted(path.name for path in directory.iterdir())))

    def programs(
        self, form: Literal["portable", "fused"] = "portable", *, cache: bool = True
    ) -> dict[str, ExportedProgram]:
        """The converted model as programs of `torch.export`: one, called ``model``, or those that
        generate text with a `cache`.

        Args:
            form: of the layers, as for `save`.
            cache: take and return keys and values, where the model generates text.

        Raises:
            UnsupportedError: torch cannot export the model.
        """
        return dict(programs(self.model, self.evaluation.batches[0], form, cache=cache))

    def to_dense(self) -> nn.Module:
        """A dense model with the weights that the converted one has now; for splits only.

        Raises:
            UnsupportedError: the experts are copies, or slices of copies.
        """
        layers = {
            spec.ffn.path: (spec, layer) for spec, layer in planned_layers(self.model, self.plan)
        }
        return merge(self.dense, self.model, layers, self.provenance)


def locate(
    model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None = None
) -> Located:
    """Every dense FFN of `model`, and the reason for each near miss; no weight is read.

    Args:
        model: any module, also on the meta device; it is left alone. One that was compiled, or made
            parallel, stands for the module inside. Or a program of `torch.export`.
        example_inputs: keyword arguments or a tuple that its forward accepts; guessed if None.

    Raises:
        CaptureError: the forward could not be run on example inputs.
    """
    model, example_inputs = _as_module(model, example_inputs)
    return locate_in(unwrapped(model), example_inputs)


def convert(
    model: nn.Module | ExportedProgram | str | Path,
    recipe: str | Path | Recipe,
    example_inputs: ExampleInputs | None = None,
    calibration: Data | None = None,
    *,
    verify: bool = True,
    overrides: Sequence[Override] = (),
    recipe_name: str | None = None,
    source: Source | None = None,
    sources: Sequence[nn.Module | str | Path] | None = None,
    located: Located | None = None,
    workers: Workers = HERE,
    progress: Progress = silent,
) -> Conversion:
    """Turn the dense FFNs of `model` into MoE layers.

    Args:
        model: any module, as for `locate`; it is left alone. One that is a graph of torch.fx, or a
            program of `torch.export`, becomes a graph, in which each layer is one call. Or the name
            of a model, as the command line takes it: a directory, a hub id, a GGUF file, ...
        recipe: a shipped name, the path of a YAML file, or a `Recipe`.
        example_inputs: inputs that the model accepts; guessed if None.
        calibration: a text, several texts, batches of inputs, or what
            `upcycle.data.calibration_files.read_calibration` returns: what methods are shown that
            look at activations. A quarter is held out, to verify on; for a recipe that needs no
            data all of it is. If None, the documentation of Python for a model with a tokenizer.
        verify: measure the distance and raise if the recipe's promise is broken.
        overrides: ``key=value`` changes of the recipe, as ``--set`` takes them, and pairs such as
            ``("experts.method", function)``.
        recipe_name: how reports call the recipe; its name or that of its file if None.
        source: where the model comes from, for its tokenizer and for `Conversion.save`.
        sources: for ``from_checkpoints``: modules or names, instead of ``experts.sources``.
        located: the result of `upcycle.locate`, if it is known.
        workers: who makes the layers.
        progress: called after each layer.

    Raises:
        RecipeError: the recipe is not valid.
        UsageError: the weights have no numbers, or some that are not finite.
        CaptureError: the model cannot be run on example inputs.
        PlanError: an FFN cannot become what the recipe asks for.
        UnsupportedError: the model has no dense FFN, or cannot serve the router.
        VerificationError: the result is further from the dense model than promised.
    """
    if isinstance(model, str | Path):
        source = _opened(str(model))
        model = source.load()
        example_inputs = source.example if example_inputs is None else example_inputs
    model, example_inputs = _as_module(model, example_inputs)
    model = unwrapped(model)
    name = recipe_name or ("custom" if isinstance(recipe, Recipe) else Path(recipe).name)
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    several = open_sources(sources or resolved.experts.sources, model, source)
    if sources:
        named = resolved.experts.model_copy(update={"sources": several.names})
        resolved = resolved.model_copy(update={"experts": named})
    if located is None:
        located = locate_in(model, example_inputs)
    plan = make_plan(located, resolved, recipe_name=name)
    check_model(model, plan)
    with _meta_told(model):
        given = given_data(calibration)
        opened = in_memory(
            model, plan, given, source=source, example=example_inputs, sources=several
        )
        with making(opened, Path(SCRATCH), workers, progress) as made:
            converted = opened.finish(made)
        report = replace(header(made.plan, opened.facts), calibration=made.calibration)
        if verify:
            with step(progress, "verifying"):
                report = opened.verify_module(report, made)
            raise_if_failed(report)
    return Conversion(converted, made, opened, report)


def _as_module(
    model: nn.Module | ExportedProgram, example: ExampleInputs | None
) -> tuple[nn.Module, ExampleInputs | None]:
    """The module, which of a program is its graph, and example inputs."""
    if not isinstance(model, ExportedProgram):
        return model, example
    return module_of(model), example_of(model) if example is None else example


def _opened(name: str) -> Source:
    """The model of this name, with its weights on this machine."""
    source = open_model(name)
    if not isinstance(source, Source):
        raise UsageError(f"{name}: an ONNX file is converted by the command line alone")
    return source.fetched()


@contextmanager
def _meta_told(model: nn.Module) -> Iterator[None]:
    """Only recipes that look at no numbers, without verification, convert weights without any."""
    try:
        yield
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if meta is None:
            raise
        raise UsageError(
            f"{type(model).__name__}: its parameter `{meta}` is on the meta device and has no "
            "numbers, which the recipe or the verification looks at; load the weights first"
        ) from error
