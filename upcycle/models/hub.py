"""Models of a hub, by their id: ``org/name``, ``name@revision``, ``org/name:file.gguf``.

huggingface_hub downloads them into its own cache. Configuration and tokenizer come first, weights
when they are needed; code and pickles only where the user allowed them.
"""

import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tqdm import tqdm

from upcycle.errors import UsageError, has_a_sentence, one_line
from upcycle.models.companions import KNOWN, TEMPLATES
from upcycle.util.background import started
from upcycle.util.offline import VARIABLE, is_offline
from upcycle.util.progress import Progress, silent
from upcycle.util.quiet import quiet_logs

log = logging.getLogger(__name__)

SECONDS = 3  # in which a hub has to answer; HF_HUB_ETAG_TIMEOUT says otherwise
MEGABYTE = 10**6
_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+\.gguf))?")
_FILES = (".gguf", ".safetensors", ".json", ".onnx", ".bin", ".pt", ".pth", ".yaml")
CONFIGURATION = (
    *(*KNOWN, "config.json", "adapter_config.json", "README.md"),
    *(f"{TEMPLATES}/*", "[0-9]*_*/*.json"),
)
WEIGHTS = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "[0-9]*_*/model.safetensors"),
)
PICKLES = (
    *("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
    "adapter_model.bin",
)


class NotFoundError(UsageError):
    """Neither a hub nor its cache has the repository."""


@dataclass(frozen=True)
class HubId:
    """What a person writes: a repository, and perhaps a revision and one file of it."""

    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository, of which the files that were asked for lie in `directory`.

    Attributes:
        files: the names of all that it has; without a network, of those that are in the cache.
        sizes: of the files in bytes; None without a network.
    """

    repo: str
    directory: Path
    files: tuple[str, ...]
    sizes: dict[str, int] | None

    @property
    def commit(self) -> str:
        """Its hash."""
        return self.directory.name

    def fetch(self, patterns: Sequence[str], progress: Progress = silent) -> Path:
        """Bring the files of these patterns into `directory`, and return that.

        Raises:
            UsageError: they cannot be had.
        """
        sizes = self.sizes or {}
        wanted = [name for name in sizes if any(fnmatch(name, one) for one in patterns)]
        missing = [name for name in wanted if not (self.directory / name).exists()]
        size = sum(sizes[name] for name in missing)
        if missing and progress is silent:
            log.info("downloading %s, %.1f MB", self.repo, size / MEGABYTE)
        told = _Told(progress, f"downloading {self.repo}, MB", size) if missing else None
        with _sentences(
            self.repo,
            self.commit,
            "the hub cache lacks its weights: run again with a network",
        ):
            _download(self.repo, self.commit, patterns, offline=self.sizes is None, told=told)
        if told is not None:
            told.end()
        return self.directory


def parsed(name: str) -> HubId | None:
    """What `name` says, if it can be a model of a hub at all."""
    found = _ID.fullmatch(name)
    if found is None or (found["file"] is None and name.lower().endswith(_FILES)):
        return None
    try:
        validate_repo_id(found["repo"])
    except HFValidationError:
        return None
    return HubId(**found.groupdict())


def snapshot(named: HubId, *, trust_remote_code: bool = False) -> Snapshot:
    """The commit that `named` means now, with its configuration and tokenizer.

    Where the hub cannot be reached, or may not be (``HF_HUB_OFFLINE``, ``UPCYCLE_OFFLINE``), the
    cache answers.

    Raises:
        UsageError: there is no such repository or revision, or none that can be reached.
    """
    patterns = (*CONFIGURATION, "*.py") if trust_remote_code else CONFIGURATION
    variable = VARIABLE if is_offline() else "HF_HUB_OFFLINE"
    sizes, why = None, f"{variable} is set: unset it, or name a directory"
    if not constants.is_offline_mode() and not is_offline():
        with _sentences(named.repo, named.revision):
            sizes = _sizes(named)
        why = f"{constants.ENDPOINT} does not answer: check the network, or name a directory"
    with _sentences(named.repo, named.revision, f"the hub cache does not have it, and {why}"):
        directory = _download(named.repo, named.revision, patterns, offline=sizes is None)
    here = (path for path in directory.rglob("*") if path.is_file())
    files = sizes or sorted(path.relative_to(directory).as_posix() for path in here)
    return Snapshot(named.repo, directory, tuple(files), sizes)


def _sizes(named: HubId) -> dict[str, int] | None:
    """The files of a repository and their bytes; None if the hub does not answer in time."""
    chosen = "HF_HUB_ETAG_TIMEOUT" in os.environ
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT if chosen else SECONDS)
    with quiet_logs("huggingface_hub"):
        ask = partial(HfApi().model_info, named.repo, revision=named.revision, timeout=seconds)
        try:  # a thread: the time that looking up a name takes has no limit of its own
            info = started(partial(ask, files_metadata=True))(seconds)
        except HfHubHTTPError:
            raise
        except Exception as error:  # of the network, in the classes of another package
            log.debug("%s: %s", constants.ENDPOINT, one_line(error))
            return None
    return {one.rfilename: one.size or 0 for one in info.siblings or ()}


def _download(
    repo: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    offline: bool,
    told: "_Told | None" = None,
) -> Path:
    with quiet_logs("huggingface_hub"):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=offline,
                tqdm_class=_bar(told),
            )
        )


@contextmanager
def _sentences(repo: str, revision: str | None, absent: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into what to do; `absent` is said of an empty cache."""
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except GatedRepoError as error:
        raise UsageError(
            f"{repo}: a gated model: accept its terms on {page}, log in with `hf auth login`, and "
            "run again"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{repo}: there is no such directory, and no such model on {constants.ENDPOINT}; if it "
            "is private, log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(
            f"{repo}: it has no revision {revision}; {page} lists its branches, tags and commits"
        ) from error
    except LocalEntryNotFoundError as error:
        raise NotFoundError(f"{repo}: there is no such directory, and {absent}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UsageError(
            f"{page}: the hub answers with status {status}; try again later"
        ) from error
    except Exception as error:
        if has_a_sentence(error):
            raise
        raise UsageError(
            f"{page}: the download ended early ({one_line(error)}); run again, and it goes on"
        ) from error


class _Told:
    """Hands the bytes that were downloaded on, in megabytes; `end` when all are there."""

    def __init__(self, progress: Progress, stage: str, size: int) -> None:
        self._progress, self._stage, self._size = progress, stage, max(1, size // MEGABYTE)
        self._shown = 0
        progress(stage, 0, self._size)

    def __call__(self, nbytes: float) -> None:
        done = min(int(nbytes) // MEGABYTE, self._size - 1)
        if done > self._shown:
            self._shown = done
            self._progress(self._stage, done, self._size)

    def end(self) -> None:
        self._progress(self._stage, self._size, self._size)


def _bar(told: _Told | None) -> type[Any]:
    """A bar in the form that huggingface_hub asks for, which prints nothing."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **options: Any) -> None:
            if told is not None and self.unit == "B":
                told(self.n)

    return Bar
