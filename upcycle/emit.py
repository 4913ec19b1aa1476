"""Emit: write a converted model in the asked formats, and read it back as a user would.

The directory holds the checkpoint, the ONNX file (whose weights are in the checkpoint), what the
dense directory had beside its weights, ``recipe.yaml``, ``report.json`` and a model card.
"""

import contextlib
import copy
import importlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from upcycle.capture import ExampleInputs
from upcycle.errors import UsageError
from upcycle.evaluation import Evaluation, comparable, outputs_of
from upcycle.metrics import ROUNDING, distance
from upcycle.recipe_file import dump_recipe
from upcycle.source import Source
from upcycle.spec import Plan
from upcycle.tap import install
from upcycle.targets import model_card, remote_code
from upcycle.targets.checkpoint import UPCYCLE_JSON, Checkpoint, write_checkpoint
from upcycle.targets.companions import copy_companions
from upcycle.targets.onnx.compare import session
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.tensor_file import check_disk, read_tensors
from upcycle.verification import (
    Check,
    check,
    compare_models,
    model_dtype,
    raise_if_failed,
    same_greedy_text,
)

TARGETS = ("safetensors", "onnx")


@dataclass(frozen=True)
class Emission:
    """What was written: the checkpoint, and the names of all files."""

    checkpoint: Checkpoint
    files: tuple[str, ...]


def check_targets(targets: Sequence[str]) -> None:
    """Raises UsageError for an unknown target."""
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--target {target}: unknown; choose from {', '.join(TARGETS)}")


