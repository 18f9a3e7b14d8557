"""A cache of its own for every test that asks, and a stand-in for the hub's data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from vsdbench.models.hub import HubUnreachableError
from vsdbench.suites import rows as row_sources


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def image_hub(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Stand in for the hub: data sets by (repository, configuration, split), and a switch."""
    state: dict[Any, Any] = {"reachable": True}

    def commit_of(repo: str, *, kind: str, revision: str | None, fix: str) -> str:
        if not state["reachable"]:
            raise HubUnreachableError(f"the hub is not reachable for '{repo}': check the network.")
        return "c" * 40

    def load_dataset(repo: str, config: str | None, *, split: str, revision: str) -> datasets.Dataset:
        return state[repo, config, split]

    monkeypatch.setattr(row_sources, "commit_of", commit_of)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state
