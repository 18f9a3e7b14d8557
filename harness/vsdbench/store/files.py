"""Files that survive a kill: durable appends, atomic replacement, one process at a time.

Every write either is on disk when the call returns or leaves the file as it was; a process killed in the middle leaves
at most one line without its newline, which the next writer drops and says so.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vsdbench.errors import ConfigError, EnvironmentProblemError, is_disk_full

if TYPE_CHECKING:
    from rich.console import Console

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_CHUNK = 1 << 16


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written into one sentence with the fix.

    Raises:
        EnvironmentProblemError: In place of the ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise EnvironmentProblemError(
                f"The disk that holds {path} is full; free some space and repeat the command (of a run, with "
                "--resume): everything written so far is kept."
            ) from error
        if error.errno in _FORBIDDEN:
            raise EnvironmentProblemError(
                f"{path} may not be written ({error.strerror}); choose a folder that may."
            ) from error
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a reader, or a kill at any moment, sees the old file or the new one.

    Raises:
        EnvironmentProblemError: The disk is full or the folder may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names created or replaced in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendLog:
    """A file of lines that only grows, one durable line at a time.

    Opening it for writing drops a last line without newline (the mark of a killed writer) and describes that in
    ``note``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            self._file = path.open("ab", buffering=0)
            end = self._file.seek(0, os.SEEK_END)
            self._size = last_newline(path)
            self.note: str | None = None
            if end > self._size:
                self._file.truncate(self._size)
                os.fsync(self._file.fileno())
                self.note = (
                    f"{path.name}: dropped a torn last line of {end - self._size} bytes, "
                    "left by a process that was killed while writing it."
                )

    def append(self, line: str) -> None:
        """Append ``line`` (which ends in a newline) and wait until it is on disk; on failure the file is unchanged.

        Raises:
            EnvironmentProblemError: The disk is full.
        """
        data = line.encode()
        if not data.endswith(b"\n") or data.count(b"\n") != 1:
            raise ValueError("a log takes one line at a time, newline included")
        with storage_errors(self.path):
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += len(data)

    def close(self) -> None:
        """Close the file; more than once is fine."""
        self._file.close()


def last_newline(path: Path) -> int:
    """Return the number of bytes up to and including the last newline of ``path`` (0 if there is none)."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _CHUNK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def read_lines(path: Path) -> tuple[list[bytes], bool]:
    """Return the complete lines of ``path`` and whether a torn line follows them (nothing is changed on disk)."""
    *lines, tail = path.read_bytes().split(b"\n")
    return lines, bool(tail)


class FileLock:
    """Lets one process make or write something; the kernel lets go of it when the process ends, however it ends.

    Args:
        path: The lock's own file, made if need be; it stays there.
        doing: What is done under the lock, as in "Run x is being written".
        console: Where it says for whom this process waits, if it has to; None: it does not wait.

    Raises:
        ConfigError: Another process has it, and there is no console.
        EnvironmentProblemError: The file cannot be made, or its file system has no locks.
    """

    def __init__(self, path: Path, doing: str, *, console: Console | None = None) -> None:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                self._take(f"{doing} by another process", console)
            except OSError as error:
                raise EnvironmentProblemError(
                    f"The file system of {path.parent} has no locks ({error.strerror}); use a folder on a local disk."
                ) from error
            with storage_errors(path):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        except BaseException:
            self.release()
            raise

    def _take(self, doing: str, console: Console | None) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            if console is None:
                raise ConfigError(f"{doing} (pid {owner}); wait for it to end or stop it.") from error
            console.print(f"{doing} (pid {owner}): waiting for it.", markup=False, highlight=False, soft_wrap=True)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        """Let go of it; more than once is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
