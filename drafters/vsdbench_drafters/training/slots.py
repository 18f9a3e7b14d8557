"""The cache and the attention of slot-wise decoding: rows of one preallocated buffer, each with a length of its own.

Shape legend: S slots, n rows in use, T packed prompt tokens, P prefix tokens, C cache columns, H query heads, G key and
value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


class SlotCache:
    """Keys ``[S, G, D, C]`` and values ``[S, G, C, D]`` a layer, with the two calls that models make of a cache.

    A decode step writes one column a row, at the row's own length. A prefill writes the packed prompts into their
    rows and lets them attend to the shared prefix and to themselves only.
    """

    def __init__(self, slots: int, columns: int, prefix: int) -> None:
        self._slots = slots
        self._columns = columns
        self._num_prefix = prefix
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self._mode = ""
        self._rows: list[int] | None = None
        self._lengths: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget the prefix; rows need no clearing, since nothing beyond a row's length is attended to."""
        self.has_prefix = False

    # ---- what the generator says before a forward ----

    def begin_decode(self, positions: Tensor, columns: int) -> None:
        """Expect one token a row, to be written at ``positions`` ``[n]`` and to see the first ``columns`` columns."""
        self._mode = "decode"
        self._at = positions
        self._row_ids = torch.arange(len(positions), device=positions.device)
        self._visible = columns

    def begin_prefill(self, rows: list[int] | None, lengths: Sequence[int]) -> None:
        """Expect packed prompts of ``lengths`` tokens for ``rows`` (None: the shared prefix, for every row)."""
        self._mode = "prefill"
        self._rows = rows
        self._lengths = list(lengths)

    def end_prefill(self) -> None:
        """Note that the prefix is there, if that is what was prefilled."""
        self.has_prefix = self.has_prefix or self._rows is None

    def permute(self, order: Tensor, columns: int) -> None:
        """Move row ``order[i]`` to row ``i``; only the first ``columns`` columns are kept."""
        for keys, values in zip(self._keys.values(), self._values.values(), strict=True):
            keys[..., :columns] = keys[order, :, :, :columns]
            values[:, :, :columns] = values[order, :, :columns]

    # ---- what the model calls ----

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``[B, G, q, D]``; return all that the queries may attend to, ``[B, G, K, D]``."""
        if layer_idx not in self._keys:
            _, heads, _, size = keys.shape
            self._keys[layer_idx] = keys.new_zeros(self._slots, heads, size, self._columns)
            self._values[layer_idx] = values.new_zeros(self._slots, heads, self._columns, values.shape[-1])
        all_keys, all_values = self._keys[layer_idx], self._values[layer_idx]
        if self._mode == "prefill":
            return self._store_prompts(keys, values, layer_idx)
        all_keys[self._row_ids, :, :, self._at] = keys[:, :, 0]
        all_values[self._row_ids, :, self._at] = values[:, :, 0]
        count = len(self._row_ids)
        return all_keys[:count, :, :, : self._visible].transpose(2, 3), all_values[:count, :, : self._visible]

    def _store_prompts(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        all_keys, all_values = self._keys[layer_idx], self._values[layer_idx]
        start = self._num_prefix
        if self._rows is None:
            self._prefix[layer_idx] = (keys, values)
            all_keys[..., :start] = keys.transpose(2, 3)
            all_values[:, :, :start] = values
            return keys, values
        offset = 0
        for row, length in zip(self._rows, self._lengths, strict=True):
            all_keys[row, :, :, start : start + length] = keys[0, :, offset : offset + length].transpose(1, 2)
            all_values[row, :, start : start + length] = values[0, :, offset : offset + length]
            offset += length
        if not start:
            return keys, values
        prefix_keys, prefix_values = self._prefix[layer_idx]
        return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Return 0: positions are always given explicitly."""
        return 0


class SlotAttention:
    """Attention for ``SlotCache``: plain products a group of rows for one query, fused attention for prompts."""

    NAME: ClassVar[str] = "vsdbench_slots"

    def __init__(self) -> None:
        self.groups: list[tuple[int, int, int]] = []
        """First row, end row and columns to read, for each group of rows of a decode step."""
        self.spans: list[tuple[int, int]] = []
        """Start and end of each packed prompt of a prefill; empty in a decode step."""

    def register(self) -> str:
        """Make this instance known to transformers under ``NAME`` and return the name."""
        AttentionInterface.register(self.NAME, self)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)
        return self.NAME

    def __call__(  # noqa: PLR0917 - the order is transformers'
        self,
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        dropout: float = 0.0,  # noqa: ARG002 - the name is transformers'
        scaling: float | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Return ``[B, q, H, D]`` outputs (and no weights).

        Args:
            query: ``[B, H, q, D]``; q is 1 in a decode step, and B is 1 in a prefill.
            key: ``[B, G, K, D]``, in a decode step a view of transposed storage.
            value: ``[B, G, K, D]``.
            attention_mask: ``[B, 1, q, K]`` additive.
            dropout: Not used: models run in evaluation mode.
            scaling: Factor of the scores; None means 1 / sqrt(D).
        """
        batch, heads, num_queries, size = query.shape
        shared = heads // key.shape[1]
        factor = size**-0.5 if scaling is None else scaling
        if self.spans:
            prompts = [
                _attend_prompt(query, key, value, attention_mask, span=span, factor=factor) for span in self.spans
            ]
            return torch.cat(prompts, dim=1), None
        outputs = []
        stacked = query.reshape(batch, key.shape[1], shared * num_queries, size)
        for first, end, columns in self.groups:
            rows = slice(first, end)
            mask = attention_mask[rows, :, :, :columns].expand(-1, key.shape[1], -1, -1).flatten(0, 1)
            by_key = key[rows, :, :columns].flatten(0, 1).transpose(1, 2)
            scores = torch.baddbmm(mask, stacked[rows].flatten(0, 1), by_key, alpha=factor)
            outputs.append(torch.bmm(scores.softmax(dim=-1), value[rows, :, :columns].flatten(0, 1)))
        output = torch.cat(outputs).reshape(batch, 1, heads, -1)
        return output, None


def _attend_prompt(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, span: tuple[int, int], factor: float
) -> Tensor:
    """Return ``[1, q, H, D]`` for one packed prompt, which attends to the shared prefix and to itself.

    Args:
        query: ``[1, H, T, D]`` of all packed prompts.
        key: ``[1, G, P + T, D]``.
        value: ``[1, G, P + T, D]``.
        mask: ``[1, 1, T, P + T]`` additive.
        span: Start and end of the prompt in T.
        factor: Of the scores.
    """
    start, end = span
    prefix = key.shape[2] - query.shape[2]
    own = slice(prefix + start, prefix + end)

    def reach(packed: Tensor) -> Tensor:
        return torch.cat([packed[..., :prefix, :], packed[..., own, :]], dim=-2)

    heads, groups = query.shape[1], key.shape[1]
    asked = query[:, :, start:end].reshape(1, groups, -1, query.shape[3])
    rows = mask[:, :, start:end]
    rows = torch.cat([rows[..., :prefix], rows[..., own]], dim=-1).repeat(1, 1, heads // groups, 1)
    output = scaled_dot_product_attention(asked, reach(key), reach(value), attn_mask=rows, scale=factor)
    return output.reshape(1, heads, end - start, -1).transpose(1, 2)
