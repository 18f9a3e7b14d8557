"""One command runs every file of ``benchmarks/``, shows all ratios in one table, and keeps them with the machine."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import batch

from vsdbench.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "benchmarks"
NO_RATIO = {"aa_control", "coverage", "lossless_sweep"}
PRINTED = {
    "products": [{"dtype": "float32", "rows": 1, "onednn_ratio": None, "native_ratio": 1.5}],
    "draft_step": {
        "lines": [{"rows": 8, "ms": {"operations": 6.0, "native": 2.0}}],
        "budget": 7,
        "tree": {"operations": 9.0, "native": 6.0},
    },
    "autoregressive": {
        "methods": {"autoregressive": {}, "hf-generate": {"our_speed_over_it": 1.31}},
    },
    "visual_tokens": {"lines": [{"visual_tokens": 81, "ratios": {"msd": {"prefill": [0.44, 0.4, 0.5]}}}]},
    "speculative": {
        "methods": {
            "autoregressive": {"tau": 1.0, "overhead_share": 0.01, "draft_share": 0.0, "speed_over_plain": 1.0},
            "ngram": {"tau": 1.4, "overhead_share": 0.02, "draft_share": 0.03, "speed_over_plain": 1.25},
            "hf-prompt-lookup": {"tau": 1.3, "overhead_share": 0.2, "draft_share": 0.2, "speed_over_plain": 0.9},
        }
    },
}


@pytest.fixture(scope="module")
def benchmarks():
    spec = importlib.util.spec_from_file_location("all_benchmarks", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def started(benchmarks, monkeypatch):
    """The commands that were started; each prints what is in ``PRINTED``, and those that are not there fail."""
    commands = []

    def run(command, **_):
        name = Path(command[1]).stem
        commands.append((name, command[2:]))
        if name not in PRINTED:
            return subprocess.CompletedProcess(command, 3, "", f"noise\n{name} has no compiler\n")
        return subprocess.CompletedProcess(command, 0, json.dumps(PRINTED[name]), "")

    monkeypatch.setattr(benchmarks.subprocess, "run", run)
    monkeypatch.setattr(benchmarks, "machine", lambda: {"cpu": "toy"})
    return commands


def run(benchmarks, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return benchmarks.main()


def test_every_file_takes_part_and_takes_what_it_is_given(benchmarks, monkeypatch):
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__main__"}
    assert files == set(benchmarks.BENCHMARKS) | NO_RATIO
    for name, benchmark in benchmarks.BENCHMARKS.items():
        parse = importlib.import_module(f"benchmarks.{name}").parse
        for arguments in ((), benchmark.arguments, benchmark.quick):
            monkeypatch.setattr(sys, "argv", [name, "--json", *arguments])
            assert parse().json
    for name in NO_RATIO:
        monkeypatch.setattr(sys, "argv", [name])
        assert importlib.import_module(f"benchmarks.{name}").parse()


def test_a_batch_that_is_never_full_is_refused():
    with pytest.raises(ConfigError, match=r"--sizes has 8, but there are 2 prompts"):
        batch.measure(None, {}, [[1], [2]], sizes=[1, 8], repeats=1, tokens=4)


def test_ratios_are_shown_and_kept_with_the_machine(benchmarks, started, monkeypatch, tmp_path, capsys):
    file = tmp_path / "new" / "speed.json"
    names = ["products", "draft_step", "autoregressive", "visual_tokens", "speculative"]
    assert run(benchmarks, monkeypatch, "--quick", "--only", *names, "--json", str(file)) == 0
    assert [name for name, _ in started] == names
    assert all(arguments[0] == "--json" for _, arguments in started)
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["machine"] == kept["machine_after"] == {"cpu": "toy"}
    assert kept["quick"] is True
    assert {name: entry["result"] for name, entry in kept["benchmarks"].items()} == PRINTED
    shown = capsys.readouterr().out
    for text in ("1.50 x", "3.00 x", "1.31 x", "1.25 x", "0.44 x", "0.90 x", "2.00 %", "3.00 %"):
        assert text in shown
    assert "20.00 %" not in shown, "the shares of other engines are measured in another way"


def test_one_that_fails_is_said_and_the_others_are_kept(benchmarks, started, monkeypatch, tmp_path, capsys):
    file = tmp_path / "speed.json"
    assert run(benchmarks, monkeypatch, "--only", "long_context", "products", "--json", str(file)) == 1
    kept = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    assert kept["long_context"]["error"] == "long_context has no compiler"
    assert kept["products"]["result"] == PRINTED["products"]
    assert "failed: long_context has no compiler" in capsys.readouterr().out


def test_by_default_all_ratios_are_measured(benchmarks, started, monkeypatch, tmp_path):
    run(benchmarks, monkeypatch, "--dtype", "fp32", "--json", str(tmp_path / "speed.json"))
    assert [name for name, _ in started] == [name for name in benchmarks.BENCHMARKS if name != "report_time"]
    takers = {name for name, arguments in started if "--dtype" in arguments}
    assert takers == {name for name, _ in started} - {"products"}
