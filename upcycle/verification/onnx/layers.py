"""Verify a converted ONNX file in ONNX Runtime, layer by layer and as a whole.

- T0 and T1: as for a module, on the activations that each layer gets in ONNX Runtime; and the
  output of its nodes against the layer in torch.
- T2: all outputs against those of the dense file.
- T4: onnx's checker, with inferred shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from upcycle.errors import UsageError, VerificationError
from upcycle.ir.measured import Check, LayerDistance, ModelDistance
from upcycle.ir.rounding import ROUNDING
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import Provenance
from upcycle.layers.moe import MoE
from upcycle.models.onnx_file import OnnxSource
from upcycle.onnx.inputs import Array, describe, draw_inputs, given_inputs
from upcycle.onnx.open_file import check_graph
from upcycle.onnx.run import run
from upcycle.targets.onnx.insert import unique_keys
from upcycle.util.progress import Progress
from upcycle.verification.checks import CHECKER, NODES, check, worst_at
from upcycle.verification.layers import LayerCase, Origins, layer_checks, verify_layers
from upcycle.verification.metrics import check_outputs, distance
from upcycle.verification.onnx.rounded_layers import rounded_paths

# Two correct computations may choose other experts for a token where moving it by this part of its
# largest number changes the choice.
_TIE = 1e-5


def feeds_for(source: OnnxSource, seed: int) -> dict[str, Array]:
    """The inputs of both files: the user's, or random ones.

    Raises:
        UsageError: the user's lack an input of the graph.
    """
    if source.example is None:
        return draw_inputs(source.model, seed=seed)
    try:
        return given_inputs(source.model, source.example)
    except KeyError as error:
        names = ", ".join(str(value.name) for value in source.model.graph.inputs)
        raise UsageError(
            f"`example_inputs`: {error.args[0]} is missing; the inputs are {names}"
        ) from error


def compare_outputs(
    dense: Mapping[str, Array], converted: Mapping[str, Array], feeds: Mapping[str, Array]
) -> ModelDistance:
    """Tier T2: the distance of every float output, and the worst of them.

    Raises:
        VerificationError: an output is missing or has another shape, or none is of floats.
    """
    check_outputs(converted, dense, "the converted file")
    outputs = {
        name: distance(torch.from_numpy(converted[name]), torch.from_numpy(reference))
        for name, reference in dense.items()
        if reference.dtype.kind == "f" and reference.size
    }
    if not outputs:
        raise VerificationError("the file returns no float tensor that could be compared")
    worst = max(found.relative for found in outputs.values())
    return ModelDistance(describe(feeds), outputs, worst)


def verify_onnx_layers(
    source: OnnxSource,
    specs: Sequence[MoESpec],
    path: Path,
    *,
    layer_of: Callable[[MoESpec], MoE],
    provenance: Mapping[str, Provenance],
    feeds: Mapping[str, Array],
    progress: Progress,
) -> tuple[tuple[LayerDistance, ...], list[Check]]:
    """Tiers T0, T1 and T4 of the converted file `path`; one layer is in memory at a time.

    `layer_of` gives a layer in torch, with the weights that were written, before any were rounded;
    `provenance` the dense neurons behind the layer of each FFN path.
    """
    places = {spec.ffn.path: source.found.regions[spec.ffn.path] for spec in specs}
    regions = {  # one for each layer; what is inside a branch shows in the outputs alone
        path: region for path, found in places.items() for region in found if not region.inside
    }
    names = [name for region in regions.values() for name in (region.x_name, region.output_name)]
    seen = run(path, feeds, names)
    keys = unique_keys({path: len(found) for path, found in places.items()})
    rounded = rounded_paths(path)

    def case(spec: MoESpec) -> LayerCase:
        layer, region = layer_of(spec), regions.get(spec.ffn.path)
        if region is None:
            return LayerCase(layer)
        x_TD = _tokens(seen[region.x_name], spec)
        if not len(x_TD):
            return LayerCase(layer)
        if rounded & set(keys[spec.ffn.path]):  # these have checks of their own
            return LayerCase(layer, x_TD)
        error = _nodes_error(layer, x_TD, _tokens(seen[region.output_name], spec))
        return LayerCase(layer, x_TD, {"nodes_relative": error})

    origins = Origins(source.found.weights, provenance)
    rows = verify_layers(specs, case, origins, progress=progress)
    checks = list(layer_checks(rows, torch.float32))
    nodes = {row.path: row.nodes_relative for row in rows if row.nodes_relative is not None}
    if nodes:
        output = seen[next(iter(regions.values())).output_name]
        checks.append(worst_at(NODES, nodes, ROUNDING[torch.from_numpy(output).dtype]))
    if not check_graph(source.path):  # else the checker complains about the dense file, too
        checks.append(check(CHECKER, float(bool(check_graph(path))), 0))
    return rows, checks


def _tokens(array: Array, spec: MoESpec) -> torch.Tensor:
    """Activations as tokens [T, D] in float32."""
    tensor = torch.from_numpy(array).float().movedim(spec.ffn.axis, -1)
    return tensor.reshape(-1, tensor.shape[-1])


@torch.no_grad()
def _nodes_error(layer: MoE, x_TD: torch.Tensor, y_TO: torch.Tensor) -> float:
    """How far the nodes are from the layer, on the tokens whose nearest neighbours choose alike."""
    chosen_TE = _chosen(layer, x_TD)
    logits_TE = layer.router(x_TD)[0][:, : layer.experts.num_experts].float()
    # Equal scores, such as the zeros of a ReLU, are equal for the neighbours, too.
    least_T = logits_TE.masked_fill(~chosen_TE, torch.inf).amin(-1)
    refused_T = logits_TE.masked_fill(chosen_TE, -torch.inf).amax(-1)
    clear_T = (least_T - refused_T).abs() > _TIE * logits_TE.abs().amax()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        noise_TD = torch.randn(x_TD.shape, generator=generator) * x_TD.abs().amax(-1, keepdim=True)
        clear_T &= (_chosen(layer, x_TD + _TIE * noise_TD) == chosen_TE).all(-1)
    if not clear_T.any():
        return 0.0
    return distance(y_TO[clear_T], layer.tokens(x_TD)[clear_T]).relative


def _chosen(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """Which experts each token visits, [T, E] bool."""
    _, weights_TK, index_TK = layer.router(x_TD)
    none_TE = torch.zeros(len(x_TD), layer.experts.num_experts)
    return none_TE.scatter_add(1, index_TK, weights_TK.abs().float()) > 0
