"""MoE experts on one NVIDIA GPU: the Triton kernels beside grouped_mm, eager, dense and others.

    python benchmarks/gpu.py [--minutes 7.5] [--out gpu.json]

First the machine is measured: its bfloat16 matrix rate and its memory bandwidth. They give each
case its floor: the time of its products at that rate, or of reading the weights of the visited
experts at that bandwidth, whichever is longer. Every implementation is then compared with float64
and timed, in turn, on four sets of tokens; once as called and, where it can be captured, as a CUDA
graph, which leaves out the time of the host. What cannot run is null, with the reason in the JSON.
Time that is left over tries other tiles for the kernels.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_experts import Run, Sample, Shape, experts_of, implementations, reason, samples
from gpu_measure import CHECKED, clock, exact, floor, machine
from rich.console import Console
from rich.table import Table
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from upcycle.kernels.triton.launch import Tiles, choose_tiles, launch

SHAPES: dict[str, Shape] = {
    "mixtral": (8, 2, 4096, 14336),
    "fine-64": (64, 8, 2048, 1024),
    "fine-128": (128, 8, 4096, 1536),
}
TOKENS = (1, 16, 256, 2048, 8192)
ROUNDS = 5
GRAPHS = {"upcycle_triton", "grouped_mm", "dense", "vllm", "sglang"}  # those that do not wait
UNCHECKED = {"dense", "megablocks"}  # other weights
Calls = dict[str, Callable[[], Any]]


def prepare(name: str, run: Run, sets: list[Sample], truth: Any) -> tuple[dict[str, Any], Calls]:
    """Compare with float64, warm up and capture: the row so far, and what is to be timed."""
    row: dict[str, Any] = {}
    y_TD = run(*sets[0])[:CHECKED].double()
    if name not in UNCHECKED:
        part = ((y_TD - truth[0]).abs() / truth[1]).nan_to_num(nan=torch.inf)
        row["error_of_limit"] = float(part.max())

    def every() -> None:
        for sample in sets:
            run(*sample)

    every()
    torch.cuda.synchronize()
    calls: Calls = {"s": every}
    if name in GRAPHS:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                every()
            calls["graph_s"] = graph.replay
        except Exception as error:
            row["graph_reason"] = reason(error)
    return row, calls


def case(runs: dict[str, Run | str], sets: list[Sample], truth: Any) -> dict[str, dict[str, Any]]:
    """Every implementation on one set of tokens; the rounds go through all of them in turn."""
    rows: dict[str, dict[str, Any]] = {}
    times: dict[tuple[str, str], list[float]] = {}
    calls: dict[str, Calls] = {}
    for name, run in runs.items():
        try:
            if isinstance(run, str):
                raise RuntimeError(run)
            rows[name], calls[name] = prepare(name, run, sets, truth)
        except Exception as error:
            rows[name] = {"s": None, "reason": reason(error)}
    every_key = [(name, key) for name, of_name in calls.items() for key in of_name]
    for _ in range(ROUNDS):
        for name, key in every_key:
            try:
                times.setdefault((name, key), []).append(clock(calls[name][key]) / len(sets))
            except Exception as error:
                rows[name] |= {f"{key}_reason": reason(error)}
    for (name, key), found in times.items():
        spread = {f"{key}_spread": [min(found), max(found)]}
        rows[name] |= {key: statistics.median(found)} | spread if found else {}
    return rows


def other_tiles(chosen: Tiles, *, gated: bool) -> list[Tiles]:
    """Neighbours of the static choice with as many rows."""
    columns = {32, 64, 128, chosen.columns} | (set() if gated else {256})
    found = []
    for width, depth, warps, stages in itertools.product(columns, (64, 128), (4, 8), (3, 4)):
        bytes_used = (chosen.rows + width * (2 if gated else 1)) * depth * 2 * stages
        values = chosen.rows * width * (2 if gated else 1) / (32 * warps)
        if bytes_used <= 227 * 1024 and values <= 128:
            found.append(Tiles(chosen.rows, width, depth, chosen.group, warps, stages))
    return found


def tune(experts: MixtralExperts, sets: list[Sample], until: float) -> dict[str, Any]:
    """The fastest tiles of the kernels for one case, and the time with the static ones."""
    count, tokens = experts.num_experts, len(sets[0][0])
    slots = sets[0][1].numel()
    rows = slots / min(slots, count)
    best: dict[str, Any] = {"s": float("inf")}
    for height in (rows, rows / 2, 2 * rows):
        pair = [choose_tiles(height, torch.bfloat16, gated=gated) for gated in (True, False)]
        for place in (0, 1):
            for tiles in [pair[place], *other_tiles(pair[place], gated=place == 0)]:
                if time.monotonic() > until:
                    return best | {"reason": "the time was up"}
                one, two = (tiles, pair[1]) if place == 0 else (pair[0], tiles)

                def every(one: Tiles = one, two: Tiles = two) -> None:
                    for sample in sets:
                        weights = experts.gate_up_proj, experts.down_proj, None, None
                        launch(*sample, *weights, "silu", True, (one, two))

                try:
                    every()
                    passed = clock(every, 0.02) / len(sets)
                except Exception as error:
                    best.setdefault("failed", []).append([list(tiles), reason(error)])
                    continue
                if height == rows and tiles == pair[place]:
                    best.setdefault("static_s", passed)
                if passed < best["s"]:
                    best |= {"s": passed, "tiles": [list(one), list(two)]}
            if "tiles" in best and best["tiles"][0][0] == pair[0].rows:
                pair[0] = Tiles(*best["tiles"][0])
        if tokens == 1:  # nothing is sorted: a block is one row, however high
            break
    return best


def probe() -> None:
    """Run the kernels once for each shape: a fault of theirs ends this process, not the other."""
    with torch.no_grad():
        for shape in SHAPES.values():
            experts = experts_of(shape)
            run = implementations(experts, shape[1])["upcycle_triton"]
            for tokens in TOKENS:
                run(*samples(shape, tokens)[0])
                torch.cuda.synchronize()


def fault() -> str | None:
    """What the kernels died of in a process of their own, if they did."""
    command = [sys.executable, __file__, "--probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "not through after two minutes"
    return None if done.returncode == 0 else " ".join(done.stderr.split())[-300:]


def table(cases: list[dict[str, Any]]) -> Table:
    """Milliseconds; as a graph where there is one, which the star says."""
    names = list(dict.fromkeys(name for one in cases for name in one["rows"]))
    made = Table("shape", "tokens", "floor", *names, title="ms (* CUDA graph), error <= limit: ok")
    for one in cases:
        cells = [one["shape"], str(one["tokens"]), f"{one['floor_s'] * 1e3:.3f}"]
        for name in names:
            row = one["rows"].get(name, {})
            seconds, star = row.get("graph_s") or row.get("s"), "*" if row.get("graph_s") else ""
            if seconds is None:
                cells.append("-")
                continue
            share = one["floor_s"] / seconds
            wrong = " WRONG" if row.get("error_of_limit", 0) > 1 else ""
            cells.append(f"{seconds * 1e3:.3f}{star} ({share:.0%}){wrong}")
        made.add_row(*cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch sees no CUDA GPU: run it on a machine with one")
    if given.probe:
        probe()
        return
    until = time.monotonic() + 60 * given.minutes
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(), "cases": [], "tuned": [], "left_out": []}
    here = report["machine"]
    console = Console(width=200)
    console.print(
        f"{here['gpu']}: {here['flops'] / 1e12:.0f} TFLOP/s, {here['bandwidth'] / 1e12:.2f} TB/s"
    )
    report["fault"] = why = fault()
    # Tuning comes last, so that the table is there whatever it costs.
    with torch.no_grad():
        for is_tuning, (name, shape) in itertools.product((False, True), SHAPES.items()):
            experts = experts_of(shape)
            runs = {} if is_tuning else implementations(experts, shape[1])
            if why:
                runs["upcycle_triton"] = why
            for tokens in TOKENS:
                label = {"shape": name, "tokens": tokens}
                # A case takes some ten seconds; a minute stays for the tiles and the end.
                if (why and is_tuning) or time.monotonic() > until - (5 if is_tuning else 40):
                    report["left_out"].append(label | {"tuning": is_tuning})
                    continue
                try:
                    sets = samples(shape, tokens)
                    if is_tuning:
                        report["tuned"].append(label | tune(experts, sets, until))
                    else:
                        rows = case(runs, sets, exact(experts, sets[0]))
                        one = label | {"floor_s": floor(shape, sets, here), "rows": rows}
                        report["cases"].append(one)
                except Exception as error:
                    report["left_out"].append(label | {"reason": reason(error)})
                given.out.write_text(json.dumps(report, indent=1))
            del experts, runs
            torch.cuda.empty_cache()
    console.print(table(report["cases"]))
    for one in report["tuned"]:
        console.print(
            one["shape"], one["tokens"], {k: one.get(k) for k in ("s", "static_s", "tiles")}
        )
    reasons = {
        n: r["reason"] for c in report["cases"] for n, r in c["rows"].items() if "reason" in r
    }
    for name, why in reasons.items():
        console.print(f"{name}: {why}", markup=False)
    for label in report["left_out"]:
        console.print("left out:", label)
    print(given.out)


if __name__ == "__main__":
    main()
