"""Verify a converted ONNX file in ONNX Runtime, layer by layer and as a whole.

- T0 and T1: as for a module, on the activations that ONNX Runtime hands to each layer; and what the
  nodes of the layer return against the layer in torch.
- T2: all outputs against those of the dense file.
- T4: onnx's checker, with inferred shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UsageError, VerificationError
from upcycle.ir.measured import Check, Distance, LayerDistance, ModelDistance
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
from upcycle.verification.metrics import ROUNDING, distance
from upcycle.verification.onnx.rounding import rounded_paths

# A token that another expert is chosen for when it is moved by this part of its largest number may
# be routed either way by two correct computations.
_TIE = 1e-5


def feeds_for(source: OnnxSource, seed: int) -> dict[str, Array]:
    """What both files are run on: given by the user, or drawn.

    Raises:
        UsageError: the user's inputs lack one of the graph's.
    """
    if source.example is None:
        return draw_inputs(source.model, seed=seed)
    try:
        return given_inputs(source.model, source.example)
    except KeyError as error:
        names = ", ".join(str(value.name) for value in source.model.graph.inputs)
        raise UsageError(f"--inputs: {error.args[0]} is missing; the inputs are {names}") from error


def compare_outputs(
    dense: Mapping[str, Array], converted: Mapping[str, Array], feeds: Mapping[str, Array]
) -> ModelDistance:
    """Tier T2: the distance of every float output, and the worst of them."""
    outputs: dict[str, Distance] = {}
    for name, reference in dense.items():
        if name not in converted or converted[name].shape != reference.shape:
            raise VerificationError(
                f"the converted file does not return {name} {list(reference.shape)}"
            )
        if reference.dtype.kind == "f" and reference.size:
            ours, theirs = torch.from_numpy(converted[name]), torch.from_numpy(reference)
            outputs[name] = distance(ours, theirs)
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
    """Tiers T0, T1 and T4; one layer is in memory at a time.

    Args:
        source: the dense file, for its weights.
        specs: the planned layers.
        path: the converted file.
        layer_of: a layer in torch, with the weights that were written, before any were rounded.
        provenance: FFN path -> the dense neurons behind its layer.
        feeds: inputs of the file.
        progress: called after each layer.
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
        if rounded & set(keys[spec.ffn.path]):  # those have checks of their own
            return LayerCase(layer, x_TD)
        error = _nodes_error(layer, x_TD, _tokens(seen[region.output_name], spec))
        return LayerCase(layer, x_TD, {"nodes_relative": error})

    origins = Origins(source.found.weights, provenance)
    rows = verify_layers(specs, case, origins, progress=progress)
    checks = list(layer_checks(rows, torch.float32))
    nodes = {row.path: row.nodes_relative for row in rows if row.nodes_relative is not None}
    if nodes:
        checks.append(worst_at(NODES, nodes, ROUNDING[_dtype(seen, regions)]))
    if not check_graph(source.path):  # else the checker has something against the dense file, too
        checks.append(check(CHECKER, float(bool(check_graph(path))), 0))
    return rows, checks


def _dtype(seen: Mapping[str, Array], regions: Mapping[str, Any]) -> torch.dtype:
    region = next(iter(regions.values()))
    return torch.from_numpy(seen[region.output_name]).dtype


def _tokens(array: Array, spec: MoESpec) -> torch.Tensor:
    """Activations as tokens [T, D] in float32."""
    tensor = torch.from_numpy(array).float().movedim(spec.ffn.axis, -1)
    return tensor.reshape(-1, tensor.shape[-1])


@torch.no_grad()
def _nodes_error(layer: MoE, x_TD: torch.Tensor, y_TO: torch.Tensor) -> float:
    """How far the nodes are from the layer, on tokens whose choice of experts is clear.

    That is one that tokens a little to the side have, too.
    """
    chosen_TE = _chosen(layer, x_TD)
    logits_TE = layer.router(x_TD)[0].float()
    # Equal scores, such as the zeros of a ReLU, stay equal beside the token, too.
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
