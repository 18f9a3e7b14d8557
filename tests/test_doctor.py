"""The examination has the promised form, measures what it says, and names a fix for all that is missing."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from vsdbench import doctor
from vsdbench.cli import app


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_hub_reachable", lambda: False)
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))


def test_json_has_its_keys():
    result = CliRunner().invoke(app, ["doctor", "--json", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"schema", "machine", "speed", "cache", "checks"}
    assert report["speed"]["device"] == "cpu"
    assert report["speed"]["memory_bandwidth_gb_per_s"] > 0
    assert report["speed"]["bandwidth_bound_tokens_per_s"] is None  # the cache is empty
    assert set(report["speed"]["matmul_gflops"]) == {"float32", "bfloat16"}
    checks = {check["name"]: check for check in report["checks"]}
    assert set(checks) == {"pip", "datasets", "hub", "target", "suites", "disk", "load"}
    assert all((check["fix"] is None) == check["ok"] for check in checks.values())
    assert not checks["hub"]["ok"]
    assert not checks["target"]["ok"]
    assert "vsdbench run" in checks["target"]["fix"]


def test_bound_follows_from_bandwidth_and_weights(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "models" / f"{doctor.DEFAULT_MODEL}-0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(4000))
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(doctor, "product_flops", lambda device, dtype: 2e9)
    monkeypatch.setattr(doctor, "choose_dtype", lambda name, device: torch.bfloat16)
    step = {"rows": 1, "products_ms": 0.004, "own_ms": 0.008, "fused_ms": 0.006, "step_ms": 0.005}
    monkeypatch.setattr(doctor, "_decode_step", lambda device, dtype: step)
    report = doctor.examine("cpu")
    assert report["speed"]["bandwidth_bound_tokens_per_s"] == pytest.approx(1e9 / 2000)  # 1,000 weights of 2 bytes
    assert report["cache"]["default_model_bytes"] == 4000
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "out").open("w", encoding="utf-8"))
    doctor.print_examination(report, console)
    console.file.close()
    text = console.export_text()
    assert "500000 tokens/s" in text
    assert "(40 % of it)" in text  # 0.002 ms at the bound
    assert "kernels compiled for this processor" in text
    assert all(check["name"] in text for check in report["checks"])
