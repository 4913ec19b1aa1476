"""What is in a directory that upcycle wrote, from its JSON files: no weight is read."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import UsageError
from upcycle.ir.report import plain
from upcycle.layers.config import LayerConfig
from upcycle.models.configuration import count_of_experts
from upcycle.targets.description import REPORT, read_report
from upcycle.targets.history_file import read_history, sentences
from upcycle.targets.onnx.file_names import FILES
from upcycle.targets.provenance_file import DRAWN, FILE, PADDING, LayerOrigin, read_origins, rows_of
from upcycle.util.json_text import read_json

if TYPE_CHECKING:
    from upcycle.routing.trace import Trace

ROUTER_FACTS = ("weights", "scale", "bias", "tied", "balance")


def directory_of(path: Path) -> Path:
    """The directory of a converted model, also if its ONNX file is named."""
    return path.parent if path.name in FILES and path.is_file() else path


def is_converted(directory: Path) -> bool:
    """Whether the report of a conversion describes the directory."""
    path = directory / REPORT
    try:
        return path.is_file() and "resolved_recipe" in read_json(path)
    except UsageError:  # a file of another program
        return False


def is_moe(directory: Path) -> bool:
    """Whether the configuration of the directory describes a mixture of experts."""
    path = directory / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return "upcycle" in config or bool(count_of_experts(config.get))


def inspect_moe(directory: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The MoE layers of a directory that no report describes, as after training; as plain data.

    `history` is what operations did since the conversion, `told` the same in sentences, and
    `origins` what the experts are made
    of, as in `inspect_converted`; each is None where no file tells of it.

    Raises:
        UsageError: its files are damaged.
    """
    from upcycle.models.moe_layers import moe_layers
    from upcycle.targets.load import skeleton_of

    model: Any = skeleton_of(directory, trust_remote_code=trust_remote_code)
    names = ("num_experts", "width", "top_k", "shared", "router", "d_model")
    layers, origins = moe_layers(model), read_origins(directory)
    history = read_history(directory)
    return {
        "directory": str(directory),
        "architecture": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "is_own": "upcycle" in vars(model.config),
        "onnx": sorted(path.name for path in directory.glob("*.onnx")),
        "layers": [
            {"path": row.name, **{name: getattr(row, name) for name in names}} for row in layers
        ],
        "history": plain(history),
        "told": sentences(history) if history else [],
        "origins": None if origins is None else [_layer(directory, layer) for layer in origins],
    }


def trace_of(directory: Path, file: Path, *, trust_remote_code: bool = False) -> "Trace":
    """The trace in `file`, which is one of the model in `directory`.

    Raises:
        UsageError: it is no trace, or that of a model with other layers.
    """
    from upcycle.routing.trace import Trace

    found = Trace.load(file)
    layers = inspect_moe(directory, trust_remote_code=trust_remote_code)["layers"]
    own = [(layer["path"], layer["num_experts"]) for layer in layers]
    if own != list(zip(found.paths, found.num_experts, strict=True)):
        raise UsageError(
            f"{file}: it is a trace of {len(found.paths)} MoE layers, and those of {directory} are "
            "others; trace that model"
        )
    return found


def inspect_converted(directory: Path) -> dict[str, Any]:
    """A converted model as plain data.

    `layers` is None where an older version of upcycle wrote no provenance. In each layer ``rows``
    counts the dense neurons that are there once, several times and not at all, the rows of zero
    padding, and the rows that were drawn anew.

    Raises:
        UsageError: upcycle did not write the directory, or its files are damaged.
    """
    report = read_report(directory)
    written = report.checkpoint
    layers = read_origins(directory)
    return {
        "directory": str(directory),
        "model": report.model,
        "upcycle": report.upcycle,
        "recipe": report.recipe,
        "promise": report.promise,
        "dtype": report.dtype,
        "form": written.form if written else "onnx",
        "architecture": written.architecture if written else None,
        "runtimes": written.runtimes if written else {},
        "onnx": sorted(path.name for path in directory.glob("*.onnx")),
        "layers": None if layers is None else [_layer(directory, layer) for layer in layers],
    }


def _layer(directory: Path, stored: LayerOrigin) -> dict[str, Any]:
    try:
        config = LayerConfig.from_json(stored["layer"])
        router = config.router
        return {
            "path": stored["path"],
            "promise": stored["promise"],
            "method": stored["method"],
            "experts": config.num_experts,
            "width": config.width,
            "shared": config.shared,
            "router": {
                "method": stored["router"],
                "kind": router.kind,
                "select": router.select.to_json(),
                **{name: getattr(router, name) for name in ROUTER_FACTS},
            },
            "compensation": stored["compensate"],
            "low_rank": config.low_rank,
            "output_bias": config.output_bias,
            "expert_bias": config.expert_bias,
            "dense_neurons": stored["dense_neurons"],
            "sources": stored["sources"],
            "expert_rows": stored["experts"],
            "shared_rows": stored["shared"],
            "was": stored.get("was"),
            "rows": _count(stored, stored["dense_neurons"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{directory / FILE}: not what this version of upcycle writes; convert the model again"
        ) from error


def _count(layer: LayerOrigin, dense_neurons: int) -> dict[str, int]:
    experts, shared = rows_of(layer)
    times = Counter(neuron for row in (*experts, shared) for neuron in row)
    padding, drawn = times.pop(PADDING, 0), times.pop(DRAWN, 0)
    once = list(times.values()).count(1)
    return {
        "once": once,
        "several_times": len(times) - once,
        "nowhere": dense_neurons - len(times),
        "padding": padding,
        "drawn_anew": drawn,
    }
