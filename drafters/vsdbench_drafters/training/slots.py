"""The cache and the attention of slot-wise decoding: rows of different lengths in one preallocated buffer.

Rows lie in groups of about equal length, and a group is dense: as many columns a row as its longest one needs until
rows are arranged anew. Batched products on a CPU copy an operand that is not dense, and a group that is a slice of a
wider buffer would be copied whole in every layer of every step.

Shape legend: S slots, n rows in use, T packed prompt tokens, P prefix tokens, C columns of a row, H query heads, G key
and value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_FUSED_FROM = 1024
"""Prompt tokens from which scores are not held in memory."""


class _Places:
    """Places in the storage, each a row and a column of it, with the heads' vectors there computed when asked for."""

    def __init__(self, before: Tensor, columns: Tensor, column: Tensor) -> None:
        """Take ``[m]`` columns of other rows before the place's row, columns of that row, and the place's own."""
        self._before, self._columns, self._column = before, columns, column
        self._known: dict[int, Tensor] = {}

    def vectors(self, heads: int) -> Tensor:
        """Return ``[m * G]`` indices into the storage of a layer, the heads of a place together."""
        if heads not in self._known:
            head = torch.arange(heads, device=self._before.device)
            first = self._before[:, None] * heads + self._column[:, None]
            self._known[heads] = (first + head * self._columns[:, None]).flatten()
        return self._known[heads]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows ``first`` to ``end`` with ``columns`` columns each; ``offset`` columns of other rows lie before them."""

    first: int
    end: int
    columns: int
    offset: int


class SlotCache:
    """Keys and values as ``[S * C * G, D]`` a layer, with the two calls that models make of a cache.

    Vector ``c`` of head ``g`` of a row is the ``c``-th of a run of ``group.columns`` vectors; the runs of a row's heads
    follow one another, and so do the rows of a group. A decode step writes one column a row, at the row's own length.
    A prefill writes the packed prompts into their rows and lets them attend to the shared prefix and to themselves.
    """

    def __init__(self, slots: int, columns: int, prefix: int, device: torch.device) -> None:
        self.size = slots * columns
        self._num_prefix = prefix
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._whole: tuple[Tensor, Tensor] | None = None
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self._before = torch.zeros(slots, dtype=torch.int64, device=device)  # columns of other rows before each row
        self._columns = torch.zeros(slots, dtype=torch.int64, device=device)
        self._writes_prefix = self._decodes = self._gathers = False
        self.groups: list[Group] = []
        self.reset()

    def reset(self) -> None:
        """Forget the prefix; rows need no clearing, since nothing beyond a row's length is attended to."""
        self.has_prefix = False

    # ---- what the generator says before a forward ----

    def arrange(self, order: Tensor, lengths: Tensor, groups: list[Group]) -> None:
        """Move row ``order[i]`` to row ``i`` of new groups, with its first ``lengths[i]`` columns (or all it has).

        Args:
            order: ``[n]`` rows of the groups so far.
            lengths: ``[n]``.
            groups: All rows, in order and without gaps.
        """
        lengths = torch.minimum(lengths, self._columns[order])
        rows, columns = _enumerate(lengths)
        source = self._places(order[rows], columns)
        self.groups = groups
        for group in groups:
            mine = slice(group.first, group.end)
            self._columns[mine] = group.columns
            self._before[mine] = (
                torch.arange(group.end - group.first, device=order.device) * group.columns + group.offset
            )
        target = self._places(rows, columns)
        for pool in (*self._keys.values(), *self._values.values()):
            heads = len(pool) // self.size
            pool.index_copy_(0, target.vectors(heads), pool.index_select(0, source.vectors(heads)))

    def begin_decode(self, positions: Tensor, *, gathers: bool) -> None:
        """Expect one token a row, to be written at ``positions`` ``[n]``.

        Args:
            positions: Columns filled so far.
            gathers: The model's own attention wants ``[n, G, K, D]``; else it is ``SlotAttention`` that will ask.
        """
        self._decodes, self._writes_prefix, self._gathers = True, False, gathers
        rows = torch.arange(len(positions), device=positions.device)
        self._target = self._places(rows, positions)
        if gathers:
            reach = torch.arange(max(group.columns for group in self.groups), device=positions.device)
            columns = torch.minimum(reach, self._columns[rows, None] - 1).flatten()
            self._all = self._places(rows.repeat_interleave(len(reach)), columns)

    def begin_prefill(self, rows: Tensor | None, lengths: Tensor) -> None:
        """Expect packed prompts of ``lengths`` tokens for ``rows`` (None: the shared prefix, for every row)."""
        self._decodes, self._writes_prefix, self._gathers = False, rows is None, False
        if rows is not None:
            owner, columns = _enumerate(lengths)
            self._target = self._places(rows[owner], columns + self._num_prefix)

    def end_prefill(self) -> None:
        """Note that the prefix is there, if that is what was prefilled."""
        self.has_prefix = self.has_prefix or self._writes_prefix

    def put_prefix(self, rows: Tensor) -> None:
        """Write the shared prefix into these rows."""
        owner, columns = _enumerate(torch.full_like(rows, self._num_prefix))
        self._target = self._places(rows[owner], columns)
        for layer, (keys, values) in self._prefix.items():
            self._write(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)

    def adopt(self, row: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fill the first columns of a row with keys and values ``[1, G, L, D]`` that were computed elsewhere.

        Args:
            row: ``[1]``.
            layers: Of every layer.
        """
        columns = torch.arange(layers[0][0].shape[2], device=row.device)
        self._target = self._places(row.expand(len(columns)), columns)
        for layer, (keys, values) in enumerate(layers):
            self._write(keys, values, layer)

    def rows_of(self, row: int, length: int) -> Tensor:
        """Return ``[layers, 2, G, length, D]``: keys and values of a row's first columns, of layers that are alike."""
        columns = torch.arange(length, device=self._before.device)
        places = self._places(torch.full_like(columns, row), columns)
        found = []
        for pair in zip(self._keys.values(), self._values.values(), strict=True):
            for pool in pair:
                heads = len(pool) // self.size
                vectors = pool.index_select(0, places.vectors(heads))
                found.append(vectors.view(length, heads, -1).transpose(0, 1))
        stacked = torch.stack(found)
        return stacked.view(-1, 2, *stacked.shape[1:])

    def storage(self, num_layers: int, shape: tuple[int, int], like: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return keys and values of all layers ``[layers, S * C * G, D]``, and ``[2, S]`` where rows lie in a layer.

        That is the first head's first element, and the elements from one head to the next.

        Args:
            num_layers: All of which have the same heads.
            shape: Their number G, and their width D.
            like: Of the cache's dtype.
        """
        heads, size = shape
        if self._whole is None:
            keys = like.new_zeros(num_layers, self.size * heads, size)
            self._whole = keys, torch.zeros_like(keys)
            for pools, whole in zip((self._keys, self._values), self._whole, strict=True):
                for layer, part in enumerate(whole):
                    if layer in pools:
                        part.copy_(pools[layer])
                    pools[layer] = part
        return self._whole, torch.stack([self._before * heads, self._columns]) * size

    # ---- what the model calls ----

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``[B, G, q, D]``; return all that the queries may attend to.

        That is ``[B, G, K, D]``; in a decode step with ``SlotAttention`` the whole storage ``[S * C * G, D]``.
        """
        if self._writes_prefix:
            self._prefix[layer_idx] = (keys, values)
            return keys, values
        self._write(keys, values, layer_idx)
        if self._gathers:
            return self._gather(self._keys[layer_idx]), self._gather(self._values[layer_idx])
        if self._decodes:
            return self._keys[layer_idx], self._values[layer_idx]
        if not self._num_prefix:
            return keys, values
        prefix_keys, prefix_values = self._prefix[layer_idx]
        return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Return 0: positions are always given explicitly."""
        return 0

    # ---- storage ----

    def _places(self, rows: Tensor, columns: Tensor) -> _Places:
        return _Places(self._before[rows], self._columns[rows], columns)

    def _write(self, keys: Tensor, values: Tensor, layer: int) -> None:
        for pools, new in ((self._keys, keys), (self._values, values)):
            heads, size = new.shape[1], new.shape[3]
            if layer not in pools:
                pools[layer] = new.new_zeros(self.size * heads, size)
            pools[layer].index_copy_(0, self._target.vectors(heads), new.transpose(1, 2).reshape(-1, size))

    def _gather(self, pool: Tensor) -> Tensor:
        heads = len(pool) // self.size
        found = pool.index_select(0, self._all.vectors(heads))
        return found.view(self.groups[-1].end, -1, heads, found.shape[-1]).transpose(1, 2)


def _enumerate(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return owners and positions of packed sequences.

    >>> _enumerate(torch.tensor([2, 0, 1]))
    (tensor([0, 0, 2]), tensor([0, 1, 0]))
    """
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner), device=lengths.device) - starts[owner]


