"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

``nn.Linear`` on a CPU hands its row-major weight to the matrix library at every call. oneDNN's own layout, made once,
halves the time of a decode step's products (``benchmarks/products.py``), in float32 as in bfloat16. The dense weight
stays beside it: embeddings are tied to it, and the transformers baseline runs on it, as its users would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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


def product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that maps ``[n, in]`` to ``[n, out]``: packed where that is possible, plain elsewhere.

    Args:
        weight: ``[out, in]``; it is copied where it is packed, so later changes to it are not seen.
    """
    if not can_pack(weight.device, weight.dtype):
        return lambda rows: linear(rows, weight)
    packed = lay_out(weight)
    return lambda rows: _multiply(rows, packed, None)


# The two operations below are what torch.compile itself puts in the place of a frozen linear layer on a CPU.
def lay_out(weight: Tensor) -> Tensor:
    """Return a packed copy of a weight ``[out, in]``."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)  # noqa: SLF001
    return packed


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")  # noqa: SLF001
    return result
