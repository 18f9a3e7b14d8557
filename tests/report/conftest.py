"""A run folder made of records, for tests of reports."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def store_run(tmp_path):
    """Write records as a run folder and return it; ``manifest`` adds keys."""

    def write(records, name, **manifest):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        records = [record.model_copy(update={"run_id": name}) for record in records]
        (folder / "records.jsonl").write_text("".join(record.to_line() for record in records), encoding="utf-8")
        kinds = {record.method: record.kind for record in records}
        methods = [{"name": method, "kind": kind, "training": {}} for method, kind in kinds.items()]
        content = {"run_id": name, "status": "complete", "device": "cpu", "methods": methods} | manifest
        (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write
