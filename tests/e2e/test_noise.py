"""A run on a machine that is too noisy says so, keeps its records, and under ``--strict`` ends with 1."""

from __future__ import annotations

import json

import pytest
from tests.e2e.workspace import lines_of, slow_second_repeats
from typer.testing import CliRunner

from vsdbench.cli import app
from vsdbench.store.store import RunStore


@pytest.fixture
def slowing(monkeypatch):
    """A machine on which every second repeat takes about three times as long."""
    slow_second_repeats(monkeypatch)


@pytest.fixture
def steady(monkeypatch):
    """A machine on which a decode takes 10 ms a token, to the nanosecond."""
    append = RunStore.append

    def exact(self, record, token_ids=None):
        append(self, record.model_copy(update={"decode_s": 0.01 * (record.num_output_tokens - 1)}), token_ids)

    monkeypatch.setattr(RunStore, "append", exact)


def test_a_noisy_machine_is_told_of_and_strict_ends_with_1(workspace, slowing):
    result = workspace.run("--strict", "modes.1.temperature=0.5")
    assert result.code == 1
    assert result.out.strip()
    assert len(lines_of(workspace.only_run)) == 6 * 2 * 2 * 4
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: A/A control: ")]
    assert len(warnings) == 4  # two baselines, two modes
    assert "too noisy" in warnings[0]
    assert result.err.splitlines()[-1].startswith("error: A/A control: ")


def test_without_strict_it_is_a_warning_and_quiet_leaves_it_to_the_json(workspace, slowing):
    result = workspace.run("--quiet", "--json")
    assert (result.code, result.err) == (0, "")
    assert [control["holds"] for control in json.loads(result.out)["controls"]] == [False] * 4


def test_a_steady_machine_passes_strict(workspace, steady):
    """Its controls do not vary at all, which is no fault."""
    result = workspace.run("--strict", "--json")
    assert result.code == 0
    assert "A/A control" not in result.err
    controls = json.loads(result.out)["controls"]
    assert [(control["holds"], control["value"]) for control in controls] == [(True, pytest.approx(1.0))] * 4


def test_one_prompt_or_one_repeat_claim_nothing(workspace, slowing):
    assert workspace.run("--strict", "--limit", "1").code == 0
    assert workspace.run("--strict", "repeats=1").code == 0


def test_the_smallest_detectable_difference_stands_under_the_table(finished):
    result = finished[1]
    [line] = [line for line in result.out.splitlines() if line.startswith("Smallest difference between drafters")]
    assert "5 prompts" in line
    assert line.count("%") == 1 + 2 * 2  # the power, then speed and tau of two modes
    run = finished[0].only_run
    shown = CliRunner().invoke(app, ["show", run.name, "--results", str(run.parent)], catch_exceptions=False)
    assert line in shown.stdout.splitlines()
