"""Runs that are killed, interrupted, torn or disturbed: nothing is lost, doubled or mixed."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
from tests.e2e.workspace import Workspace, lines_of, outcomes_of, save_model

from vsdbench.bench import run as run_module
from vsdbench.store.files import AppendLog

PATIENCE_S = 180


def wait_for_records(workspace: Workspace, process, count: int):
    """Return the run's folder as soon as ``count`` records are in it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for manifest in workspace.runs:
            records = manifest.parent / "records.jsonl"
            if records.is_file() and records.read_bytes().count(b"\n") >= count:
                return manifest.parent
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("no records appeared")


def complete_lines(run) -> list[bytes]:
    return (run / "records.jsonl").read_bytes().split(b"\n")[:-1]


@pytest.fixture
def killed(workspace):
    """A workspace with a run that was killed with signal 9 after twenty records or a little more.

    Before, while it was stopped, a second process tried to write the same run, and was refused.
    """
    process = workspace.start()
    try:
        wait_for_records(workspace, process, 1)
        process.send_signal(signal.SIGSTOP)
        refused = workspace.run("--resume")
    finally:
        process.send_signal(signal.SIGCONT)
    assert refused.code == 2
    assert f"is being written by another process (pid {process.pid})" in refused.said
    run = wait_for_records(workspace, process, 20)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return workspace, run


def test_a_killed_run_is_resumed_to_what_an_undisturbed_one_is(killed, finished):
    workspace, run = killed
    before = complete_lines(run)
    undisturbed = outcomes_of(finished[0].only_run)
    assert 20 <= len(before) < len(undisturbed)
    assert json.loads((run / "manifest.json").read_text())["status"] == "running"
    with (run / "records.jsonl").open("ab") as file:
        file.write(b'{"schema":1,"run_id":"ti')
    result = workspace.run("--resume")
    assert result.code == 0
    assert f"resuming {run.name}" in result.said
    assert "dropped a torn last line" in result.said
    assert workspace.only_run == run
    after = complete_lines(run)
    assert after[: len(before)] == before
    assert len(after) == len(undisturbed)
    assert outcomes_of(run) == undisturbed
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"
    assert (run / "summary.parquet").is_file()

    again = workspace.run("--run", run.name)  # nothing is left to do
    assert again.code == 0
    assert complete_lines(run) == after


def test_an_interrupted_run_says_so_and_is_resumed(workspace, finished):
    process = workspace.start()
    run = wait_for_records(workspace, process, 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""
    said = " ".join(err.split())
    kept = len(complete_lines(run))
    assert f"Interrupted: {kept} of {len(outcomes_of(finished[0].only_run))} decodes are kept in {run}" in said
    assert "--resume" in said
    assert workspace.run("--run", "latest").code == 0
    assert outcomes_of(run) == outcomes_of(finished[0].only_run)


def test_an_interrupt_right_after_a_record_was_written_counts_it(workspace, monkeypatch):
    append = AppendLog.append

    def interrupted(log, line):
        append(log, line)
        if log.path.name == "records.jsonl" and log.path.read_bytes().count(b"\n") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AppendLog, "append", interrupted)
    result = workspace.run()
    assert result.code == 130
    assert "Interrupted: 3 of " in result.said
    assert len(complete_lines(workspace.only_run)) == 3


def test_without_resume_a_new_run_is_made_and_the_old_one_is_mentioned(workspace, interrupted_after):
    first = interrupted_after(3, "repeats=1")
    result = workspace.run("--limit", "1", "repeats=1")
    assert result.code == 0
    assert "--resume would have continued it" not in result.said  # another selection of prompts
    result = workspace.run("repeats=1")
    assert result.code == 0
    assert f"{first.name} was left unfinished; --resume would have continued it" in result.said
    assert len(workspace.runs) == 3
    assert len(complete_lines(first)) == 3


@pytest.fixture
def interrupted_after(workspace, monkeypatch):
    """A way of making a run that Ctrl-C ends after some records, in this process."""

    def interrupt(count: int, *words):
        def stop(console):
            display = original(console)

            class Stopping:
                def __enter__(self):
                    shown, on_batch = display.__enter__()

                    def on_progress(done):
                        shown(done)
                        if done.done == count:
                            raise KeyboardInterrupt

                    return on_progress, on_batch

                def __exit__(self, *error):
                    return display.__exit__(*error)

            return Stopping()

        original = run_module._display
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "_display", stop)
            assert workspace.run(*words).code == 130
        return workspace.runs[-1].parent

    return interrupt


@pytest.mark.parametrize("count", [1, 18])
def test_wherever_a_run_stops_it_resumes_to_the_same(workspace, interrupted_after, finished, count):
    run = interrupted_after(count)
    before = complete_lines(run)
    assert len(before) == count
    assert workspace.run("--resume").code == 0
    assert complete_lines(run)[:count] == before
    assert outcomes_of(run) == outcomes_of(finished[0].only_run)


def test_run_refuses_the_id_of_another_suite(workspace, interrupted_after):
    run = interrupted_after(3)
    before = complete_lines(run)
    result = workspace.run("--run", run.name, "repeats=3")
    assert result.code == 2
    assert "another suite" in result.said
    result = workspace.run("--run", run.name, suite=workspace.write_suite("other"))
    assert result.code == 2
    assert run.name in result.said
    result = workspace.run("--run", "tiny-1999")
    assert result.code == 2
    assert "No run 'tiny-1999'" in result.said
    assert complete_lines(run) == before


def test_other_drafter_weights_are_refused_on_resuming(workspace, interrupted_after, tmp_path):
    drafter = tmp_path / "drafter"
    shutil.copytree(workspace.model, drafter)
    change = f"drafters.1.options.model={drafter}"
    run = interrupted_after(3, change)
    before = complete_lines(run)
    save_model(drafter, seed=1)
    result = workspace.run("--resume", change)
    assert result.code == 2
    assert "'itself' has other weights" in result.said
    assert complete_lines(run) == before
    shutil.rmtree(drafter)
    shutil.copytree(workspace.model, drafter)
    assert workspace.run("--resume", change).code == 0
    assert {line["drafter_fingerprint"] for line in lines_of(run) if line["method"] == "itself"} != {None}


def test_other_target_weights_are_another_run(workspace, interrupted_after, tmp_path):
    target = tmp_path / "target"
    save_model(target, seed=1)
    run = interrupted_after(3)
    result = workspace.run("--resume", "--target", target, f"drafters.1.options.model={target}", "--limit", "1")
    assert result.code == 0
    assert len(workspace.runs) == 2
    result = workspace.run("--run", run.name, "--target", target)
    assert result.code == 2
    assert "another suite, target" in result.said


def test_a_run_that_cannot_be_read_is_named_and_does_not_stop_a_new_one(workspace):
    broken = workspace.results / "broken-run"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{", encoding="utf-8")
    result = workspace.run()
    assert result.code == 0, result.err
    assert "broken-run" in result.err
