"""The files that `fuzz.py` damages, and the commands that read them."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from click.testing import CliRunner
from damage import change_bytes, change_header, change_json, change_text, nasty
from tiny import llama

from upcycle.cli.main import main as upcycle_main
from upcycle.data.calibration_files import read_calibration
from upcycle.errors import UpcycleError


class Bench:
    """The files that are damaged, and the commands that read them."""

    def __init__(self, work: Path) -> None:
        model = llama(64)
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
                                self.run("report", here),
                                self.run("verify", work / "llama", here)])  # fmt: skip
        if kind == "provenance":
            damaged("moe", "provenance.json", change_json)
            return draw.choice([self.run("inspect", here), self.run("report", here),
                                self.run("verify", work / "llama", here)])  # fmt: skip
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
