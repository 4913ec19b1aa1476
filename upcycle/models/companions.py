"""Copy what a checkpoint directory holds beside its weights: tokenizer, templates, processors."""

import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from upcycle.util.json_text import parsed
from upcycle.util.untrusted import inside, without_escape

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# What the loaders of transformers, vLLM, SGLang, llama.cpp and sentence-transformers ask for.
KNOWN = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tokenizer.model.v*", "tekken.json", "*.tiktoken", "normalizer.json"),
    *("vocab.txt", "vocab.json", "vocab.bpe", "merges.txt", "encoder.json", "bpe.codes"),
    *("spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "dict.txt"),
    *("sentencepiece.bpe.model", "source.spm", "target.spm", "prophetnet.tokenizer"),
    *("vocab-src.json", "vocab-tgt.json", "entity_vocab.json", "emoji.json", "byte_maps.json"),
    *("chat_template.json", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "modules.json", "sentence_bert_config.json"),
    *("config_sentence_transformers.json", *LICENCES),
)
TEMPLATES = "additional_chat_templates"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")  # each says that one is there
IN_FOLDERS = (*KNOWN, "config.json", "*.jinja", "model.safetensors")
MAX_BYTES = 64 * 2**20  # the largest tokenizers are about half of this


def copy_companions(
    source: Path, destination: Path, *, trust_remote_code: bool = False
) -> list[str]:
    """Copy the files of a dense model that loaders ask for beside weights and ``config.json``.

    Folders inside `source` are taken if a loader asks for them: ``additional_chat_templates``, and
    those that ``modules.json`` names (sentence-transformers). A file is never there in part.

    Args:
        source: of the dense model.
        destination: an existing directory; files of the same names are replaced.
        trust_remote_code: copy Python files, too.

    Returns:
        The names of the copied files, relative to `destination`, sorted.

    Raises:
        UsageError: a file is a link out of `source`, or ``modules.json`` names such a folder.
    """
    known = (*KNOWN, "*.py") if trust_remote_code else KNOWN
    copied = [_copy(path, source, destination, path.name) for path in _matching(source, known)]
    for folder in _folders(source):
        files = _matching(folder, IN_FOLDERS, MAX_BYTES * 64)
        copied += [_copy(p, source, destination, f"{folder.name}/{p.name}") for p in files]
    return sorted(copied)


def copy_licences(source: Path, destination: Path) -> None:
    """Copy only what says under which terms a model may be passed on."""
    for path in _matching(source, LICENCES):
        _copy(path, source, destination, path.name)


def _matching(folder: Path, known: tuple[str, ...], most: int = MAX_BYTES) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    named = (path for path in files if any(fnmatch(path.name, pattern) for pattern in known))
    return [path for path in named if path.stat().st_size <= most]


def _copy(path: Path, source: Path, destination: Path, name: str) -> str:
    target = destination / name
    target.parent.mkdir(exist_ok=True)
    beside = target.with_name(f"{target.name}.tmp")
    shutil.copyfile(without_escape(path, source), beside)
    beside.rename(target)
    return name


def _folders(source: Path) -> list[Path]:
    folders = [source / TEMPLATES]
    modules = source / "modules.json"
    listed: Any = []
    if modules.is_file():
        with suppress(ValueError):  # another file of this name is copied and otherwise left alone
            listed = parsed(modules.read_text("utf-8"))
    for module in listed if isinstance(listed, list) else []:
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and path:
            folders.append(inside(source, path, modules.name))
    inner = [folder for folder in folders if folder.is_dir() and folder.parent == source]
    return [without_escape(folder, source) for folder in inner]
