"""Choosing one token a row from a batch of logits, greedily or by temperature, with noise that the caller brings.

The usual ways draw one random number a vocabulary entry; with 49,152 entries and 64 rows that costs as much as the
model. One uniform number a row and the inverse of the distribution function cost one pass over the logits. Rows are
taken a few at a time, so that the float32 copy stays in the processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vsdbench_drafters.largest import largest

_BLOCK = 128
_ROWS_AT_ONCE = 8


def pick_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    """Return ``[n]`` int64 tokens: the most likely where the temperature is 0, else a sample by inverse transform.

    Args:
        logits: ``[n, V]``, any floating dtype; computed with in float32.
        temperatures: ``[n]`` float, on the CPU.
        uniforms: ``[n]`` float64 in [0, 1), on the CPU; row ``i`` gets the token at which the distribution function
            first exceeds ``uniforms[i]``.
    """
    at_once = _ROWS_AT_ONCE if logits.device.type == "cpu" else len(logits)
    parts = [slice(start, start + at_once) for start in range(0, len(logits), at_once)]
    return torch.cat([_pick(logits[part], temperatures[part], uniforms[part]) for part in parts])


def _pick(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    best, tokens = largest(logits)
    rows = torch.nonzero(temperatures > 0)[:, 0]
    if len(rows):
        on_device = rows.to(logits.device)
        weights = logits[on_device].float().sub_(best[on_device, None].float())
        if bool((temperatures[rows] != 1).any()):
            weights.div_(temperatures[rows].to(weights)[:, None])
        tokens[on_device] = _invert(weights.exp_(), uniforms[rows].to(logits.device))
    return tokens


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return ``[r]``: the first index whose cumulated weight exceeds ``uniforms`` times the total.

    Args:
        weights: ``[r, V]`` float32, not negative.
        uniforms: ``[r]`` float64.
    """
    blocks = pad(weights, (0, -weights.shape[1] % _BLOCK)).view(len(weights), -1, _BLOCK)
    upto = blocks.sum(dim=-1).double().cumsum(dim=-1)
    wanted = uniforms[:, None] * upto[:, -1:]
    block = _first_above(upto, wanted)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[torch.arange(len(block), device=block.device), block[:, 0]].double().cumsum(dim=-1)
    return (block * _BLOCK + _first_above(inside, wanted - before))[:, 0]


def _first_above(cumulated: Tensor, wanted: Tensor) -> Tensor:
    """Return ``[r, 1]``: where ``cumulated`` first exceeds ``wanted``; never an entry of weight 0 at the end."""
    found = torch.searchsorted(cumulated, wanted, right=True)
    last = (cumulated < cumulated[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last)