def emit(
    directory: Path,
    model: nn.Module,
    plan: Plan,
    *,
    dense: nn.Module,
    evaluation: Evaluation,
    source: Source | None,
    targets: Sequence[str],
    max_shard_size: int,
    report: dict[str, Any],
    verify: bool,
    name: str,
) -> Emission:
    """Write everything into `directory`, which exists; fills in `report`.

    Raises:
        ResourceError: the disk is too small; nothing was written.
        VerificationError: what is read back is not the model (tiers T3 and T4).
    """
    training = model.training
    model.eval()
    check_disk(directory, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    factory = source.name if source and source.directory is None else None
    written = write_checkpoint(
        directory, model, plan, factory=factory, max_shard_size=max_shard_size
    )
    report["checkpoint"] = {
        "form": written.form,
        "architecture": written.architecture,
        "not_native_because": written.reasons,
    }
    if source and source.directory:
        copy_companions(source.directory, directory)
    if verify:
        report["checks"] += _verify_reload(directory, model, dense, evaluation, plan)
    if "onnx" in targets:
        path = _write_onnx(directory, model, evaluation, written)
        if verify:
            report["checks"] += verify_onnx(path, model, evaluation)
    raise_if_failed(report)
    (directory / "recipe.yaml").write_text(dump_recipe(plan.recipe))
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (directory / "README.md").write_text(_card(name, plan, written, targets, report))
    model.train(training)
    files = tuple(sorted(p.name for p in directory.iterdir()))
    return Emission(written, files)


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a converted model, whatever form it has on disk.

    Args:
        directory: as `Conversion.save` or ``upcycle convert`` wrote it.
        model: for a plain module that was converted in memory: a dense instance of it, which gives
            the architecture and is changed in place. Transformers models and ``package.module:
            callable`` models need none.

    Raises:
        UsageError: the directory is no output of upcycle, or a plain module needs `model`.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return _load_transformers(directory)
    description = directory / UPCYCLE_JSON
    if not description.is_file():
        raise UsageError(f"{directory}: neither config.json nor {UPCYCLE_JSON} is here")
    data = json.loads(description.read_text())
    if model is None:
        if not data["factory"]:
            raise UsageError(
                f"{directory}: give upcycle.load a dense {data['class']} as `model`; the directory "
                "has its weights and not its code"
            )
        module_name, _, attribute = data["factory"].partition(":")
        model = getattr(importlib.import_module(module_name), attribute)()
    install(model, data["sites"])
    tensors = read_tensors(directory)
    for name, parameter in {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
    }.items():
        if name in tensors and parameter.dtype != tensors[name].dtype:
            parameter.data = parameter.data.to(tensors[name].dtype)
    model.load_state_dict(dict(tensors), strict=True)
    return model.eval()


def _load_transformers(directory: Path) -> nn.Module:
    config = json.loads((directory / "config.json").read_text())
    trusted = (directory / remote_code.FILE).is_file()
    names = [n for n in config.get("auto_map", {}) if n.startswith("AutoModel")]
    auto = names[0] if names else "AutoModelForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        try:
            model = getattr(transformers, auto).from_pretrained(
                directory, trust_remote_code=trusted, dtype="auto", local_files_only=True
            )
        finally:
            transformers.utils.logging.enable_progress_bar()
    loaded: nn.Module = model.eval()
    return loaded


def _verify_reload(
    directory: Path, model: nn.Module, dense: nn.Module, evaluation: Evaluation, plan: Plan
) -> list[Check]:
    """Tier T3: the files give the model back, and an exact one writes the dense model's text."""
    skeleton = None if isinstance(model, PreTrainedModel) else copy.deepcopy(dense)
    loaded = load(directory, model=skeleton)
    rounding = ROUNDING[model_dtype(model)]
    found = compare_models(model, loaded, evaluation, predictions=False)
    checks = [check("files loaded again", found["relative"], rounding)]
    if plan.promise == "exact":
        same = same_greedy_text(dense, loaded, evaluation)
        if same is not None:
            checks.append(check("greedy text differs from the dense model's", float(not same), 0))
    return checks


def _write_onnx(
    directory: Path, model: nn.Module, evaluation: Evaluation, written: Checkpoint
) -> Path:
    """Export in float32, the type that ONNX Runtime has on every machine."""
    if model_dtype(model) != torch.float32:
        raise UsageError(
            f"--target onnx: the weights are {model_dtype(model)}; convert with --dtype float32"
        )
    with _without_cache(model):
        return export_onnx(
            model,
            _tensors(evaluation.batches[0]),
            path=directory / "model.onnx",
            stored=written.stored,
        )


def verify_onnx(path: Path, model: nn.Module, evaluation: Evaluation) -> list[Check]:
    """Tier T4: ONNX Runtime against PyTorch on the evaluation's batches, padding left out."""
    runner = session(path)
    names = [value.name for value in runner.get_outputs()]
    worst = 0.0
    with _without_cache(model):
        for batch in evaluation.batches:
            given = _tensors(batch)
            values = given.values() if isinstance(given, dict) else given
            feeds = zip((i.name for i in runner.get_inputs()), values, strict=True)
            made = runner.run(None, {name: tensor.numpy() for name, tensor in feeds})
            ours = comparable(
                {name: torch.from_numpy(array) for name, array in zip(names, made, strict=True)},
                batch,
            )
            for name, reference in outputs_of(model, batch).items():
                worst = max(worst, distance(ours[name], reference).relative)
    return [check("ONNX Runtime against PyTorch", worst, ROUNDING[torch.float32])]


def _tensors(example: ExampleInputs) -> Any:
    """The tensors among the inputs: an ONNX graph has no other kind."""
    if isinstance(example, Mapping):
        return {k: v for k, v in example.items() if isinstance(v, torch.Tensor)}
    return example


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A graph from token ids to outputs, without the key-value cache of generation."""
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache is not None:
            config.use_cache = False
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache


def _card(
    name: str, plan: Plan, written: Checkpoint, targets: Sequence[str], report: dict[str, Any]
) -> str:
    numbers = (
        {"relative error, end to end": f"{report['end_to_end']['relative']:.2e}"}
        if ("end_to_end" in report)
        else {}
    )
    language = report.get("end_to_end", {}).get("language_model", {})
    numbers |= {key.replace("_", " "): f"{value:.4g}" for key, value in language.items()}
    checks = [model_card.Check(c["what"], c["error"], c["allowed"]) for c in report["checks"]]
    loading = [written.form] + (["onnx"] if "onnx" in targets else [])
    return model_card.model_card(
        name=name,
        base_model=report["model"],
        promise=plan.promise,
        recipe_name=plan.recipe_name,
        recipe_text=dump_recipe(plan.recipe),
        numbers=numbers,
        checks=checks,
        targets=loading,
        auto_class=written.auto_class,
        runtimes=written.runtimes,
    )
