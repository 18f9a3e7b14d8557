"""Which device and dtype to run on: asked for by the user, or chosen by a measurement, and always printed."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vsdbench.errors import ConfigError, EnvironmentProblemError

Mark: TypeAlias = "float | torch.cuda.Event"
"""A moment on a device's clock."""

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


def dtype_name(dtype: torch.dtype) -> str:
    """Return what a dtype is called.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


@functools.cache
def bf16_speedup(device: torch.device) -> float:
    """Return how much faster than fp32 a product of 8 rows with a 1,024 x 4,096 matrix runs in bf16, measured.

    In turns, and the best of each: other work on the machine can only make a product slower, and must not decide.
    """
    products = {dtype: _product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    turns = [{dtype: product() for dtype, product in products.items()} for _ in range(12)]
    return min(turn[torch.float32] for turn in turns) / min(turn[torch.bfloat16] for turn in turns)


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """Return what multiplies and returns the seconds that it took."""
    rows = torch.ones(8, 1024, device=device, dtype=dtype)
    # Several matrices, so that the weights come from memory as they do in a model and not from a warm cache.
    weights = [torch.ones(4096, 1024, device=device, dtype=dtype) for _ in range(4)]

    def multiply() -> None:
        for weight in weights:
            torch.nn.functional.linear(rows, weight)

    return functools.partial(seconds_of, multiply, device)


@functools.cache
def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of products as large as those of training, measured."""
    rows, weight = torch.ones(512, 576, device=device, dtype=dtype), torch.ones(8192, 576, device=device, dtype=dtype)
    product = functools.partial(torch.nn.functional.linear, rows, weight)
    seconds_of(product, device)  # warm
    return 2.0 * rows.numel() * len(weight) / seconds_of(product, device, repeats=5)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds that a function takes, with what it gives the device to do: the median of so many times."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def mark(device: torch.device) -> Mark:
    """Return the moment at which the device will have done all it was given so far; nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Return the seconds from one moment to a later one, once both are over."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def apart(device: torch.device) -> bool:
    """Whether a device has memory of its own: to read it, the host waits until all it was given is done."""
    return device.type != "cpu"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; the host does not wait."""
    if not apart(device):
        return tensor
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def send_numbers(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers of the host as a tensor on a device, as ``send``."""
    return send(torch.tensor(numbers, dtype=dtype), device)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one device on the host, all by one transfer: what a decode step waits for, once.

    >>> [tensor.tolist() for tensor in fetch([torch.tensor([1, 2]), torch.tensor([[0.5]])])]
    [[1, 2], [[0.5]]]
    """
    if not tensors or not apart(tensors[0].device):
        return list(tensors)
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].element_size())  # each begins aligned
    packed = torch.cat([tensors[index].reshape(-1).view(torch.uint8) for index in order]).cpu()
    found: dict[int, Tensor] = {}
    start = 0
    for index in order:
        tensor = tensors[index]
        found[index] = packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += tensor.nbytes
    return [found[index] for index in range(len(tensors))]