class SlotAttention:
    """Attention for ``SlotCache``: plain products, one group of rows or one prompt at a time."""

    NAME: ClassVar[str] = "vsdbench_slots"

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self.spans: list[tuple[int, int]] = []
        """Start and end of each packed prompt of a prefill; empty in a decode step."""

    def register(self) -> str:
        """Make this instance known to transformers under ``NAME`` and return the name."""
        AttentionInterface.register(self.NAME, self)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)
        return self.NAME

    def __call__(  # noqa: PLR0917 - the order is transformers'
        self,
        _module: nn.Module | None,
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
            key: ``[B, G, K, D]``; in a decode step the storage of the cache.
            value: As ``key``.
            attention_mask: ``[B, 1, q, K]`` additive.
            dropout: Not used: models run in evaluation mode.
            scaling: Factor of the scores; None means 1 / sqrt(D).
        """
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.spans:
            prompts = [
                _attend_prompt(query, key, value, attention_mask, span=span, factor=factor) for span in self.spans
            ]
            return torch.cat(prompts, dim=1), None
        batch, heads, size = query.shape[0], query.shape[1], query.shape[3]
        per_head = len(key) // self._cache.size
        stacked = query.reshape(batch * per_head, heads // per_head, size)
        outputs = []
        for group in self._cache.groups:
            rows = group.end - group.first
            run = slice(group.offset * per_head, (group.offset + rows * group.columns) * per_head)
            mask = attention_mask[group.first : group.end, :, :, : group.columns]
            outputs.append(
                _attend(
                    stacked[group.first * per_head : group.end * per_head],
                    key[run].view(rows * per_head, group.columns, -1),
                    value[run].view(rows * per_head, group.columns, -1),
                    mask.expand(-1, per_head, -1, -1).flatten(0, 1),
                    factor,
                )
            )
        return torch.cat(outputs).reshape(batch, 1, heads, -1), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, factor: float) -> Tensor:
    """Return ``[B, q, D]`` from ``[B, q, D]`` queries, ``[B, K, D]`` keys and values, ``[B, 1 or q, K]`` masks."""
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=factor)
    return torch.bmm(scores.softmax(dim=-1), value)


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
        if not prefix:
            return packed[..., own, :]
        return torch.cat([packed[..., :prefix, :], packed[..., own, :]], dim=-2)

    heads, groups = query.shape[1], key.shape[1]
    asked = query[:, :, start:end].reshape(1, groups, -1, query.shape[3])
    rows = mask[:, :, start:end]
    rows = torch.cat([rows[..., :prefix], rows[..., own]], dim=-1).repeat(1, 1, heads // groups, 1)
    if end - start < _FUSED_FROM:
        output = _attend(asked[0], reach(key)[0], reach(value)[0], rows[0].expand(groups, -1, -1), factor)
    else:
        output = scaled_dot_product_attention(asked, reach(key), reach(value), attn_mask=rows, scale=factor)
    return output.reshape(1, heads, end - start, -1).transpose(1, 2)
