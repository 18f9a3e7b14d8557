"""Which device and dtype to run on: asked for by the user, or chosen by a measurement, and always printed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from vsdbench.errors import ConfigError, EnvironmentProblemError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        EnvironmentProblemError: The device is not there.
        ConfigError: The name is not a device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'{name}' is not a device: use auto, cpu, cuda or cuda:N.") from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"Device '{name}' is not supported: use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblemError(f"Device '{name}' was asked for but torch sees no CUDA GPU: use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EnvironmentProblemError(f"Device '{name}' was asked for but torch sees {count}: use cuda:{count - 1}.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called ``name``; ``auto`` is bf16 where small matrix products are faster in it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if bf16_speedup(device) > 1.1 else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"'{name}' is not a dtype: use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


@functools.cache
def bf16_speedup(device: torch.device, repeats: int = 12) -> float:
    """Return how much faster than fp32 a product of 8 rows with a 1,024 x 4,096 matrix runs in bf16, measured.

    In turns, and the best of each: other work on the machine can only make a product slower, and must not decide.
    """
    products = {dtype: _product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    turns = [{dtype: product() for dtype, product in products.items()} for _ in range(repeats)]
    return min(turn[torch.float32] for turn in turns) / min(turn[torch.bfloat16] for turn in turns)


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """Return what multiplies and returns the seconds that it took."""
    rows = torch.ones(8, 1024, device=device, dtype=dtype)
    # Several matrices, so that the weights come from memory as they do in a model and not from a warm cache.
    weights = [torch.ones(4096, 1024, device=device, dtype=dtype) for _ in range(4)]

    def seconds() -> float:
        synchronize(device)
        start = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(rows, weight)
        synchronize(device)
        return time.perf_counter() - start

    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
