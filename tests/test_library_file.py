"""The compiled library: who may have made it, what is in it, and what keeps it from being there."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_case import made, routed

from upcycle.errors import UsageError
from upcycle.kernels import library_file as module
from upcycle.kernels import run_experts, weights_of
from upcycle.kernels.compiled import library, run_compiled, run_routed
from upcycle.kernels.library_file import is_intact, is_private, library_file
from upcycle.util.cache_folder import cache_directory

needs_compiler = pytest.mark.skipif(library() is None, reason="no GCC 12 or Clang")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the library, which is asked for again."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("UPCYCLE_CACHE", str(folder))
    monkeypatch.setattr(module, "FLAGS", ("-O0", *module.FLAGS[1:]))  # compiles faster
    library.cache_clear()
    yield folder
    library.cache_clear()


def built() -> Path:
    with library_file() as path:
        return path


@needs_compiler
def test_it_is_compiled_once(cache: Path) -> None:
    path = built()
    assert list(cache.iterdir()) == [path]
    written = path.stat().st_mtime_ns
    assert built() == path
    assert path.stat().st_mtime_ns == written
    assert path.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "half", "zeroed", "text", "link", "writable"])
def test_what_is_not_as_it_was_made_is_made_again(cache: Path, damage: str) -> None:
    path = built()
    content = path.read_bytes()
    half = len(content) // 2
    path.chmod(0o600)
    if damage == "link":
        shutil.move(path, cache.parent / "elsewhere.so")
        path.symlink_to(cache.parent / "elsewhere.so")
    elif damage == "writable":
        path.chmod(0o666)
    else:
        ways = {"empty": b"", "half": content[:half], "text": b"no library"}
        path.write_bytes(ways.get(damage, content[:half] + bytes(len(content) - half)))
    assert not is_intact(path)
    found = library()  # a damaged one would end this process
    assert found is not None
    again = built()
    assert is_intact(again)
    assert list(cache.iterdir()) == [again]


@needs_compiler
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_library_of_somebody_else_is_not_loaded(cache: Path) -> None:
    path = built()
    os.chown(path, 12345, 12345)
    assert not is_intact(path)
    assert built().stat().st_uid == 0
    os.chown(cache, 12345, 12345)
    assert not is_private(cache)


@needs_compiler
def test_where_others_can_write_nothing_is_kept(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planted = built()
    planted.chmod(0o600)
    cache.chmod(0o777)
    with library_file() as path:
        assert path.parent != cache
        assert is_intact(path)
    assert not path.exists()
    assert "compiled anew in each process" in caplog.text
    assert library() is not None
    cache.chmod(0o1777)  # what is mine there stays mine, as in /tmp
    assert is_private(cache)


def test_a_folder_above_counts(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True, mode=0o700)
    assert is_private(below)
    (tmp_path / "a").chmod(0o777)
    assert not is_private(below)


def compiler(folder: Path, script: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


NO_SYMBOLS = 'for last; do :; done; echo "int x;" | cc -shared -fPIC -x c - -o "$last"'
BROKEN = {
    "hangs": ("sleep 600 & sleep 600", "timed out after 0.5 seconds"),
    "no utf-8": (r"printf 'Fehler: \344\n' >&2; exit 1", "Fehler: "),
    "no library": ('for last; do :; done; echo text > "$last"', ""),
    "no symbols": (NO_SYMBOLS, "undefined symbol: upcycle_experts_float32"),
}


@needs_compiler
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_compiler_is_one_line_in_the_log(
    kind: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script, words = BROKEN[kind]
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    monkeypatch.setattr(module, "SECONDS", 0.5 if kind == "hangs" else 60.0)
    _, experts = made("swiglu", torch.float32)
    before = time.monotonic()
    with caplog.at_level(logging.WARNING):
        y_TO = run_experts(experts, *routed(9, torch.float32, gaps=False))
    assert time.monotonic() - before < 30
    assert y_TO.isfinite().all()
    (record,) = caplog.records
    said = record.getMessage()
    assert "slower" in said
    assert words in said
    assert "\n" not in said


def test_without_a_home_directory_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("UPCYCLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    library.cache_clear()
    _, experts = made("swiglu", torch.float32)
    try:
        with caplog.at_level(logging.WARNING):
            assert run_experts(experts, *routed(9, torch.float32, gaps=False)).isfinite().all()
        assert len(caplog.records) == 1
        if shutil.which("c++") or shutil.which("g++"):
            assert "set UPCYCLE_CACHE" in caplog.text
        with pytest.raises(UsageError, match="set UPCYCLE_CACHE"):
            cache_directory()
    finally:
        library.cache_clear()


@needs_compiler
def test_shapes_that_do_not_fit_are_an_error() -> None:
    _, experts = made("swiglu", torch.float32)
    w = weights_of(experts)
    x_TD, index_TK, weights_TK = routed(9, torch.float32, gaps=False)
    for given in (
        (x_TD[:, :8], index_TK, weights_TK),
        (x_TD, index_TK, weights_TK[:1, :1]),
        (x_TD, index_TK[:4], weights_TK[:4]),
        (x_TD, torch.zeros(200_000, 1, dtype=torch.int64), torch.ones(1, 1)),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            run_compiled(*w[:4], w.activation, *given)
    assert w.up_bias_EG is not None
    for up, up_bias, down, down_bias in (
        (w.up_EGD[:2], w.up_bias_EG, w.down_EOI, None),
        (w.up_EGD[:, :-3].contiguous(), None, w.down_EOI, None),
        (w.up_EGD, w.up_bias_EG[:, :-1].contiguous(), w.down_EOI, None),
        (w.up_EGD, w.up_bias_EG, w.down_EOI, torch.zeros(2, 3)),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            run_compiled(up, up_bias, down, down_bias, w.activation, x_TD, index_TK, weights_TK)
    router = (torch.zeros(len(w.up_EGD) + 1, x_TD.shape[1]), None, 1, "one", 1.0)
    assert run_routed(w.up_EGD, None, w.down_EOI, w.activation, x_TD, router) is None
    for top_k in (0, len(w.up_EGD) + 1):
        router = (torch.rand(len(w.up_EGD), x_TD.shape[1]), None, top_k, "one", 1.0)
        assert run_routed(w.up_EGD, None, w.down_EOI, w.activation, x_TD, router) is None


# Address space for the tensors, and then for no more: neither stacks of threads nor vectors.
SHORT = """
import resource, sys, torch
from upcycle.kernels.compiled import library, run_compiled
assert library() is not None
count, width, tokens = 2, 4096, int(sys.argv[1])
torch.manual_seed(0)
up, down = torch.randn(count, width, 8), torch.randn(count, 8, width)
x, index = torch.randn(tokens, 8), torch.zeros(tokens, 2, dtype=torch.int64)
index[:, 1] = 1
weights = torch.rand(tokens, 2)
torch.set_num_threads(1)
expected = run_compiled(up, None, down, None, "silu", x[:9], index[:9], weights[:9])
used = 1024 * int(next(line for line in open("/proc/self/status") if "VmSize" in line).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 64_000_000, used + 64_000_000))
torch.set_num_threads(64)
try:
    found = run_compiled(up, None, down, None, "silu", x, index, weights)
    print(torch.equal(found[:9], expected))
except MemoryError as error:
    print(error)
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
@pytest.mark.parametrize(
    ("tokens", "said"), [(64, "True"), (20_000, "no memory is left to run 20000 tokens")]
)
def test_no_thread_and_no_memory_do_not_end_the_process(tokens: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SHORT, str(tokens)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said)
