"""Data folders: the environment's, then the nearest checkout, then the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vsdbench import paths
from vsdbench.errors import ConfigError


@pytest.fixture(autouse=True)
def _bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VSDBENCH_DATA", "VSDBENCH_CACHE", "VSDBENCH_RESULTS", "VSDBENCH_REPORTS"):
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "site" / "deep" / "vsdbench"
    _suite(package / "data", "packaged")
    _suite(package / "data", "both")
    monkeypatch.setattr(paths, "_PACKAGE", package)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


def _suite(root: Path, name: str, folder: str = "suites") -> Path:
    path = root / folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("name: x\n")
    return path


def test_outside_any_checkout_the_package_answers(tmp_path: Path) -> None:
    assert set(paths.list_data("suites")) == {"packaged", "both"}
    packaged = tmp_path / "site" / "deep" / "vsdbench" / "data" / "suites" / "packaged.yaml"
    assert paths.locate("suites", "packaged") == (packaged, None)


def test_the_nearest_checkout_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = _suite(tmp_path / "work", "both")
    recipe = _suite(tmp_path / "work", "r", "drafters/recipes")
    inside = tmp_path / "work" / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert paths.find_data("suites", "both") == mine
    assert paths.find_data("recipes", "r") == recipe
    assert paths.find_data("suites", "packaged").is_relative_to(tmp_path / "site")
    assert paths.results_dir() == tmp_path / "work" / "results"


def test_the_environment_comes_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _suite(tmp_path / "work", "both")
    in_environment = _suite(tmp_path / "env", "both")
    for folder in (tmp_path / "env", tmp_path / "env" / "suites"):
        monkeypatch.setenv("VSDBENCH_DATA", str(folder))
        assert paths.find_data("suites", "both") == in_environment


def test_a_path_is_taken_as_it_is_and_a_missing_one_falls_back_with_a_note(tmp_path: Path) -> None:
    path = _suite(tmp_path / "elsewhere", "both")
    assert paths.locate("suites", str(path)) == (path, None)
    found, note = paths.locate("suites", "suites/packaged.yaml")
    assert found == paths.find_data("suites", "packaged")
    assert note is not None
    assert "no file 'suites/packaged.yaml'" in note


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("packagd", "unknown suite 'packagd'. Did you mean 'packaged'?"),
        ("suites/packagd.yaml", "there is no file 'suites/packagd.yaml'. Did you mean 'packaged'?"),
        ("zzz", "unknown suite 'zzz'. Known: both, packaged."),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        paths.find_data("suites", name)
    assert str(caught.value) == expected


def test_a_data_folder_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSDBENCH_DATA", "nowhere")
    with pytest.raises(ConfigError, match="VSDBENCH_DATA names 'nowhere'"):
        paths.list_data("suites")


def test_output_folders_follow_flag_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.results_dir() == tmp_path / "work" / "results"
    monkeypatch.setenv("VSDBENCH_RESULTS", str(tmp_path / "r"))
    monkeypatch.setenv("VSDBENCH_REPORTS", str(tmp_path / "p"))
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "c"))
    assert (paths.results_dir(), paths.reports_dir(), paths.cache_dir()) == (
        tmp_path / "r",
        tmp_path / "p",
        tmp_path / "c",
    )
    assert paths.results_dir("x") == Path("x")


def test_sizes_are_of_all_files_below_whatever_goes_meanwhile(tmp_path):
    folder = tmp_path / "looked-at"
    (folder / "gone").mkdir(parents=True)
    (folder / "stays" / "deep").mkdir(parents=True)
    for name, size in (("a.bin", 3), ("gone/b.bin", 5), ("stays/deep/c.txt", 7)):
        (folder / name).write_bytes(b"x" * size)
    assert sorted(paths.sizes_below(folder)) == [3, 5, 7]
    assert list(paths.sizes_below(folder, ".txt")) == [7]
    assert list(paths.sizes_below(folder / "never")) == []
    sizes = paths.sizes_below(folder)
    assert next(sizes) == 3
    shutil.rmtree(folder / "gone")
    assert list(sizes) == [7]
