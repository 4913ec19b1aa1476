"""Damage files and see what the product says: python benchmarks/fuzz.py [--runs 10000] [--seed 0].

Each run changes one file (a checkpoint, its index, a configuration, a recipe, a report, the
provenance, an ONNX file, calibration data) by bytes or by values, and runs one command on it in a
process of its own. It must end in 30 s with exit code 0 or with one of the sentences of the errors;
what a safetensors header says otherwise than the model must not be accepted. Prints a table, and
the first case of each kind that went wrong; a run is repeated by its seed and number.
"""

import argparse
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from fuzz_files import KINDS, Bench, header_differs
from rich.console import Console
from rich.table import Table

import upcycle.conversion.pipeline  # imported once, before processes are forked
import upcycle.conversion.verify_directory  # noqa: F401

LIMIT = 30  # seconds
MEMORY = 2 * 10**9  # bytes above those that the process has already


@dataclass(frozen=True)
class Found:
    """How a run ended: ``ok``, ``refused``, or what is wrong; and its last words."""

    kind: str
    verdict: str
    words: str
    number: int


def one(bench: Bench, seed: int, number: int) -> Found:
    """Run case `number`."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    place = Path(tempfile.mkdtemp(dir=bench.work))
    try:
        command = bench.case(kind, place, draw)
        code, said, seconds = in_a_process(command)
        verdict = judged(code, said, seconds)
        if verdict == "ok" and kind.startswith("checkpoint, convert"):
            given = place / "model" / "model.safetensors"
            if header_differs(given, bench.work / "llama" / "model.safetensors"):
                verdict = "accepted what the header denies"
        return Found(kind, verdict, said.strip()[-300:], number)
    finally:
        shutil.rmtree(place)


def judged(code: int, said: str, seconds: float) -> str:
    if seconds >= LIMIT:
        return "hangs"
    if code < 0:
        return f"signal {-code}"
    if "Traceback" in said:
        return "traceback"
    if code == 1 or "a bug in upcycle" in said:
        return "called a bug"
    return "refused" if code else "ok"


def in_a_process(command: Callable[[], int]) -> tuple[int, str, float]:
    """Exit code (or minus a signal), what was printed, and seconds."""
    start = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        code = 1
        try:
            code = command()
        except BaseException as error:
            print("Traceback", repr(error))
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    said = b""
    while (left := LIMIT - (time.monotonic() - start)) > 0:
        if not select.select([read], [], [], left)[0]:
            break
        piece = os.read(read, 65536)
        if not piece:
            break
        said += piece
    else:
        os.kill(child, signal.SIGKILL)
    seconds = time.monotonic() - start
    if seconds >= LIMIT:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code, said.decode(errors="replace"), seconds


def fuzz(work: Path, runs: range, seed: int, jobs: int = 2) -> list[Found]:
    """All cases of `runs`, in the folder `work`."""
    torch.set_num_threads(1)  # threads do not survive a fork
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(work)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda number: one(bench, seed, number), runs))


GOOD = ("ok", "refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        found = fuzz(work, range(given.first, given.first + given.runs), given.seed)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    verdicts = [*GOOD, *sorted({one.verdict for one in found} - set(GOOD))]
    table = Table("damaged", "runs", *verdicts)
    for kind in KINDS:
        counts = Counter(one.verdict for one in found if one.kind == kind)
        table.add_row(kind, str(counts.total()), *(str(counts[verdict]) for verdict in verdicts))
    Console(width=140).print(table)
    seen = set()
    for case in found:
        key = (case.kind, case.verdict, case.words[:60])
        if case.verdict not in GOOD and key not in seen:
            seen.add(key)
            print(f"run {case.number}, {case.kind}: {case.verdict}: {case.words}")
    raise SystemExit(len(verdicts) > len(GOOD))


if __name__ == "__main__":
    main()
