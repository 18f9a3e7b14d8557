"""Kernels for few rows on a CPU, compiled once for the machine they run on by the C compiler that it has.

torch's libraries are made for many rows. A decode step has one, or a tree's dozen, and could be as fast as its weights
can be read; ``kernels/step.c`` nearly is, and says how. What is compiled stays in the cache folder. Where there is no
compiler, or ``VSDBENCH_NATIVE=0`` is set, oneDNN's products and torch's operations do the same.

A product runs here up to so many rows as a measurement on this machine says; it is made once and kept beside the code,
so that all runs on a machine compute alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from vsdbench.errors import ConfigError
from vsdbench.models import onednn
from vsdbench.paths import cache_dir

VARIABLE = "VSDBENCH_NATIVE"
"""Environment variable: 0 does without these kernels, 1 with them at all numbers of rows, unmeasured."""
DTYPES = (torch.float32, torch.bfloat16)
_SOURCES = Path(__file__).parents[1] / "kernels"
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
MOST_ROWS = 256
"""Of one call; more have not been measured."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, MOST_ROWS)
_NORM_ROWS = 64
"""Rows up to which a norm is computed here, by one thread."""
_COMPILING = threading.Lock()
_AS_GOOD, _LOST = 1.3, 2.0
"""What these kernels may take of the time of others and still be chosen: layers in one call save more than that between
their products, and a row does not depend on others. And where more rows need not be tried."""
_TURNS, _CLEARLY = 10, 0.75
"""Turns of a measurement, and the share of others' time that needs no more of them."""
_LANES = 16
"""Numbers of the widest register."""
_OPERATIONS = {"": 0, "add": 1, "mul": 2}
_ACTIVATIONS = {"none": 0, "swish": 1}


class Weight(ctypes.Structure):
    """A weight of ``kernels/step.c``."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
    )


class Panels:
    """A weight laid out for these kernels.

    Args:
        library: The kernels.
        weight: ``[out, in]``; it is copied.
        bias: ``[out]``.
        narrow: Whether to round the copy to bfloat16, whatever the dtype of the rows: it is read in half the time.
    """

    __slots__ = ("_address", "_bias", "_data", "_is_bf16", "_library", "outputs", "struct")

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, *, narrow: bool = False) -> None:
        self._library = library
        self.outputs, inputs = weight.shape
        width = library.panel_width()
        self._is_bf16 = int(weight.dtype is torch.bfloat16)  # of rows
        weight = weight.detach().to(torch.bfloat16 if narrow else weight.dtype).contiguous()
        is_bf16 = int(weight.dtype is torch.bfloat16)
        self._data = weight.new_empty(-(-self.outputs // width) * width * inputs)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        library.lay_out(weight.data_ptr(), self._data.data_ptr(), self.outputs, inputs, is_bf16)
        pointer = None if self._bias is None else self._bias.data_ptr()
        self.struct = Weight(self._data.data_ptr(), pointer, self.outputs, inputs, is_bf16)
        self._address = ctypes.addressof(self.struct)

    def multiply(
        self, rows: Tensor, activation: str = "none", operation: str = "", other: Tensor | None = None
    ) -> Tensor:
        """Return ``[..., out]`` for ``[..., in]``: the product, its activation, and a sum or product with ``other``."""
        rows = rows.contiguous()
        result = rows.new_empty(*rows.shape[:-1], self.outputs)
        count = rows.numel() // rows.shape[-1]
        work = rows.new_empty(count * (rows.shape[-1] + self.outputs) if self._is_bf16 else 0, dtype=torch.float32)
        other = None if other is None else other.contiguous()
        self._library.product(
            self._address,
            rows.data_ptr(),
            count,
            self._is_bf16,
            _ACTIVATIONS[activation],
            _OPERATIONS[operation],
            None if other is None else other.data_ptr(),
            result.data_ptr(),
            work.data_ptr(),
            torch.get_num_threads(),
        )
        return result


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rows ``[n, H]`` normed by their root mean square, times ``[H]``: here if few, else by torch."""
    kernels = None if torch.compiler.is_compiling() else library()
    if kernels is None or x.device.type != "cpu" or x.dtype not in DTYPES or not 0 < len(x) <= _NORM_ROWS:
        return rms_norm(x, (x.shape[-1],), weight, eps)
    x, wide = x.contiguous(), weight.float()
    result, work = torch.empty_like(x), x.new_empty(2 * x.shape[-1], dtype=torch.float32)
    kernels.norm_rows(
        x.data_ptr(), wide.data_ptr(), *x.shape, eps, int(x.dtype is torch.bfloat16), result.data_ptr(), work.data_ptr()
    )
    return result


