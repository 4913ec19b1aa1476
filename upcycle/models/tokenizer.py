"""The tokenizer of a model directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from upcycle.errors import UsageError, one_line
from upcycle.util.quiet import quiet_transformers
from upcycle.util.untrusted import untrusted_code


def tokenizer_in(directory: Path | None, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies in `directory`, or None.

    Raises:
        UsageError: it is damaged, or needs code of the directory that is not trusted.
    """
    names: Sequence[str] = ("tokenizer.json", "vocab.txt", "tokenizer.model", "vocab.json")
    if directory is None or not any((directory / name).is_file() for name in names):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        problem = UsageError(f"{directory}: its tokenizer cannot be loaded: {one_line(error)}")
        raise untrusted_code(directory, "its tokenizer", error) or problem from error
