"""Confidence-Aware Regularization: confidence in tokens that verification rejects (this project's reconstruction).

Trees are ranked by the product of q along a path, so confidence in an invalid token costs nodes that a valid one
could have had. The penalty is one-sided: only rejected tokens have one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["linear", "squared", "unlikelihood"]
_ALMOST_ONE = 1 - 1e-6


def penalty(kind: Penalty, q: Tensor, rejection: Tensor) -> tuple[Tensor, Tensor]:
    """Return the penalty of every token and its derivative by q, in the shape of ``q``.

    ``linear``: q (1 - a). ``squared``: (q - a)². ``unlikelihood``: -log(1 - q) (arXiv 1908.04319).

    Args:
        kind: One of the three.
        q: The drafter's probabilities.
        rejection: 1 - a of tokens that were rejected, 0 elsewhere: those have no penalty.

    >>> value, slope = penalty("linear", torch.tensor([0.5, 0.4]), torch.tensor([0.8, 0.0]))
    >>> value, slope
    (tensor([0.4000, 0.0000]), tensor([0.8000, 0.0000]))
    """
    if kind == "linear":
        return q * rejection, rejection
    rejected = (rejection > 0).to(q.dtype)
    if kind == "squared":
        distance = (q - (1 - rejection)) * rejected
        return distance.square(), 2 * distance
    capped = q.clamp(max=_ALMOST_ONE)
    return -torch.log1p(-capped) * rejected, rejected / (1 - capped)
