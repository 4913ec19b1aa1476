"""Fixtures for all tests."""

import copy
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import upcycle.kernels
import upcycle.passes.plugins  # fills the registries
from upcycle.ir import activations
from upcycle.layers.config import OTHER_KINDS
from upcycle.pointwise import OPS
from upcycle.recipe.methods import EXPERT_METHODS, ROUTER_METHODS
from upcycle.targets.onnx import export
from upcycle.util.registry import installed


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of tiny models: starting a second thread takes longer than their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_trace() -> Iterator[None]:
    """Torch traces a model once for all files of it that a module writes: what sets their forms
    apart comes after that, and the tracing takes most of the time."""
    made: dict[int, tuple[Any, Any]] = {}

    def once(model: Any, *given: Any, **options: Any) -> Any:
        if id(model) not in made:
            made[id(model)] = model, trace(model, *given, **options)  # kept, and so is the id
        program = made[id(model)][1]
        return SimpleNamespace(
            model=program.model.clone(), exported_program=program.exported_program
        )

    trace = export.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", once)
        yield


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
