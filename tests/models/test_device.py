"""Device and dtype: what was asked for, or a sentence that says why not."""

from __future__ import annotations

import pytest
import torch

from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models import device as devices
from vsdbench.models.device import bf16_speedup, choose_device, choose_dtype, product_flops, synchronize

CPU = torch.device("cpu")


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(there, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device().type == expected


def test_the_cpu_is_always_there():
    assert choose_device("cpu") == CPU
    synchronize(CPU)


def test_a_name_that_is_no_device():
    with pytest.raises(ConfigError, match="'gpu7x' is not a device"):
        choose_device("gpu7x")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblemError, match="'cuda' was asked for but torch sees no CUDA GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(EnvironmentProblemError, match="'cuda:2' was asked for"):
        choose_device("cuda:2")


@pytest.mark.parametrize(("name", "dtype"), devices.DTYPES.items())
def test_named_dtypes(name, dtype):
    assert choose_dtype(name, CPU) is dtype


@pytest.mark.parametrize(("speedup", "dtype"), [(0.5, torch.float32), (1.05, torch.float32), (1.8, torch.bfloat16)])
def test_auto_dtype_follows_the_measurement(speedup, dtype, monkeypatch):
    monkeypatch.setattr(devices, "bf16_speedup", lambda _: speedup)
    assert choose_dtype("auto", CPU) is dtype


def test_a_name_that_is_no_dtype():
    with pytest.raises(ConfigError, match="'int8' is not a dtype: use auto, bf16, fp16, fp32, fp64"):
        choose_dtype("int8", CPU)


def test_the_measurement_is_a_positive_ratio_measured_once():
    first = bf16_speedup(CPU)
    assert first > 0
    assert bf16_speedup(CPU) == first


def test_operations_a_second_are_measured_once():
    first = product_flops(CPU, torch.float32)
    assert 1e6 < first < 1e15
    assert product_flops(CPU, torch.float32) == first


def test_what_else_runs_on_the_machine_does_not_decide_the_dtype(monkeypatch):
    times = {torch.float32: iter([2.0] * 12), torch.bfloat16: iter([1.0, *[9.0] * 11])}
    monkeypatch.setattr(devices, "_product", lambda _, dtype: lambda: next(times[dtype]))
    assert bf16_speedup.__wrapped__(CPU) == 2.0


@pytest.mark.parametrize("name", ["meta", "mps", "xpu:0"])
def test_a_device_that_torch_knows_but_nothing_here_can_time(name):
    with pytest.raises(ConfigError, match=f"'{name}' is not supported: use auto, cpu, cuda or cuda:N"):
        choose_device(name)
