"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

``nn.Linear`` on a CPU hands its row-major weight to the matrix library at every call, which is slow for few rows
(``benchmarks/products.py``). For these there are kernels of our own (``models.native``), which read weights about as
fast as memory gives them, or else oneDNN's. The dense weight stays beside the copy: embeddings are tied to it, many
rows are multiplied with it, and the transformers baseline runs on it, as its users would.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from vsdbench.models import native, onednn

ROUND_DRAFTS = True
"""Whether ``narrow`` weights are rounded: drafts may be, and are then read in half the time. Tests may say no."""


class Switch:
    """Turns the packed products of one model on and off."""

    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on = True


class Packed:
    """A weight in the layouts that its kernels want, each made when it is needed.

    Args:
        weight: ``[out, in]``, of a dtype that ``can_pack``; later changes to it are not seen.
        bias: ``[out]``, added to every row.
        narrow: Whether kernels for few rows may round the weight to bfloat16.
    """

    __slots__ = ("_bias", "_onednn", "_rows", "_weight", "panels")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, narrow: bool = False) -> None:
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._rows = native.most_rows(weight.dtype)
        kernels = native.library() if self._rows else None
        narrow = narrow and ROUND_DRAFTS
        self.panels = None if kernels is None else native.Panels(kernels, self._weight, self._bias, narrow=narrow)
        self._onednn: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self._weight.dtype

    def multiply(
        self, rows: Tensor, activation: str = "none", operation: str = "", other: Tensor | None = None
    ) -> Tensor:
        """Return ``[..., out]``: the product, then SiLU (``swish``), or ``add`` or ``mul`` with ``other``."""
        count = rows.numel() // rows.shape[-1]
        if self.panels is not None and 0 < count <= self._rows:
            return self.panels.multiply(rows, activation, operation, other)
        # Beside our own kernels, oneDNN's pay where the processor has bfloat16 instructions, and not in float32.
        if onednn.can_pack(rows.dtype) and (self.panels is None or rows.dtype is torch.bfloat16):
            if self._onednn is None:
                self._onednn = onednn.lay_out(self._weight)
            return onednn.multiply(rows, self._onednn, self._bias, activation, operation, other)
        result = linear(rows, self._weight, self._bias)
        if activation == "swish":
            result = silu(result)
        if other is None:
            return result
        return result + other if operation == "add" else result * other


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies with the packed copy of its weight wherever no gradient is wanted."""

    packed: Packed
    switch: Switch

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Return ``[..., out_features]``."""
        learning = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if learning or not self.switch.on or input.dtype != self.packed.dtype:
            return linear(input, self.weight, self.bias)
        return self.packed.multiply(input)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device and dtype have packed products here."""
    return device.type == "cpu" and (onednn.can_pack(dtype) or native.most_rows(dtype) > 0)


@torch.no_grad()
def pack(model: nn.Module) -> Switch:
    """Pack every plain ``nn.Linear`` of a model in place and return the switch of its packed products."""
    switch = Switch()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
            module.switch = switch  # type: ignore[assignment]
            # Neither a parameter nor a buffer, so it is never saved.
            object.__setattr__(module, "packed", Packed(module.weight, module.bias))
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
        narrow: As for ``Packed``: drafts may be rounded, what a target says may not.
    """

    __slots__ = ("__weakref__", "_bias", "_number", "_weight", "packed")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, packed: Packed | None = None, narrow: bool = False
    ) -> None:
        self._weight, self._bias = weight, bias
        self._number = next(_NUMBERS)
        _PRODUCTS[self._number] = self
        if packed is None and can_pack(weight.device, weight.dtype):
            packed = Packed(weight, bias, narrow=narrow)
        self.packed = packed

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ``[n, out]``."""
        return self._through(rows, "none")

    @property
    def tensors(self) -> list[Tensor]:
        """The weight, and the bias if there is one."""
        return [self._weight] if self._bias is None else [self._weight, self._bias]

    def silu(self, rows: Tensor) -> Tensor:
        """Return ``[n, out]`` through the activation SiLU, rounded once."""
        if self.packed is None:
            return silu(self(rows))
        return self._through(rows, "swish")

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """Return the product plus ``other`` ``[n, out]``, rounded once."""
        if self.packed is None:
            return other + self(rows)
        return self._and(rows, "add", other)

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """Return the product times ``other`` ``[n, out]``, element by element, rounded once."""
        if self.packed is None:
            return other * self(rows)
        return self._and(rows, "mul", other)

    def _through(self, rows: Tensor, activation: str) -> Tensor:
        if self.packed is None:
            return linear(rows, self._weight, self._bias)
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.vsdbench.product(rows, self._number, activation)
            return compiled
        return self.packed.multiply(rows, activation)

    def _and(self, rows: Tensor, operation: str, other: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.vsdbench.product_and(rows, self._number, other, operation)
            return compiled
        assert self.packed is not None
        return self.packed.multiply(rows, "none", operation, other)


def tensors_among(values: Iterable[object]) -> Iterator[Tensor]:
    """Yield the tensors among some values, and those of the products among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Product):
            yield from value.tensors


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
