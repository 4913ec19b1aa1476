"""Write a file from start to end, a large one past the page cache of the system.

For gigabytes that are not read again soon, finding memory for the cache takes longer than writing
to a fast disk.
"""

import errno
import hashlib
import mmap
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

BUFFER = 2**22
PIECE = 2**18  # bytes of one write to the cache: for more, Linux slowly looks for large pages
SAMPLE = 2**28  # bytes after which the speed of the disk is known
FAST = 10**9  # bytes in a second; a slower disk is written through the cache
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class OutputFile:
    """A new file, as a context manager; it replaces an old one.

    It goes past the cache as long as the file system can do that and the disk is fast. Either way
    a machine that stops right after may lose some bytes.

    Attributes:
        sha256: of the bytes, once the file is closed; it is computed beside the writing, if wanted.
    """

    def __init__(self, path: Path, *, past_cache: bool, hashed: bool = False) -> None:
        self.sha256: str | None = None
        self._hash = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1) if hashed else None
        self._hashed: Future[None] | None = None
        self._path = path
        if path.is_symlink():  # not what it leads to
            path.unlink()
        self._buffer = mmap.mmap(-1, BUFFER)  # begins at a page, as a disk wants it
        self._filled = self._written = 0
        self._seconds = 0.0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = False
        if past_cache and DIRECT:
            self._reopen(direct=True)

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._reopen(direct=False)  # the end need not be a whole page
                self._flush()
                if self._hashed is not None:
                    self._hashed.result()
                    self.sha256 = self._hash.hexdigest()
        finally:
            if self._hashing is not None:
                self._hashing.shutdown()
            os.close(self._file)
            self._buffer.close()

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes."""
        start = 0
        while start < len(data):
            stop = min(start + BUFFER - self._filled, len(data))
            end = self._filled + stop - start
            self._buffer[self._filled : end] = data[start:stop]
            start, self._filled = stop, end
            if self._filled == BUFFER:
                self._flush()

    def _flush(self) -> None:
        begun, done = time.monotonic(), 0
        if self._hashing is not None:
            if self._hashed is not None:
                self._hashed.result()
            self._hashed = self._hashing.submit(self._hash.update, self._buffer[: self._filled])
        while done < self._filled:
            stop = min(done + (BUFFER if self._direct else PIECE), self._filled)
            try:
                with memoryview(self._buffer)[done:stop] as piece:
                    count = os.write(self._file, piece)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._reopen(direct=False)  # some file systems refuse only now
            else:
                done += count
                self._written += count
        self._filled = 0
        self._seconds += time.monotonic() - begun
        if self._written >= SAMPLE and self._written < FAST * self._seconds:
            self._reopen(direct=False)

    def _reopen(self, *, direct: bool) -> None:
        """Go on at the same place, past the cache or not."""
        if direct == self._direct:
            return
        try:
            file = os.open(self._path, os.O_WRONLY | (DIRECT if direct else 0))
        except OSError as error:
            if error.errno == errno.EINVAL and direct:
                return  # the file system has no other way than the cache
            raise
        os.close(self._file)
        self._file, self._direct = file, direct
        os.lseek(file, self._written, os.SEEK_SET)
