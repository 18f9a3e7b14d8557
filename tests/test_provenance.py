"""What a run was measured on is found where it can be and None where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vsdbench import provenance

GPU_LINE = "NVIDIA H100 80GB HBM3, 550.54, 81559, 512, 1755, 1980, 2619, 123.45, 700.00, 41, 7, 0x0000000000000024"


def _git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    _git(tmp_path, "init")
    (tmp_path / "a.py").write_text("a = 1\n")
    _git(tmp_path, "add", "a.py")
    _git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_machine_is_json_and_names_the_versions() -> None:
    found = json.loads(json.dumps(provenance.machine()))
    assert found["cpu"]["num_logical_cores"] >= 1
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"]


def test_a_clean_checkout_has_a_commit_and_no_hash(checkout: Path) -> None:
    state = provenance.git_state(checkout)
    assert state is not None
    assert len(str(state["commit"])) == 40
    assert (state["dirty"], state["dirty_hash"]) == (False, None)


def test_the_dirty_hash_follows_changed_and_untracked_content(checkout: Path) -> None:
    seen: set[object] = set()
    for name, text in [("a.py", "a = 2\n"), ("a.py", "a = 3\n"), ("new.py", "b = 1\n"), ("new.py", "b = 2\n")]:
        (checkout / name).write_text(text)
        state = provenance.git_state(checkout)
        assert state is not None
        assert state["dirty"] is True
        seen.add(state["dirty_hash"])
    assert len(seen) == 4
    assert provenance.git_state(checkout) == state


def test_a_package_installed_inside_somebody_elses_repository_has_no_commit(checkout: Path) -> None:
    (checkout / ".gitignore").write_text("venv/\n")
    installed = checkout / "venv" / "vsdbench"
    installed.mkdir(parents=True)
    (installed / "x.py").write_text("")
    assert provenance.git_state(installed) is None


def test_no_checkout_and_no_git_give_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path) is None


def test_a_gpu_line_becomes_numbers_and_words() -> None:
    (gpu,) = provenance.parse_gpus(GPU_LINE)
    assert gpu["name"] == "NVIDIA H100 80GB HBM3"
    assert gpu["driver"] == "550.54"
    assert gpu["clock_sm_mhz"] == 1755.0
    assert gpu["power_draw_w"] == 123.45
    assert gpu["throttle_reasons"] == ["software power cap", "software thermal slowdown"]


def test_what_a_driver_does_not_say_is_none() -> None:
    (gpu,) = provenance.parse_gpus(GPU_LINE.replace("123.45", "[N/A]").replace("0x0000000000000024", "[N/A]"))
    assert gpu["power_draw_w"] is None
    assert gpu["throttle_reasons"] is None
    assert provenance.parse_gpus("No devices were found") == []


def test_newer_drivers_are_asked_by_the_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\ncase "$1" in *event_reasons*) echo "{GPU_LINE}";; *) exit 2;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [gpu["driver"] for gpu in provenance.gpus()] == ["550.54"]
    tool.unlink()
    assert provenance.gpus() == []
