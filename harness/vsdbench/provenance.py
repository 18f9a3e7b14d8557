"""On what a number was measured: the machine, the versions and the commit, as plain values for a run's manifest.

Nothing here fails: what cannot be found out is None, because a measurement without it is still a measurement.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import vsdbench

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "datasets")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")
_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_total_mib": "memory.total",
    "memory_used_mib": "memory.used",
    "clock_sm_mhz": "clocks.sm",
    "clock_sm_max_mhz": "clocks.max.sm",
    "clock_memory_mhz": "clocks.mem",
    "power_draw_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "utilisation_pct": "utilization.gpu",
    "throttle_reasons": "clocks_throttle_reasons.active",
}
_THROTTLE_BITS = {
    0x1: "idle",
    0x2: "applications clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def machine() -> dict[str, Any]:
    """Return what identifies a measurement's machine and software, in JSON types.

    Returns:
        ``os``, ``cpu`` (model, cores, flags that matter, load), ``memory`` (bytes), ``gpus`` (clocks in MHz, power in
        watts, throttle reasons in words), ``versions``, ``git`` (None outside a checkout) and ``threads``.
    """
    return {
        "os": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": cpu(),
        "memory": memory(),
        "gpus": gpus(),
        "versions": versions(),
        "git": git_state(Path(vsdbench.__file__).parent),
        "threads": threads(),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return what makes times on two machines incomparable, in words, from what ``machine`` said of each.

    >>> differences({"versions": {"torch": "2.12.0"}}, {"versions": {"torch": "2.13.0"}})
    ['torch 2.12.0 and 2.13.0']
    """
    before, after = _what_counts(one), _what_counts(other)
    return [f"{key} {value} and {after[key]}" for key, value in before.items() if value != after[key]]


def _what_counts(machine: Mapping[str, Any]) -> dict[str, str]:
    processor, packages = machine.get("cpu") or {}, machine.get("versions") or {}
    return {
        "processor": str(processor.get("model")),
        "cores": str(processor.get("num_usable_cores")),
        "GPUs": ", ".join(str(gpu.get("name")) for gpu in machine.get("gpus") or []) or "none",
        "torch": str(packages.get("torch")),
        "transformers": str(packages.get("transformers")),
        "threads": str((machine.get("threads") or {}).get("torch_num_threads")),
    }


def cpu() -> dict[str, Any]:
    """Return the CPU's model, its cores, those this process may use, and the load averages of 1, 5 and 15 minutes."""
    try:
        usable: int | None = len(psutil.Process().cpu_affinity() or [])
    except (AttributeError, psutil.Error):  # no affinity on macOS
        usable = psutil.cpu_count()
    try:
        load: list[float] | None = [round(value, 2) for value in psutil.getloadavg()]
    except OSError:
        load = None
    return {
        "model": _cpu_model(),
        "num_physical_cores": psutil.cpu_count(logical=False),
        "num_logical_cores": psutil.cpu_count(),
        "num_usable_cores": usable,
        "load_average": load,
    }


def _cpu_model() -> str | None:
    """Return the CPU's marketing name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or None


def memory() -> dict[str, int]:
    """Return total and available memory, in bytes."""
    state = psutil.virtual_memory()
    return {"total_bytes": state.total, "available_bytes": state.available}


def gpus() -> list[dict[str, Any]]:
    """Return name, driver, clocks, power, temperature and throttle reasons of every NVIDIA GPU; empty without any.

    Read before and after a run, it shows whether the clocks held.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    fields = ",".join(_GPU_FIELDS.values())
    for query in (fields, fields.replace("throttle", "event")):  # newer drivers renamed the reasons
        output = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
        if output:
            return parse_gpus(output)
    return []


def parse_gpus(output: str) -> list[dict[str, Any]]:
    """Return one mapping a line of ``nvidia-smi``'s CSV, in the order of its query."""
    found: list[dict[str, Any]] = []
    for line in output.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_GPU_FIELDS):
            continue
        gpu: dict[str, Any] = {
            key: value if key in {"name", "driver"} else _number(value)
            for key, value in zip(_GPU_FIELDS, values, strict=True)
        }
        gpu["throttle_reasons"] = throttle_reasons(values[-1])
        found.append(gpu)
    return found


def throttle_reasons(mask: str) -> list[str] | None:
    """Return why the clocks are below their maximum, in words; None if the driver does not say.

    >>> throttle_reasons("0x0000000000000024")
    ['software power cap', 'software thermal slowdown']
    """
    try:
        bits = int(mask, 16)
    except ValueError:
        return None
    return [reason for bit, reason in _THROTTLE_BITS.items() if bits & bit]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, vsdbench and the packages that decide results; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "vsdbench": vsdbench.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def threads() -> dict[str, Any]:
    """Return the thread settings; torch's own only if torch has been imported, since its import takes seconds."""
    found: dict[str, Any] = {name.lower(): os.environ.get(name) for name in _THREAD_VARIABLES}
    torch = sys.modules.get("torch")
    found["torch_num_threads"] = torch.get_num_threads() if torch else None
    found["torch_num_interop_threads"] = torch.get_num_interop_threads() if torch else None
    return found


def git_state(folder: Path) -> dict[str, str | bool | None] | None:
    """Return the commit of the checkout that holds ``folder``, and a hash of its uncommitted changes.

    Returns:
        ``commit``, ``dirty`` and ``dirty_hash`` (16 hexadecimal digits of the differences and of the untracked files'
        contents; None if clean). None where there is no checkout, or where ``folder`` is not one of its files, as in
        a virtual environment inside somebody's repository.
    """
    top = _output(["git", "rev-parse", "--show-toplevel"], folder)
    if top is None or not _output(["git", "ls-files", "--", "."], folder):
        return None
    commit = _output(["git", "rev-parse", "HEAD"], folder)
    root = Path(top)
    difference = _output(["git", "diff", "HEAD", "--binary", "--no-ext-diff"], root) or ""
    untracked = (_output(["git", "ls-files", "--others", "--exclude-standard"], root) or "").splitlines()
    if not difference and not untracked:
        return {"commit": commit, "dirty": False, "dirty_hash": None}
    digest = hashlib.sha256(difference.encode())
    for name in sorted(untracked):
        digest.update(name.encode())
        try:
            digest.update((root / name).read_bytes())
        except OSError:  # gone meanwhile, or a name that git quotes
            continue
    return {"commit": commit, "dirty": True, "dirty_hash": digest.hexdigest()[:16]}


def _output(command: list[str], folder: Path | None = None) -> str | None:
    """Return what a command prints, or None if it is missing, fails or takes more than ten seconds."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
