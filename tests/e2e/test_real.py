"""The embedded target on two prompts of the smoke suite: the real thing, where its files are in the cache already."""

from __future__ import annotations

import json

import platformdirs
import pytest
from typer.testing import CliRunner

from vsdbench.cli import app
from vsdbench.models import source, wheels
from vsdbench.store.store import load_records
from vsdbench.suites.loaders import load_config

pytestmark = pytest.mark.real


@pytest.fixture
def _user_cache(monkeypatch):
    """The user's own cache, if it has the target and the prompts; nothing is fetched."""
    monkeypatch.setenv("VSDBENCH_CACHE", platformdirs.user_cache_dir("vsdbench"))
    wheel_file = source.WHEEL_MODELS[source.DEFAULT_MODEL]
    folder = wheels.cache_dir() / "models" / f"{source.DEFAULT_MODEL}-{wheel_file.sha256[:8]}"
    if not (folder / "config.json").is_file():
        pytest.skip(f"{source.DEFAULT_MODEL} is not in the cache; `vsdbench run smoke` fetches it")
    for entry in load_config("smoke")[0].sources:
        package, _, version = entry.package.partition("==")
        prompts = wheels.WheelFile(
            package=package, version=version, file=entry.file, sha256=entry.sha256, licence=entry.licence
        )
        if not wheels.is_cached(prompts):
            pytest.skip(f"the prompts of {entry.package} are not in the cache; `vsdbench run smoke` fetches them")

    def refuse(requirement, destination, *, on_bytes):
        raise AssertionError(f"{requirement} would have been downloaded")

    monkeypatch.setattr(wheels, "pip_download", refuse)


@pytest.mark.usefixtures("_user_cache")
def test_the_smoke_suite_on_the_embedded_target(tmp_path):
    changes = ["--limit", "2", "generation.max_new_tokens=16"]
    result = CliRunner().invoke(app, ["run", "smoke", *changes, "--json", "--quiet", "--results", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    overall = next(row for row in summary["results"] if row["category"] is None)
    assert overall["tau"] >= 1
    assert overall["lossless"]["checked"] == 4
    records = load_records(tmp_path / summary["run_id"])
    assert len(records) == 2 * 2 * 3
    verdicts = {record.lossless for record in records if record.method != "autoregressive"}
    assert verdicts <= {"equal", "near_tie"}
