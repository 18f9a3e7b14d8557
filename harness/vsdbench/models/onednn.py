"""oneDNN's products with weights in its own layout: what torch.compile puts in the place of a frozen linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
_ROWS_HINT = 16
"""Rows for which the layout is chosen: a small tree. It serves any number of rows."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has such products of a dtype on this processor."""
    if not (
        dtype in DTYPES
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    ):
        return False
    # A processor without bfloat16 instructions refuses the packed product, not the plain one.
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def lay_out(weight: Tensor) -> Tensor:
    """Return a packed copy of a weight ``[out, in]``."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)  # noqa: SLF001
    return packed


def multiply(  # noqa: PLR0917 - the product, and what follows it
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    operation: str = "",
    other: Tensor | None = None,
) -> Tensor:
    """Return ``[..., out]``: the product, then its activation, or a sum or product with ``other``."""
    result: Tensor
    if other is None:
        result = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, activation, [], "")  # noqa: SLF001
    else:
        result = torch.ops.mkldnn._linear_pointwise.binary(rows, other, packed, bias, operation)  # noqa: SLF001
    return result
