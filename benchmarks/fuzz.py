"""Damage files and see what the product says: python benchmarks/fuzz.py [--runs 10000] [--seed 0].

Each run changes one file (a checkpoint, its index, a configuration, a recipe, a report, the
provenance, an ONNX file, calibration data) by bytes or by values, and runs one command on it in a
process of its own. It must end in 30 s with exit code 0 or with one of the sentences of the errors;
what a safetensors header says otherwise than the model must not be accepted. Prints a table, and
the first case of each kind that went wrong; a run is repeated by its seed and number.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from click.testing import CliRunner
from damage import change_bytes, change_header, change_json, change_text, nasty
from rich.console import Console
from rich.table import Table

import upcycle.conversion.pipeline  # imported once, before processes are forked
import upcycle.conversion.verify_directory  # noqa: F401
from upcycle.cli.main import main as upcycle_main
from upcycle.data.calibration_files import read_calibration
from upcycle.errors import UpcycleError

LIMIT = 30  # seconds
MEMORY = 2 * 10**9  # bytes above those that the process has already


@dataclass(frozen=True)
class Found:
    """How a run ended: ``ok``, ``refused``, or what is wrong; and its last words."""

    kind: str
    verdict: str
    words: str
    number: int


class Bench:
    """The files that are damaged, and the commands that read them."""

    def __init__(self, work: Path) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(work / "llama")
        model.save_pretrained(work / "sharded", max_shard_size="20KB")
        self.work = work
        more = ("--set", "experts.count=2", "--target", "safetensors", "--no-verify")
        assert self.run("convert", work / "llama", "--recipe", "sparse-upcycling",
                        "--out", work / "moe", *more)() == 0  # fmt: skip
        linear = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)
        ).eval()
        x = torch.randn(2, 8)
        torch.onnx.export(linear, (x,), work / "model.onnx", dynamo=True, verbose=False)
        merged = onnx.load(work / "model.onnx")
        (work / "onnx").mkdir()
        onnx.save(merged, work / "onnx" / "model.onnx")
        (work / "recipe.yaml").write_text(
            "version: 1\nexperts:\n  method: copy\n  count: 4\nrouter:\n  method: normal\n"
            "  std: 0.02\n  top_k: 2\n  weights: renormalised\nlayers:\n  every: 1\nseed: 0\n"
        )
        (work / "data.jsonl").write_text(
            '{"text": "a b", "domain": "x"}\n{"text": "c", "domain": "y"}\n'
        )
        torch.save({"input_ids": torch.ones(4, 8, dtype=torch.int64)}, work / "data.pt")
        shutil.copy(work / "llama" / "model.safetensors", work / "data.safetensors")

    def run(self, *arguments: object) -> Callable[[], int]:
        """A command that returns its exit code and prints the last line of its errors."""

        def command() -> int:
            done = CliRunner().invoke(upcycle_main, [str(a) for a in arguments])
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                print("Traceback", repr(done.exception))
            print(*done.stderr.splitlines()[-1:])
            return done.exit_code

        return command

    def reading(self, path: Path) -> Callable[[], int]:
        """The reader of calibration data by itself."""

        def read() -> int:
            try:
                read_calibration([str(path)], allow_pickle=True)
            except UpcycleError as error:
                print(error)
                return error.exit_code
            return 0

        return read

    def case(self, kind: str, place: Path, draw: random.Random) -> Callable[[], int]:
        """Damage a copy in `place`; the command that reads it."""
        work = self.work
        here = place / "model"

        def damaged(
            source: str, file: str, change: Callable[[bytes, random.Random], bytes]
        ) -> Path:
            if (work / source).is_dir():
                shutil.copytree(work / source, here)
                path = here / file
            else:
                path = place / file
                shutil.copy(work / source, path)
            path.write_bytes(change(path.read_bytes(), draw))
            return path

        plan = ("--recipe", "sparse-upcycling")
        convert = ("--out", place / "out", "--target", "safetensors", "--no-verify")
        if kind == "checkpoint, diff":
            damaged("llama", "model.safetensors", change_header)
            return self.run("diff", here, work / "llama")
        if kind.startswith("checkpoint, convert"):
            damaged("llama", "model.safetensors", change_header)
            way = "--stream" if "stream" in kind else "--no-stream"
            return self.run("convert", here, *plan, *convert, way)
        if kind == "index":
            damaged("sharded", "model.safetensors.index.json", change_json)
            return draw.choice([self.run("diff", here, work / "llama"),
                                self.run("plan", here, *plan)])  # fmt: skip
        if kind == "configuration, plan":
            damaged("llama", "config.json", change_json)
            return self.run("plan", here, *plan)
        if kind == "configuration, verify":
            damaged("moe", "config.json", change_json)
            return self.run("verify", work / "llama", here)
        if kind == "report":
            damaged("moe", "report.json", change_json)
            return draw.choice([self.run("inspect", here), self.run("inspect", here, "--json"),
                                self.run("verify", work / "llama", here)])  # fmt: skip
        if kind == "provenance":
            damaged("moe", "provenance.json", change_json)
            return draw.choice(
                [self.run("inspect", here), self.run("verify", work / "llama", here)]
            )
        if kind == "recipe":
            path = damaged("recipe.yaml", "recipe.yaml", change_text)
            return self.run("plan", work / "llama", "--recipe", path)
        if kind == "--set":
            key = draw.choice(
                ["seed", "experts.count", "router.top_k", "layers.include", "onnx.form"]
            )
            value = draw.choice(["[", '"\\ud800"', "*x", "!!python/name:os.abort", "1e400", ""])
            value = value if draw.random() < 0.3 else json.dumps(nasty(draw))
            return self.run(
                "plan", work / "llama", *plan, "--set", f"{key}={value}".replace("\0", "")
            )
        if kind == "ONNX":
            damaged("onnx", "model.onnx", change_bytes)
            return self.run("inspect", here / "model.onnx")
        assert kind == "calibration"
        name = draw.choice(["data.jsonl", "data.pt", "data.safetensors"])
        change = {"data.jsonl": change_text, "data.pt": change_bytes}.get(name, change_header)
        return self.reading(damaged(name, name, change))


KINDS = {
    "checkpoint, diff": 20,
    "checkpoint, convert": 8,
    "checkpoint, convert --stream": 8,
    "index": 10,
    "configuration, plan": 14,
    "configuration, verify": 2,
    "report": 10,
    "provenance": 6,
    "recipe": 10,
    "--set": 4,
    "ONNX": 14,
    "calibration": 10,
}  # of a hundred or so


def header_differs(path: Path, original: Path) -> bool:
    """Whether a header names a tensor of the model with another type or shape, or lacks it."""

    def described(file: Path) -> dict[str, Any]:
        raw = file.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        return {k: (v["dtype"], v["shape"]) for k, v in header.items() if k != "__metadata__"}

    there, wanted = described(path), described(original)
    return any(there.get(name) != kind for name, kind in wanted.items())


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