def top_k(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest numbers of each row of ``[n, V]``, largest first, and their places."""
    kernels = library()
    if kernels is None or x.device.type != "cpu" or x.dtype is not torch.float32:
        values, places = x.topk(count, dim=-1)
        return values, places
    x = x.contiguous()
    values, places = x.new_empty(len(x), count), x.new_empty(len(x), count, dtype=torch.int64)
    kernels.largest(x.data_ptr(), *x.shape, count, values.data_ptr(), places.data_ptr())
    return values, places


def informed(
    scores: Tensor, numbers: NDArray[np.uint32], ids: Tensor, temperature: float, weight: float
) -> Tensor | None:
    """Return ``log_softmax(scores / temperature + weight * noise)``; None where there are no kernels for it.

    Args:
        scores: ``[..., Vd]`` float32.
        numbers: ``[V]``, which the noise is made of (``decoding.sampling.Uniforms``).
        ids: ``[Vd]`` int64, where in ``numbers`` each score's own is.
        temperature: Above 0.
        weight: Of the noise.
    """
    kernels = library()
    if kernels is None or scores.device.type != "cpu" or scores.dtype is not torch.float32:
        return None
    scores, count = scores.contiguous(), scores.shape[-1]
    result, work = torch.empty_like(scores), scores.new_empty(2 * (count + _LANES))
    kernels.informed(
        scores.data_ptr(), scores.numel() // count, count, numbers.ctypes.data, ids.data_ptr(),
        1 / temperature, weight, work.data_ptr(), result.data_ptr(),
    )  # fmt: skip
    return result


@functools.cache
def prepare() -> None:
    """Begin to compile the kernels, if that is still to be done, while a model is fetched."""
    if not os.environ.get(VARIABLE):
        threading.Thread(target=library, daemon=True).start()


def library() -> ctypes.CDLL | None:
    """Return the kernels; None where they cannot be had (``why_not``)."""
    return _load()[0]


def why_not() -> str | None:
    """Return why there are no kernels here, and what to do; None where there are."""
    return _load()[1]


@functools.cache
def most_rows(dtype: torch.dtype) -> int:
    """Return the number of rows up to which these kernels are as fast as others here; 0: use others."""
    kernels = library()
    if kernels is None or dtype not in DTYPES:
        return 0
    if os.environ.get(VARIABLE) == "1":
        return MOST_ROWS
    path = _folder() / f"{_key()}-{torch.__version__}-{torch.get_num_threads()}.json"
    try:
        known: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if (name := str(dtype)) not in known:
        known[name] = _measure(kernels, dtype)
        with contextlib.suppress(OSError):  # a cache that others filled, and only they may
            _write(path, json.dumps(known).encode())
    return int(known[name])


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return, for a manifest, up to how many rows these kernels run, or why they do not; None off the CPU."""
    if device.type != "cpu":
        return None
    rows = most_rows(dtype)
    return {"most_rows": rows, "not_native": None if rows else why_not() or "others are faster here"}


def _measure(kernels: ctypes.CDLL, dtype: torch.dtype) -> int:
    """Return the largest number of rows up to which these kernels are not slower, the best of several turns."""
    weights = [torch.full((1536, 576), 0.5, dtype=dtype) for _ in range(32)]  # more than most caches hold
    panels = [Panels(kernels, weight, None) for weight in weights]
    packed = [onednn.lay_out(weight) for weight in weights] if onednn.can_pack(dtype) else None
    found = 0
    for size in _SIZES:
        rows = torch.full((size, 576), 0.5, dtype=dtype)

        def ours(rows: Tensor = rows) -> None:
            for weight in panels:
                weight.multiply(rows)

        def others(rows: Tensor = rows) -> None:
            for index, weight in enumerate(weights):
                if packed is None:
                    linear(rows, weight)
                else:
                    onednn.multiply(rows, packed[index], None)

        own, other = _best(ours, others)
        if own <= _AS_GOOD * other:
            found = size  # even if fewer rows were not: that was another program on the machine
        elif own > _LOST * other:
            break
    return found


def _best(ours: Callable[[], None], others: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of both, the best of several turns."""
    ours()  # threads, warm
    own = other = math.inf
    for _ in range(_TURNS):
        own, other = min(own, _seconds(ours)), min(other, _seconds(others))
        if own < _CLEARLY * other:
            break
    return own, other


def _seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    asked = os.environ.get(VARIABLE, "")
    if asked not in {"", "0", "1"}:
        raise ConfigError(f"{VARIABLE} is '{asked}': 0 does without kernels, 1 takes them unmeasured, unset decides.")
    if asked == "0":
        return None, f"{VARIABLE} is 0"
    if sys.platform != "linux":
        return None, "they are compiled on Linux only"
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    path = _folder() / f"{_key()}.so"
    try:
        with _COMPILING:
            if not path.is_file():
                if compiler is None:
                    asked = os.environ.get("CC", "gcc")
                    return None, f"there is no C compiler '{asked}': install gcc, or name one in CC"
                _compile(compiler, path)
        # Its threads are torch's: OpenMP's symbols are found in the process, since two pools would fight for cores.
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        line = next((line for line in said if "error" in line), said[-1])
        return None, f"they cannot be compiled or loaded: {line}"
    pointer, number, real = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
    kernels.lay_out.argtypes = [pointer, pointer, number, number, number]
    kernels.product.argtypes = [pointer, pointer, *[number] * 4, *[pointer] * 3, number]
    kernels.step.argtypes = [pointer, pointer]
    kernels.norm_rows.argtypes = [pointer, pointer, number, number, real, number, pointer, pointer]
    kernels.largest.argtypes = [pointer, number, number, number, pointer, pointer]
    kernels.informed.argtypes = [pointer, number, number, pointer, pointer, real, real, pointer, pointer]
    kernels.workspace.argtypes, kernels.workspace.restype = [pointer, pointer], ctypes.c_int64
    for name in ("lay_out", "product", "step", "norm_rows", "largest", "informed"):
        getattr(kernels, name).restype = None
    return kernels, None


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects, shared = Path(folder) / "step.o", Path(folder) / "step.so"
        for command in (
            [*_FLAGS, "-c", str(_SOURCES / "step.c"), "-o", str(objects)],
            ["-shared", str(objects), "-o", str(shared)],
        ):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True)
        shared.replace(path)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def _folder() -> Path:
    return cache_dir() / "kernels"


@functools.cache
def _key() -> str:
    """Return what names the code: source, flags and processor."""
    processor: Any = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    sources = [path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.is_file()]
    compiler = os.environ.get("CC", "gcc")
    return hashlib.sha256(repr((sources, _FLAGS, compiler, processor)).encode()).hexdigest()[:16]
