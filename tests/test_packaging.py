"""The wheel holds the two packages and the shipped files, nothing else; the tested versions are exact."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import vsdbench

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built once and without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_top_level_is_two_packages(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == {"vsdbench", "vsdbench_drafters", f"vsdbench-{vsdbench.__version__}.dist-info"}


@pytest.mark.parametrize(("inside", "source"), [("suites", "suites"), ("recipes", "drafters/recipes")])
def test_shipped_files_are_inside_unchanged(wheel, inside, source):
    prefix = f"vsdbench/data/{inside}/"
    found = {name.removeprefix(prefix): wheel.read(name) for name in wheel.namelist() if name.startswith(prefix)}
    expected = {path.name: path.read_bytes() for path in (ROOT / source).glob("*.yaml")}
    assert expected
    assert found == expected


def test_every_module_is_inside_and_no_test(wheel):
    names = set(wheel.namelist())
    for folder in ("harness", "drafters"):
        modules = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert modules <= names
    assert {"vsdbench/py.typed", "vsdbench_drafters/py.typed", "vsdbench/report/template/paper.typ"} <= names
    assert not [name for name in names if "cache" in name.split("/")[-1] and not name.endswith(".py")]
    assert not [name for name in names if "test_" in name]


def test_entry_points_and_licence_are_inside(wheel):
    [points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(points).decode()
    assert "vsdbench = vsdbench.cli:main" in text
    assert all(f"[{group}]" in text for group in PROJECT["entry-points"])
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_every_entry_point_loads():
    for group, points in PROJECT["entry-points"].items():
        installed = {point.name: point for point in entry_points(group=group)}
        assert set(points) <= set(installed)
        assert all(callable(installed[name].load()) for name in points)


def test_version_is_said_once():
    assert PROJECT["version"] == vsdbench.__version__
    assert f"## [{vsdbench.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_are_exact_and_cover_every_requirement():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert len(pinned) == len(lines)
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"], "transformers"]
    assert {re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in wanted} <= pinned
    assert not pinned & {"pip", "setuptools", "vsdbench"}
