"""Run Python where upcycle cannot be imported, as a user of a converted model does."""

import json
import os
import subprocess
import sys
from typing import Any

BEFORE = """
import json, sys, warnings
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "upcycle":
            raise ImportError("upcycle is not installed here")

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")
import torch, transformers
from safetensors.torch import load_file
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
try:
    import upcycle
    raise SystemExit("upcycle can be imported")
except ImportError:
    pass

def floats(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return (out.logits if "logits" in out else out[0]).double()

def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()

"""


def python(code: str, *arguments: object) -> Any:
    """The last line that `code` prints, as JSON; `-P` keeps this directory off the path."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"},
        cwd="/",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def without_upcycle(code: str, *arguments: object) -> Any:
    """As `python`, with `floats` and `relative` at hand, and ``import upcycle`` failing."""
    return python(BEFORE + code, *arguments)
