"""A dense model that is a module in memory, on its way through the pipeline."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.dense_model import Facts
from upcycle.conversion.make import Kept, Made, Visit
from upcycle.conversion.objectives import objective_for
from upcycle.conversion.options import DEFAULTS, Options
from upcycle.data.calibration import CalibrationData
from upcycle.data.verification_inputs import Evaluation, evaluation_for
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.layer_weights import weights_of
from upcycle.ir.report import Report
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, read_ffn
from upcycle.layers.moe import MoE
from upcycle.models.companions import copy_companions
from upcycle.models.dense import Source
from upcycle.models.expert_sources import NO_SOURCES, Sources, merged
from upcycle.models.published import published
from upcycle.passes.calibrate.calibrate import calibrate
from upcycle.passes.calibrate.gradients import importance
from upcycle.passes.plan.costs import model_size
from upcycle.passes.rewrite import fill, with_empty_layers
from upcycle.targets.checkpoint import Checkpoint, planned_layers, write_checkpoint
from upcycle.targets.files.staging import staged
from upcycle.targets.files.tensor_file import check_disk
from upcycle.targets.native.in_place import as_on_disk
from upcycle.targets.onnx.write import in_float32, write_onnx
from upcycle.targets.pt2.write import write_programs
from upcycle.util.copies import tensors_of
from upcycle.util.modules import class_of, eval_mode, model_dtype
from upcycle.util.progress import Progress, step
from upcycle.verification.files import verify_files
from upcycle.verification.in_memory import verify_module
from upcycle.verification.onnx.precision import verify_precision
from upcycle.verification.programs import verify_programs


@dataclass
class InMemory:
    """A module, what it becomes, and what it is shown; `DenseModel` tells of what is not here.

    Attributes:
        dense: the module; left alone.
        source: where it comes from.
        sources: the models that experts are taken from; the rest of the result is their merge.
        example: inputs that the user gave.
        text: what a language or embedding model is verified on, if the user gave one.
        unread: the stored tensors that nothing in it reads.
        converted: the result, once the layers are made.
    """

    dense: nn.Module
    plan: Plan
    data: CalibrationData | None = None
    source: Source | None = None
    sources: Sources = NO_SOURCES
    example: ExampleInputs | None = None
    text: str | None = None
    options: Options = DEFAULTS
    unread: tuple[str, ...] = ()
    converted: nn.Module | None = None

    @cached_property
    def evaluation(self) -> Evaluation:
        """The inputs of the verification, made when they are first needed."""
        return evaluation_for(
            self.dense,
            directory=self.source.directory if self.source else None,
            trust_remote_code=self.source is not None and self.source.trust_remote_code,
            example=self.example,
            text=self.text,
            seed=self.plan.recipe.seed,
        )

    @property
    def facts(self) -> Facts:
        """For reports."""
        label = self.source.label if self.source else class_of(self.dense)
        return Facts(
            label,
            model_dtype(self.dense),
            model_size(self.dense),
            unread=self.unread,
            hub=self.source.hub if self.source else None,
            published=published(self.source.name, self.source.directory) if self.source else None,
        )

    @cached_property
    def _base(self) -> nn.Module:
        """What the result has outside its experts."""
        if not self.sources.tensors:
            return self.dense
        return merged(self.dense, self.sources, self.plan.recipe.experts.merge)

    @cached_property
    def _parameters(self) -> Mapping[str, torch.Tensor]:
        return dict(self._base.named_parameters(remove_duplicate=False))

    def read(self, spec: MoESpec) -> FFNWeights:
        """The dense weights of one FFN."""
        return read_ffn(spec.ffn, self._parameters, self.sources.tensors)

    def show(self, plan: Plan, visit: Visit, scratch: Path, *, sequential: bool) -> Kept:
        """Run a converted copy on the data, and put what `visit` returns into it."""
        assert self.data is not None
        converted, pairs = self._empty(plan)

        def each(spec: MoESpec, layer: MoE, ffn: FFNWeights, seen: FFNInputs) -> None:
            weights = visit(spec, ffn, seen)
            if weights is not None:
                fill(layer, weights, ffn.down_OF.device)

        calibrate(
            converted,
            pairs,
            self.data.batches,
            dense=self.read,
            visit=each,
            sequential=sequential,
            domains=self.data.domains,
        )
        layers = {spec.ffn.path: layer for spec, layer in pairs}
        return lambda spec: weights_of(layers[spec.ffn.path])

    def _empty(self, plan: Plan) -> tuple[nn.Module, list[tuple[MoESpec, MoE]]]:
        """A converted copy whose layers have no numbers yet, and the layers."""
        self.converted, layers = with_empty_layers(self._base, plan.specs)
        return self.converted, list(zip(plan.specs, layers, strict=True))

    def importance(self, plan: Plan) -> Mapping[str, torch.Tensor]:
        """FFN path -> the importance of its neurons [N, F] float32."""
        assert self.data is not None
        return importance(
            *self._empty(plan),
            self.data.batches,
            dense=self.read,
            objective=objective_for(self.dense, seed=plan.recipe.seed),
            domains=self.data.domains,
        )

    def finish(self, made: Made) -> nn.Module:
        """The converted module; its layers are made now if nothing was shown to them."""
        if self.converted is None:
            for spec, layer in self._empty(made.plan)[1]:
                fill(layer, made.layer(spec), self._parameters[spec.ffn.parameters[0]].device)
        assert self.converted is not None
        return self.converted

    def _rewritten(self, made: Made) -> nn.Module:
        """The same, which the watch is told of."""
        model = self.finish(made)
        self.options.watch("rewrite", (model, made.plan))
        return model

    def output(self, out: Path) -> AbstractContextManager[Path]:
        """A directory beside `out`."""
        protect = self.source.paths if self.source else []
        options = self.options
        return staged(out, overwrite=options.overwrite, protect=protect, fresh=options.fresh)

    def write(self, directory: Path, scratch: Path, made: Made, progress: Progress) -> Checkpoint:
        """Write the checkpoint, what lies beside the dense weights, and ONNX files."""
        model, options = self._rewritten(made), self.options
        size = sum(t.numel() * t.element_size() for t in tensors_of(model).values())
        check_disk(directory, size * (1 + ("pt2" in options.targets)))  # a program has its own
        if self.source and self.source.directory:  # what it has of its own is not written anew
            trust = self.source.trust_remote_code
            copy_companions(self.source.directory, directory, trust_remote_code=trust)
        factory = self.source.name if self.source and self.source.directory is None else None
        with step(progress, "writing"), eval_mode(model):
            written = write_checkpoint(
                directory,
                model,
                made.plan,
                factory=factory,
                max_shard_size=options.max_shard_size,
            )
        if "onnx" in options.targets:
            with step(progress, "exporting to ONNX"), self._for_onnx(made, written) as single:
                example, onnx = self.evaluation.batches[0], made.plan.recipe.onnx
                write_onnx(directory, single, example, written.stored, onnx)
        if "pt2" in options.targets:
            with step(progress, "exporting programs"), self._as_written(made, written) as model:
                example, cache = self.evaluation.batches[0], made.plan.recipe.onnx.cache
                write_programs(directory, model, example, options.pt2_form, cache=cache)
        return written

    @contextmanager
    def _as_written(self, made: Made, written: Checkpoint) -> Iterator[nn.Module]:
        """The converted module with the numbers that the checkpoint has."""
        model, form = self.finish(made), written.destination
        with eval_mode(model), as_on_disk(planned_layers(model, made.plan), form.target):
            yield model

    @contextmanager
    def _for_onnx(self, made: Made, written: Checkpoint) -> Iterator[nn.Module]:
        """The same in float32."""
        with self._as_written(made, written) as model:
            yield in_float32(model, rounded_routers=written.destination.form == "native")

    def verify(
        self, report: Report, directory: Path, made: Made, written: Checkpoint, progress: Progress
    ) -> Report:
        """All tiers."""
        with step(progress, "verifying"):
            report = self.verify_module(report, made)
        return self.verify_files(report, directory, made, written, progress)

    def verify_module(self, report: Report, made: Made) -> Report:
        """Tiers T0 to T2: the module that was made."""
        return verify_module(
            report,
            made.plan,
            self.dense,
            self.finish(made),
            made.provenance,
            self.evaluation,
            self.sources,
        )

    def verify_files(
        self, report: Report, directory: Path, made: Made, written: Checkpoint, progress: Progress
    ) -> Report:
        """Tiers T3 and T4: what was written of it."""
        model, evaluation, plan = self.finish(made), self.evaluation, made.plan
        with step(progress, "loading again"):
            report = verify_files(report, directory, plan, written, self.dense, model, evaluation)
        if "onnx" in self.options.targets:
            with step(progress, "running ONNX"), self._for_onnx(made, written) as single:
                facts, checks = verify_precision(directory, single, evaluation, plan.recipe.onnx)
            report = replace(report, onnx=facts, checks=(*report.checks, *checks))
        if "pt2" in self.options.targets:
            form, cache = self.options.pt2_form, plan.recipe.onnx.cache
            with step(progress, "running programs"), self._as_written(made, written) as model:
                checks = verify_programs(directory, model, evaluation, form, cache=cache)
            report = replace(report, checks=(*report.checks, *checks))
        return report
