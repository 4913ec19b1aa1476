"""A dense model that is an ONNX file: read, run and verified by ONNX Runtime."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from upcycle.conversion.dense_model import Facts
from upcycle.conversion.make import Kept, Made, Visit
from upcycle.conversion.onnx_rewrite import FILE, write_converted
from upcycle.conversion.options import Options
from upcycle.conversion.spool import Spool
from upcycle.data.calibration import CalibrationData
from upcycle.data.onnx_calibration import Feeds, inputs_of_ffn
from upcycle.errors import UsageError
from upcycle.ir.measured import OnnxFacts
from upcycle.ir.report import Report
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, read_ffn
from upcycle.models.onnx_file import OnnxSource
from upcycle.onnx.external_data import stored_bytes
from upcycle.onnx.inputs import Array
from upcycle.onnx.open_file import open_graph
from upcycle.onnx.run import run
from upcycle.onnx.tensors import TORCH_TYPES
from upcycle.targets.files.read_back import Read, read_at
from upcycle.targets.files.staging import staged
from upcycle.targets.files.stored import read_stored
from upcycle.targets.onnx.insert import unique_keys
from upcycle.util.progress import Progress
from upcycle.verification.layers import stored
from upcycle.verification.onnx.layers import compare_outputs, verify_onnx_layers
from upcycle.verification.onnx.matrices import graph_matrices, matrices_of, verify_matrices
from upcycle.verification.onnx.rounding import verify_rounding
from upcycle.verification.whole_model import end_to_end


@dataclass
class OnnxFile:
    """An ONNX file, what it becomes, and what it is shown, as `DenseModel` tells.

    It is verified on `feeds`, for which it returns `outputs`; None if it is not verified.
    Peak memory: the graph with the weights inside the file, one FFN, and what it becomes; to verify
    ``onnx.weights: int8`` all matrices of the file.
    """

    source: OnnxSource
    plan: Plan
    feeds: Feeds
    outputs: Mapping[str, Array] | None
    data: CalibrationData | None
    options: Options

    @property
    def facts(self) -> Facts:
        """For reports."""
        return Facts(self.source.label, self.dtype, self.source.size)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        weight = self.plan.specs[0].ffn.contraction.weight
        return TORCH_TYPES[self.source.found.parameters[weight].dtype]

    def read(self, spec: MoESpec) -> FFNWeights:
        """The dense weights of one FFN."""
        return read_ffn(spec.ffn, self.source.found.weights)

    def show(self, plan: Plan, visit: Visit, scratch: Path, *, sequential: bool) -> Kept:
        """Run the file up to each FFN; always on what the dense file gives."""
        assert self.data is not None
        spool = Spool(scratch)
        for spec in plan.specs:
            seen = inputs_of_ffn(spec, self.source, self.data.batches)
            weights = visit(spec, self.read(spec), seen)
            if weights is not None:
                spool.put(spec, weights)
        return spool.get

    def importance(self, plan: Plan) -> Mapping[str, torch.Tensor]:
        """An ONNX file has no backward pass; `upcycle.conversion.open` refuses before."""
        raise UsageError(NO_GRADIENTS)

    def output(self, out: Path) -> AbstractContextManager[Path]:
        """A directory beside `out`."""
        options, protect = self.options, [self.source.path]
        return staged(out, overwrite=options.overwrite, protect=protect, fresh=options.fresh)

    def write(self, directory: Path, scratch: Path, made: Made, progress: Progress) -> Read:
        """Write ``model.onnx``; float experts that it does not read go to `scratch`.

        The result reads the float experts by name.
        """
        folder = scratch / "float" if made.plan.recipe.onnx.rounds else directory
        folder.mkdir(parents=True, exist_ok=True)
        places = write_converted(
            self.source,
            made.plan,
            directory,
            made=made.layer,
            beside=folder,
            max_shard_size=self.options.max_shard_size,
        )
        return lambda name: read_stored(folder, places[name])

    def verify(
        self, report: Report, directory: Path, made: Made, written: Read, progress: Progress
    ) -> Report:
        """Tiers T0 to T2, and the checker of onnx."""
        path, specs = directory / FILE, made.plan.specs
        case = stored(lambda spec: read_at(spec.ffn.path, spec, written))
        rows, checks = verify_onnx_layers(
            self.source,
            specs,
            path,
            layer_of=lambda spec: case(spec).layer,
            provenance=made.provenance,
            feeds=self.feeds,
            progress=progress,
        )
        assert self.outputs is not None
        options = made.plan.recipe.onnx
        outputs = run(path, self.feeds, prepack=options.rounds)  # rounded as it will be served
        found = compare_outputs(self.outputs, outputs, self.feeds)
        rounding = None
        if options.rounds:
            regions = self.source.found.regions
            keys = unique_keys({path: len(places) for path, places in regions.items()})
            layers = {key: case(spec).layer for spec in specs for key in keys[spec.ffn.path]}
            rounded, more = verify_rounding(
                path, {key: layer.experts for key, layer in layers.items()}, self.feeds
            )
            checks += more
            matrices = None
            if options.weights == "int8":
                dense = graph_matrices(open_graph(self.source.path))
                for key, layer in layers.items():
                    dense |= {f"{key}.{name}": t for name, t in matrices_of(layer).items()}
                matrices, more = verify_matrices([path], dense)
                checks += more
            if rounded or matrices:
                rounding = OnnxFacts(
                    layers=tuple(rounded) or None, matrices=matrices, bytes=stored_bytes(path)
                )
        if rounding is None:  # else the outputs are off by more than the recipe says, which is told
            checks.append(end_to_end(found, made.plan.recipe, self.dtype))
        every = (*report.checks, *checks)
        return replace(report, layers=rows, end_to_end=found, rounding=rounding, checks=every)


NO_GRADIENTS = (
    "an ONNX file is run forwards only, and the recipe's methods look at gradients; convert the "
    "model that it was exported from, or use another recipe"
)
