"""Fixtures of the end-to-end tests: a workspace with a tiny target, and one run that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.e2e.workspace import Result, Workspace, save_model

from vsdbench.report import figures


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory):
    """A cache of its own, no hub, wide output and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VSDBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "200")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def workspace(tmp_path, tiny_model, monkeypatch) -> Workspace:
    """A workspace whose runs draw no figures: those of ``finished`` are looked at, and drawing takes half of a run."""
    monkeypatch.setattr(figures, "write_figures", lambda _summary, _folder: [])
    return Workspace(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_model) -> tuple[Workspace, Result]:
    """A run that nothing disturbed, and what the command said."""
    workspace = Workspace(tmp_path_factory.mktemp("finished"), tiny_model)
    return workspace, workspace.run("--categories")
