"""The errors a user may meet, each with its exit code, so that the CLI turns any of them into one clear sentence.

A message names the offending value and what would be right. Whatever else escapes is a bug and shows a traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")


class VsdbenchError(Exception):
    """Base of every error that is the user's to fix; ``exit_code`` is what the process ends with."""

    exit_code = 1


class GateError(VsdbenchError):
    """A check of the results failed: a lossless rule was violated, or a regression gate was crossed."""

    exit_code = 1


class ConfigError(VsdbenchError):
    """Usage or configuration is wrong: unknown key, unknown name, value out of range, missing file."""

    exit_code = 2


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """Put ``where`` before what is said of a wrong configuration, unless it stands there.

    Raises:
        ConfigError: In place of the one without it.
    """
    try:
        yield
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error


class EnvironmentProblemError(VsdbenchError):
    """The machine cannot do it: hub unreachable, wrong sha256, disk full, out of memory, no such device."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    r"""Return the first line of what an error says, or its name where it says nothing.

    >>> first_line(ValueError("one\ntwo")), first_line(KeyError())
    ('one', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_disk_full(error: BaseException) -> bool:
    """Return whether a disk, or a user's share of it, is full: by the error's number, or by the words of a library."""
    known = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    return known or "No space left" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that this machine or a device has no memory left, in any of torch's ways to say so.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    """
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, else the list of the known ones.

    >>> did_you_mean("mtbanch", ["mtbench", "gsm8k"])
    " Did you mean 'mtbench'?"
    >>> did_you_mean("zzz", ["b", "a"])
    ' Known: a, b.'
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
