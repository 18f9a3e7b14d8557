"""``compile=true``: what was compiled is in the manifest, nothing while times were taken, and answers stay lossless."""

from __future__ import annotations

import json

from tests.e2e.workspace import lines_of

from vsdbench.bench import methods
from vsdbench.models import compiled


def manifest_of(workspace):
    return json.loads((workspace.only_run / "manifest.json").read_text(encoding="utf-8"))["compiled"]


def test_a_compiled_run_is_lossless_and_compiles_nothing_late(workspace, monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda device: None)
    monkeypatch.setattr(methods, "why_not", lambda device: None)
    monkeypatch.setattr(compiled.Graphs, "_inductor", staticmethod(lambda graph, inputs: graph.forward))
    result = workspace.run("--limit", "2", "repeats=1", "compile=true")
    assert result.code == 0
    assert "compiled its steps in" in result.said
    assert "ngram's steps run as they are, not compiled: it has none" in " ".join(result.said.split())
    found = manifest_of(workspace)
    assert (found["graphs"], found["graphs_while_timed"], found["not_compiled"]) == (2, 0, None)
    assert found["seconds"] > 0
    assert {line["lossless"] for line in lines_of(workspace.only_run)} == {"reference", "equal"}


def test_without_a_compiler_the_run_goes_on_and_says_why(workspace, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = workspace.run("--limit", "1", "repeats=1", "compile=true")
    assert result.code == 0
    assert "no C++ compiler" in " ".join(result.said.split())
    found = manifest_of(workspace)
    assert (found["graphs"], found["graphs_while_timed"]) == (0, 0)
    assert "no-such-compiler" in found["not_compiled"]
