"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

``nn.Linear`` on a CPU hands its row-major weight to the matrix library at every call. oneDNN's own layout, made once,
halves the time of a decode step's products (``benchmarks/products.py``), in float32 as in bfloat16. The dense weight
stays beside it: embeddings are tied to it, and the transformers baseline runs on it, as its users would.
"""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

PACKED_DTYPES = (torch.float32, torch.bfloat16)
_ROWS_HINT = 16
"""Rows for which the layout is chosen: a small tree. It serves any number of rows."""


class Switch:
    """Turns the packed products of one model on and off."""

    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on = True


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies with the packed copy of its weight wherever no gradient is wanted."""

    packed: Tensor
    switch: Switch

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Return ``[..., out_features]``."""
        learning = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if learning or not self.switch.on or input.dtype != self.packed.dtype:
            return linear(input, self.weight, self.bias)
        return _multiply(input, self.packed, self.bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device and dtype have packed products in this build of torch."""
    if not (
        device.type == "cpu"
        and dtype in PACKED_DTYPES
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    ):
        return False
    # A processor without bfloat16 instructions refuses the packed product, not the plain one.
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


@torch.no_grad()
def pack(model: nn.Module) -> Switch:
    """Pack every plain ``nn.Linear`` of a model in place and return the switch of its packed products."""
    switch = Switch()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
            module.switch = switch  # type: ignore[assignment]
            # Neither a parameter nor a buffer, so it is never saved.
            object.__setattr__(module, "packed", lay_out(module.weight.detach()))
    return switch


def unpack(model: nn.Module) -> None:
    """Turn packed layers back into plain ones, in place; the packed copies are freed."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            del module.packed, module.switch
            module.__class__ = nn.Linear  # type: ignore[assignment]


class Product:
    """The product of rows ``[n, in]`` with one weight, and what follows it, packed where possible and plain elsewhere.

    Args:
        weight: ``[out, in]``; it is copied where it is packed, so later changes to it are not seen.
        bias: ``[out]``, added to every row.
        packed: The packed copy, if there is one.
    """

    __slots__ = ("__weakref__", "_bias", "_number", "_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, packed: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._number = next(_NUMBERS)
        _PRODUCTS[self._number] = self
        if packed is None and can_pack(weight.device, weight.dtype):
            packed = lay_out(weight)
        self._packed = packed

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ``[n, out]``."""
        return self._through(rows, "none")

    def silu(self, rows: Tensor) -> Tensor:
        """Return ``[n, out]`` through the activation SiLU, rounded once."""
        if self._packed is None:
            return silu(self(rows))
        return self._through(rows, "swish")

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """Return the product plus ``other`` ``[n, out]``, rounded once."""
        if self._packed is None:
            return other + self(rows)
        return self._and(rows, "add", other)

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """Return the product times ``other`` ``[n, out]``, element by element, rounded once."""
        if self._packed is None:
            return other * self(rows)
        return self._and(rows, "mul", other)

    def _through(self, rows: Tensor, activation: str) -> Tensor:
        if self._packed is None:
            return linear(rows, self._weight, self._bias)
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.vsdbench.product(rows, self._number, activation)
            return compiled
        return _multiply(rows, self._packed, self._bias, activation)

    def _and(self, rows: Tensor, operation: str, other: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.vsdbench.product_and(rows, self._number, other, operation)
            return compiled
        assert self._packed is not None
        return _multiply_and(rows, self._packed, self._bias, operation, other)


# A compiled graph cannot hold a packed weight, nor be kept on disk with one: it calls a product by its number.
_NUMBERS = itertools.count()
_PRODUCTS: WeakValueDictionary[int, Product] = WeakValueDictionary()
_OPERATIONS = torch.library.Library("vsdbench", "DEF")  # type: ignore[no-untyped-call]
for _signature in (
    "product(Tensor rows, int number, str activation) -> Tensor",
    "product_and(Tensor rows, int number, Tensor other, str operation) -> Tensor",
):
    _OPERATIONS.define(_signature)  # type: ignore[no-untyped-call]


def _product(rows: Tensor, number: int, activation: str) -> Tensor:
    return _PRODUCTS[number]._through(rows, activation)  # noqa: SLF001 - one unit


def _product_and(rows: Tensor, number: int, other: Tensor, operation: str) -> Tensor:
    return _PRODUCTS[number]._and(rows, operation, other)  # noqa: SLF001 - one unit


_OPERATIONS.impl("product", _product, "CPU")  # type: ignore[no-untyped-call]
_OPERATIONS.impl("product_and", _product_and, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("vsdbench::product")  # type: ignore[untyped-decorator]
def _product_shape(rows: Tensor, number: int, activation: str) -> Tensor:
    del activation
    return rows.new_empty(rows.shape[0], _PRODUCTS[number]._weight.shape[0])  # noqa: SLF001 - one unit


@torch.library.register_fake("vsdbench::product_and")  # type: ignore[untyped-decorator]
def _product_and_shape(rows: Tensor, number: int, other: Tensor, operation: str) -> Tensor:
    del rows, number, operation
    return torch.empty_like(other)


# The operations below are what torch.compile itself puts in the place of a frozen linear layer on a CPU.
def lay_out(weight: Tensor) -> Tensor:
    """Return a packed copy of a weight ``[out, in]``."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)  # noqa: SLF001
    return packed


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, activation, [], "")  # noqa: SLF001
    return result


def _multiply_and(rows: Tensor, packed: Tensor, bias: Tensor | None, operation: str, other: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, other, packed, bias, operation)  # noqa: SLF001
    return result
