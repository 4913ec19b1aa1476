"""Fixtures for all tests."""

import copy
import functools
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter import _registration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import upcycle.kernels
import upcycle.passes.plugins  # fills the registries
from upcycle.bench import alone
from upcycle.bench import run as bench
from upcycle.cli.group import collector_paused
from upcycle.ir import activations
from upcycle.layers.config import OTHER_KINDS
from upcycle.pointwise import OPS
from upcycle.recipe.methods import EXPERT_METHODS, ROUTER_METHODS
from upcycle.targets.onnx import export
from upcycle.util.registry import installed


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the tests import stays: the collector does not walk it again and again."""
    with collector_paused():
        return (yield)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of tiny models: starting a second thread takes longer than their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_trace() -> Iterator[None]:
    """Torch traces a model once for all files of it that a module writes from inputs of one form:
    what sets the files apart comes after that, and the tracing takes most of the time."""
    made: dict[Any, tuple[Any, Any]] = {}

    def once(model: Any, inputs: Any, axes: Any, **options: Any) -> Any:
        forms = [(name, tensor.shape, tensor.dtype) for name, tensor in inputs.items()]
        key = (id(model), repr((forms, axes, options)))
        if key not in made:
            made[key] = model, trace(model, inputs, axes, **options)  # kept, and so is the id
        program = made[key][1]
        return SimpleNamespace(
            model=program.model.clone(), exported_program=program.exported_program
        )

    trace = export.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_torchlib() -> Iterator[None]:
    """Torch parses its 500 functions anew for every ONNX file, which takes a second."""
    apis = _registration.onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="module")
def one_machine() -> Iterator[None]:
    """`upcycle bench` measures the rates of this machine, which takes seconds, once per dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure", functools.cache(bench.measure))
        yield


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`upcycle bench` runs each model by itself, from the same files, but in this process: another
    one takes 9 seconds to import torch and transformers. test_bench_alone.py has real ones, and
    `test_the_six_metrics` of test_bench.py."""

    def run(command: list[str], **options: Any) -> Any:
        alone._run(*map(Path, command[-2:]))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    own = SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(alone, "subprocess", own)


@pytest.fixture(autouse=True)
def quiet_log() -> None:
    """A command that an earlier test, or a fixture, ran in this process sends the log to stderr."""
    log = logging.getLogger("upcycle")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that run a file of version 0.1.0: it registers its kernels in transformers."""
    registered = ALL_EXPERTS_FUNCTIONS._global_mapping
    monkeypatch.setitem(registered, "upcycle", upcycle.kernels.run_experts)


@pytest.fixture
def own_registries() -> Iterator[None]:
    """For tests that register something: afterwards it is forgotten."""
    tables: list[Any] = [OPS, OTHER_KINDS]
    for registry in (EXPERT_METHODS, ROUTER_METHODS, activations.REGISTRY):
        tables += [registry._entries, registry._places, registry._given]
    before = [copy.copy(table) for table in tables]
    installed.cache_clear()
    yield
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)
    installed.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages on `sys.path`, whose modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
