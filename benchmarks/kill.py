"""Kill conversions at every operation on files: python benchmarks/kill.py [--every N].

Four kinds of conversion of a tiny Llama: piece by piece and in memory, into a new directory and
over an old one. Each is killed (SIGKILL) before every operation on a file, and in the middle of
every write. After that the output is the old or the new one, never half of it; and the next run
(with ``--resume`` piece by piece) makes the bytes of a run that nobody killed, and leaves nothing
beside them.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table
from tiny import llama

from upcycle.cli.main import main as upcycle
from upcycle.targets.files import staging

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile")
OPTIONS = ("--recipe", "sparse-upcycling", "--set", "experts.count=2", "--target", "safetensors")
SHARDS = ("--max-shard-size", "20KB", "--no-verify", "-q")
KINDS = {
    "streamed": ("--stream",),
    "streamed, over an old one": ("--stream", "--overwrite"),
    "in memory": ("--no-stream",),
    "in memory, over an old one": ("--no-stream", "--overwrite"),
}


@dataclass
class Outcome:
    """How many operations a kind of conversion has, and what was wrong after kills at them."""

    kind: str
    operations: int
    kills: int = 0
    wrong: list[str] = field(default_factory=list)


def dense_model(directory: Path) -> None:
    """A Llama with a tokenizer, which is copied beside the weights."""
    llama(200).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(f"word{i}" for i in range(200)))


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def in_a_process(function: Callable[[], int]) -> int:
    """Its result, or minus the signal that ended it; a fork, as imports take seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = function()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def convert(model: Path, out: Path, *options: str, watch: Callable[[], None] | None = None) -> int:
    """The exit code of a conversion in a process of its own; `watch` prepares that."""

    def run() -> int:
        if watch is not None:
            watch()
        arguments = ["convert", model, "--out", out, *OPTIONS, *SHARDS, *options]
        result = CliRunner().invoke(upcycle, [str(a) for a in arguments])
        if result.exit_code:
            print(result.stderr, file=sys.stderr)
        return result.exit_code

    return in_a_process(run)


def watching(root: Path, at: int | None, counted: Path) -> Callable[[], None]:
    """What counts operations below `root`, and kills the process at number `at`.

    The count goes into the file `counted`, which is above `root`. Writes count twice: before, and
    after half of the bytes.
    """
    count, inside = 0, str(root)

    def happens() -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def event(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and inside in os.fsdecode(path if isinstance(path, str | bytes) else b""):
                happens()
        elif name in CHANGES and inside in str(arguments):
            happens()

    def prepare() -> None:
        write, rename = os.write, staging._rename

        def renamed(*arguments: Any) -> bool:  # it calls the system past Python
            happens()
            done = rename(*arguments)
            happens()
            return done

        staging._rename = renamed

        def halved(file: int, data: Any) -> int:
            if inside not in str(Path(f"/proc/self/fd/{file}").readlink()):
                return write(file, data)
            happens()
            done = write(file, memoryview(data)[: len(data) // 2]) if len(data) > 1 else 0
            happens()
            return done + write(file, memoryview(data)[done:])

        def stop() -> None:
            counted.write_text(str(count))

        os.write = halved  # type: ignore[assignment]
        sys.addaudithook(event)
        exit_now = os._exit

        def leave(code: int) -> None:
            stop()
            exit_now(code)

        os._exit = leave  # type: ignore[assignment]

    return prepare


def attack(kind: str, model: Path, work: Path, every: int) -> Outcome:
    """Kill one kind of conversion at every `every`-th operation."""
    options, counted = KINDS[kind], work / "count"
    over = "--overwrite" in options
    place = work / "place"
    out = place / "out"

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if over:
            shutil.copytree(work / "old", out)

    begin()
    assert convert(model, out, *options, watch=watching(place, None, counted)) == 0
    whole, old = hashes(out), hashes(work / "old")
    outcome = Outcome(kind, int(counted.read_text()))
    resume = ("--resume",) if "--stream" in options else ()
    for at in range(1, outcome.operations + 1, every):
        begin()
        code = convert(model, out, *options, watch=watching(place, at, counted))
        outcome.kills += code == -signal.SIGKILL
        found = hashes(out) if out.exists() else None
        if found != whole and (found != old if over else found is not None):
            outcome.wrong.append(f"killed at {at}: the output is half")
        published = found == whole
        again = convert(model, out, *options, *resume, *(("--overwrite",) if published else ()))
        if again != 0:
            outcome.wrong.append(f"killed at {at}: the next run ends with {again}")
        elif hashes(out) != whole:
            differ = sorted(name for name, _ in hashes(out).items() ^ whole.items())
            outcome.wrong.append(f"killed at {at}: the next run differs in {differ}")
        if left := sorted(path.name for path in place.iterdir() if path != out):
            outcome.wrong.append(f"killed at {at}: {left} is left")
    return outcome


def attack_all(work: Path, every: int = 1) -> list[Outcome]:
    """All kinds, in the folder `work`."""
    torch.set_num_threads(1)  # threads do not survive a fork
    dense_model(work / "model")
    assert convert(work / "model", work / "old", "--set", "experts.count=3") == 0
    return [attack(kind, work / "model", work, every) for kind in KINDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="of the operations, one in so many")
    every = parser.parse_args().every
    work = Path(tempfile.mkdtemp())
    table = Table("conversion", "operations on files", "kills", "wrong afterwards")
    try:
        outcomes = attack_all(work, every)
    finally:
        shutil.rmtree(work)
    for outcome in outcomes:
        table.add_row(outcome.kind, *map(str, (outcome.operations, outcome.kills)),
                      str(len(outcome.wrong)))  # fmt: skip
    Console(width=120).print(table)
    for outcome in outcomes:
        for line in outcome.wrong:
            print(f"{outcome.kind}: {line}")
    raise SystemExit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
