"""The versions and the machine, as a bug report needs them."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from upcycle.kernels.compiled import library
from upcycle.util.installed import installed_version
from upcycle.util.wording import size
from upcycle.version import __version__

PACKAGES = (
    *("torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "gguf", "peft"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "ray"),
)
VARIABLES = (
    *("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "UPCYCLE_OFFLINE", "UPCYCLE_CACHE"),
    "OMP_NUM_THREADS",
)


def environment() -> dict[str, Any]:
    """Plain data, the most telling first; no path of this machine but those of the variables."""
    versions = {name: installed_version(name) or "none" for name in PACKAGES}
    return {
        "upcycle": __version__,
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": size(psutil.virtual_memory().total),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads of torch": torch.get_num_threads(),
        "cuda": _cuda(),
        **versions,
        "c++ kernel": _kernel(),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            named = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(named, platform.processor())
    except OSError:
        return platform.processor() or platform.machine()


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{', '.join(sorted(names))}, CUDA {torch.version.cuda}"


def _kernel() -> str:
    found = library()
    return "not compiled: the operations of torch are used" if found is None else "compiled"
