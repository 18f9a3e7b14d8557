"""What ``torch.compile`` does for training: one kernel for the loss of a chunk of logits in place of five.

Of a training step the products and the attention are single kernels already, and their shapes change with every batch.
What is worth compiling is the arithmetic on ``[rows, Vd]`` logits, which only moves memory. It is compiled once, for
any number of rows. Row losses that are made anew for every batch (the path term of ``vsd``) are left as they are: they
would be compiled anew, too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch


def wants_compiling(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Return what a recipe's ``training.compile`` means on a device: ``auto`` compiles on GPUs only.

    >>> wants_compiling("auto", torch.device("cpu"))
    False
    """
    return device.type == "cuda" if setting == "auto" else setting


def compile_row_losses(objective: Any, *, backend: str | Any = "inductor") -> None:  # noqa: ANN401 - as torch.compile's
    """Compile ``row_losses`` of an objective that has it, in place.

    Args:
        objective: Any objective.
        backend: Of ``torch.compile``.
    """
    if hasattr(objective, "row_losses"):
        objective.row_losses = torch.compile(objective.row_losses, dynamic=True, backend=backend)
