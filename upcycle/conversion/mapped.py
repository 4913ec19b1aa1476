"""A dense model that is a checkpoint larger than memory: one FFN and one tensor at a time.

Names, order and shapes come from the model on the meta device, the numbers from the checkpoint's
memory map. The same pure transform makes the weights of each layer, and the same writer writes the
same bytes as a conversion in memory. Each layer is verified by itself, from the written file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.conversion.dense_model import Facts
from upcycle.conversion.make import Kept, Made, Visit
from upcycle.conversion.objectives import objective_for
from upcycle.conversion.options import DEFAULTS, Options
from upcycle.conversion.spool import Spool
from upcycle.conversion.workers import local_jobs, single_threads
from upcycle.data.calibration import CalibrationData
from upcycle.graphs.install import install
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.layer_weights import layer_tensors
from upcycle.ir.partial_projection import read_kept
from upcycle.ir.report import Report
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, MoEWeights, read_ffn
from upcycle.layers.moe import MoE
from upcycle.models.companions import copy_companions
from upcycle.models.dense import Source
from upcycle.models.expert_sources import NO_SOURCES, Sources
from upcycle.models.published import published
from upcycle.passes.calibrate.calibrate import calibrate
from upcycle.passes.calibrate.gradients import importance
from upcycle.passes.plan.costs import model_size
from upcycle.passes.rewrite import with_empty_layers
from upcycle.passes.transform.transform import transform
from upcycle.targets.checkpoint import Checkpoint, Content, write_checkpoint
from upcycle.targets.files.finished_shards import Manifest, sha256
from upcycle.targets.files.read_back import read_layer
from upcycle.targets.files.staging import staged
from upcycle.targets.files.stored import read_stored
from upcycle.util.background import started
from upcycle.util.memory import give_back
from upcycle.util.progress import Progress
from upcycle.verification.layers import Origins, layer_checks, stored, verify_layers
from upcycle.version import __version__


@dataclass
class Mapped:
    """A Hugging Face directory of safetensors files, what it becomes, and what it is shown.

    Peak memory: one FFN, what it becomes, and the largest tensor; for a recipe that looks at
    activations also those of one FFN, and for one that looks at gradients what autograd keeps of
    one batch.

    Attributes:
        source: the directory.
        skeleton: the dense model on the meta device.
        tensors: its tensors by the names of the module, mapped; of several models, their merge.
        plan: what its FFNs become.
        data: what is shown to it; None if the recipe needs nothing.
        sources: the models that experts are taken from.
        options: how it is converted and written.
        unread: the stored tensors that nothing in it reads.
        manifest: the finished files of the output.
    """

    source: Source
    skeleton: nn.Module
    tensors: Mapping[str, torch.Tensor]
    plan: Plan
    data: CalibrationData | None = None
    sources: Sources = NO_SOURCES
    options: Options = DEFAULTS
    unread: tuple[str, ...] = ()
    manifest: Manifest | None = field(default=None, init=False)

    @property
    def directory(self) -> Path:
        """Of the dense model."""
        assert self.source.directory is not None
        return self.source.directory

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        return self.tensors[self.plan.specs[0].ffn.parameters[0]].dtype

    @property
    def facts(self) -> Facts:
        """For reports."""
        total, _ = model_size(self.skeleton)
        how = "layer by layer; the whole model was not run"
        size = total, self.dtype.itemsize
        about = published(self.source.name, self.source.directory)
        return Facts(self.source.label, self.dtype, size, how, self.unread, self.source.hub, about)

    def read(self, spec: MoESpec) -> FFNWeights:
        """The dense weights of one FFN."""
        return read_ffn(spec.ffn, self.tensors, self.sources.tensors)

    def show(self, plan: Plan, visit: Visit, scratch: Path, *, sequential: bool) -> Kept:
        """Run the mapped model on the data; layers go to `scratch` at once.

        The pages of a block can be dropped once the batches have passed it. In sequential mode a
        layer comes back from its file, mapped as well, while they pass.
        """
        assert self.data is not None
        model, pairs = self._mapped(plan)
        spool, filled = Spool(scratch), list[MoE]()

        def each(spec: MoESpec, layer: MoE, ffn: FFNWeights, seen: FFNInputs) -> None:
            while filled:  # all batches have passed it
                filled.pop().to("meta")
            weights = visit(spec, ffn, seen)
            if weights is not None:
                spool.put(spec, weights)
            if weights is not None and sequential:
                tensors = layer_tensors(layer, spool.get(spec))
                layer.load_state_dict(tensors, assign=True, strict=False)
                filled.append(layer)
            give_back()

        calibrate(
            model,
            pairs,
            self.data.batches,
            dense=self.read,
            visit=each,
            sequential=sequential,
            domains=self.data.domains,
        )
        return spool.get

    def _mapped(self, plan: Plan) -> tuple[nn.Module, list[tuple[MoESpec, MoE]]]:
        """The model with mapped weights and layers without numbers, and those."""
        model, layers = with_empty_layers(self.source.load(mapped=True), plan.specs, in_place=True)
        for layer in layers:
            _as_stored(layer, self.dtype)
        return model, list(zip(plan.specs, layers, strict=True))

    def importance(self, plan: Plan) -> Mapping[str, torch.Tensor]:
        """FFN path -> the importance of its neurons [N, F] float32."""
        assert self.data is not None
        return importance(
            *self._mapped(plan),
            self.data.batches,
            dense=self.read,
            objective=objective_for(self.skeleton, seed=plan.recipe.seed),
            domains=self.data.domains,
        )

    @contextmanager
    def output(self, out: Path) -> Iterator[Path]:
        """A directory beside `out`, whose finished files stay if the run does not end well."""
        options = self.options
        with staged(
            out,
            overwrite=options.overwrite,
            protect=self.source.paths,
            resumable=True,
            resume=options.resume,
            fresh=options.fresh,
        ) as directory:
            key = started(self._key)  # it reads the whole model
            self.manifest = Manifest(directory, key)
            yield directory

    def _key(self) -> str:
        """What finished files are a part of: version, model files, decisions, sizes, data."""
        files = [
            file
            for folder in (self.directory, *self.sources.directories)
            for file in (*sorted(folder.glob("*.safetensors")), folder / "config.json")
            if file.exists()
        ]
        facts: list[Any] = [
            __version__,
            [(file.name, sha256(file)) for file in files],
            self.plan.recipe.model_dump(mode="json"),
            [spec.site() for spec in self.plan.specs],
            self.options.max_shard_size,
            None if self.data is None else self.data.digest,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path, scratch: Path, made: Made, progress: Progress) -> Checkpoint:
        """Write the checkpoint; files that an interrupted run finished are kept."""
        plan = made.plan
        kept = {kept.name: kept for spec in plan.specs for kept in spec.ffn.kept}

        def tensor(name: str) -> torch.Tensor:
            return read_kept(kept[name], self.tensors) if name in kept else self.tensors[name]

        def layer(spec: MoESpec) -> MoEWeights:
            give_back()  # the layer before has been written
            return made.layer(spec)

        trust = self.source.trust_remote_code
        copy_companions(self.directory, directory, trust_remote_code=trust)
        skeleton = self._converted_skeleton(plan)
        self.options.watch("rewrite", (skeleton, plan))
        written = write_checkpoint(
            directory,
            skeleton,
            plan,
            content=Content(tensor=tensor, layer=layer),
            max_shard_size=self.options.max_shard_size,
            log=self.manifest,
        )
        for spec in plan.specs:
            if spec.ffn.path not in made.provenance:  # its file was whole already
                made.provenance[spec.ffn.path] = transform(self.read(spec), spec).provenance
        return written

    def _converted_skeleton(self, plan: Plan) -> nn.Module:
        skeleton = self.source.skeleton().to(self.dtype)
        with torch.device("meta"):
            layers = install(skeleton, [spec.site() for spec in plan.specs])
        for layer in layers:
            _as_stored(layer, self.dtype)
        return skeleton

    def verify(
        self, report: Report, directory: Path, made: Made, written: Checkpoint, progress: Progress
    ) -> Report:
        """Tiers T0 and T1 on each layer as it is in the file, with random tokens."""
        specs = made.plan.specs

        def read(name: str) -> torch.Tensor:
            return read_stored(directory, written.stored[name])

        def weights(spec: MoESpec) -> MoEWeights:
            give_back()  # the layer before has been compared
            return read_layer(written.destination.target, spec, read)

        origins = Origins(self.tensors, made.provenance, self.sources.tensors)
        with single_threads(local_jobs(self.options.workers, specs)) as pool:
            rows = verify_layers(specs, stored(weights), origins, each=pool.map, progress=progress)
        checks = (*report.checks, *layer_checks(rows, self.dtype))
        return replace(report, layers=rows, checks=checks)


def _as_stored(layer: MoE, dtype: torch.dtype) -> None:
    """The layer in the dtype of its model; the router is never below float32."""
    layer.to(dtype)
    layer.router.to(torch.promote_types(dtype, torch.float32))
