"""A model in a process of its own, so that what is measured there is of nothing else.

Run as a module, it is that process.
"""

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from upcycle.bench.meters import Readings, readings
from upcycle.bench.timing import interleaved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What such a process does; it gets here as a pickle.

    Attributes:
        make: opens the model.
        use: the model and `inputs` -> the call that is measured.
        seconds, most: for how long, and how often at most.
    """

    make: Callable[[], Any]
    use: Callable[[Any, Any], Callable[[], object]]
    inputs: Any
    seconds: float
    most: int


def measured_alone(job: Job) -> Readings | None:
    """The meters while it runs; None, and a warning in the log, if the process fails."""
    with TemporaryDirectory() as folder:
        given, found = Path(folder) / "job", Path(folder) / "found"
        with given.open("wb") as file:
            pickle.dump((sys.path, torch.get_num_threads()), file)
            pickle.dump(job, file)
        command = [sys.executable, "-P", "-m", __name__, str(given), str(found)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if not found.is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            log.warning("a model by itself was not measured: %s", lines[-1] if lines else "killed")
            return None
        result: Readings = pickle.loads(found.read_bytes())
        return result


@torch.no_grad()
def _run(given: Path, found: Path) -> None:
    with given.open("rb") as file:
        sys.path[:], threads = pickle.load(file)
        job: Job = pickle.load(file)
    torch.set_num_threads(threads)
    call = job.use(job.make(), job.inputs)
    with readings() as meters:
        interleaved({"it": call}, seconds=job.seconds, least=1, most=job.most)
    found.write_bytes(pickle.dumps(meters))


if __name__ == "__main__":
    _run(*map(Path, sys.argv[1:]))
