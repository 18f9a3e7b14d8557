"""A run that goes on elsewhere, or with a drafter that cannot do all of it: said before anything is decoded."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vsdbench.bench import run
from vsdbench.store.store import RunStore, load_manifest

HERE = {"cpu": {"model": "Fast", "load_average": [0.5]}, "versions": {"torch": "2.13.0"}, "gpus": []}


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """Goes on with a run that was started with a manifest, and returns what was said and the manifest since."""

    def goes_on(began, **manifest):
        monkeypatch.setattr(run, "machine", lambda: HERE)
        console = Console(file=io.StringIO(), width=400)
        with RunStore.create(tmp_path / "run", {"run_id": "run", "machine": began} | manifest) as store:
            run._note_going_on(store, console)
            run._note_going_on(store, console)
        return console.file.getvalue(), load_manifest(tmp_path / "run")

    return goes_on


def test_a_run_that_goes_on_where_it_began_says_nothing_and_keeps_when(going_on):
    said, manifest = going_on(HERE | {"cpu": {"model": "Fast", "load_average": [9.0]}})
    assert said == ""
    assert [entry["machine"] for entry in manifest["resumed"]] == [HERE] * 2


def test_a_run_that_goes_on_elsewhere_says_what_differs(going_on):
    said, manifest = going_on({"cpu": {"model": "Slow"}, "versions": {"torch": "2.12.0"}, "gpus": [{"name": "H100"}]})
    assert "(processor Slow and Fast; GPUs H100 and none; torch 2.12.0 and 2.13.0)" in said
    assert "start a new run" in said
    assert len(manifest["resumed"]) == 2


def test_a_finished_run_stays_as_it_is(going_on):
    assert going_on({"cpu": {"model": "Slow"}}, status="complete") == (
        "", {"run_id": "run", "machine": {"cpu": {"model": "Slow"}}, "status": "complete"}
    )  # fmt: skip
