"""Fast batched decoding of many prompts, because drafters learn from the target's own answers and those cost the most.

A fixed number of slots decodes in step. A slot whose answer ends is given the next prompt at once, so no row idles
until the longest answer of a batch is done. The cache is allocated once. Rows are kept sorted by length in groups,
each dense and only as wide as its longest row needs; one query a row is then two batched products a group, as fast as
fused attention or faster (``docs/log.md``). Native kernels read rows as they lie, so with these they stay where they
are. Prompts are prefilled packed, without padding, their shared prefix once.

The model is the stock transformers one, or the target's fused layers in its place. Prompts with images are read by the
target, and their keys and values take their places in the rows.

Shape legend: S slots, n rows in use, P prefix tokens, C cache columns, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsdbench.models.fused import FusedLayers
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench.models.masks import Masks
from vsdbench.models.native_layers import sequence_rows
from vsdbench.models.reading import packs
from vsdbench_drafters.training.answers import Request, Response
from vsdbench_drafters.training.features import Features
from vsdbench_drafters.training.kept import Keeps, KeptStates
from vsdbench_drafters.training.sampling import pick_tokens
from vsdbench_drafters.training.slot_rows import Rows
from vsdbench_drafters.training.slots import Group, SlotAttention, SlotCache

_PACK_TOKENS = 512
_ARRANGE_EVERY = 32
_COLUMNS_UNIT = 16

Layers = Sequence[tuple[Tensor, Tensor]]
"""``[G, L, D]`` keys and values of every layer."""
Place = tuple[Tensor, Tensor]
"""``[T]`` slots and columns, where the states of T tokens are kept."""
Look = Callable[[Sequence[ImagePrompt]], Iterable[tuple[Layers, int]]]
"""Reads prompts with images: keys and values of each, and its position offset."""


def _up(columns: int) -> int:
    return -(-columns // _COLUMNS_UNIT) * _COLUMNS_UNIT


class SlotGenerator:
    """Answers a stream of prompts with one model.

    Greedy answers in float32 equal one-by-one decoding up to ties; in bfloat16 the batch's composition changes the
    rounding of the products, so an answer may differ between runs that schedule it differently. The sampling noise
    never does: token ``t`` of prompt ``i`` uses the ``t``-th uniform number of the stream keyed by ``(seed, i)``.

    Args:
        model: Any decoder-only transformers model, in evaluation mode.
        eos_ids: Tokens that end an answer.
        slots: S, the rows decoded in step.
        max_prompt_tokens: Longest prompt accepted, shared prefix included.
        max_new_tokens: Longest answer.
        seed: Keys the sampling noise.
        shared_prefix: Tokens that every prompt begins with (may be empty).
        loop_repeats: Stop an answer after this many exact repetitions of its tail; 0 never stops it.
        look: Reads prompts with images; there may be no shared prefix then.
        fused: What may run in the place of the model's own layers (``Target.fused_layers``).
        keeps: Answers come with their features; for texts, and with ``fused`` only.

    Attributes:
        num_made: Response tokens decoded so far, those of unfinished answers included.
        num_under_way: Those of unfinished answers.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        *,
        eos_ids: Iterable[int],
        slots: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        seed: int = 0,
        shared_prefix: Sequence[int] = (),
        loop_repeats: int = 0,
        look: Look | None = None,
        fused: FusedLayers | None = None,
        keeps: Keeps | None = None,
    ) -> None:
        assert keeps is None or (fused is not None and look is None)
        self._model = model
        self._look = look
        self._fused = fused
        self._eos = np.array(sorted(eos_ids), dtype=np.int64)
        self._slots = slots
        self._limits = (max_prompt_tokens, max_new_tokens)
        self._seed = seed
        self._prefix = list(shared_prefix)
        self._loop_repeats = loop_repeats
        self._refill_at = max(1, slots // 16)
        self._group = max(4, slots // 4)
        self._device = model.device
        config, name = model.config.get_text_config(), type(model).__name__
        self._masks = Masks(config, groups=1, name=name, dtype=model.dtype, device=self._device)
        self._columns = _up(max_prompt_tokens + max_new_tokens)
        self._cache = SlotCache(slots, self._columns, len(self._prefix), self._device)
        native = None if fused is None or self._masks.slides else fused.native
        self._native = native if native is not None and native.takes(slots) else None
        self._pack = _PACK_TOKENS if self._native is None else min(_PACK_TOKENS, self._native.most_rows)
        self._attention = SlotAttention(self._cache)
        self._keeps = keeps
        self._kept = None if keeps is None else KeptStates(keeps.layers, slots, self._columns)
        self._age = 0  # steps since rows were arranged
        self.num_made = self.num_under_way = 0

    def stream(self, requests: Iterable[Request], *, tick: Callable[[], object] = lambda: None) -> Iterator[Response]:
        """Yield the answers in the order in which they end, drawing requests as slots become free.

        ``tick`` is called after every step.

        Raises:
            ValueError: A prompt is too long, empty, or does not begin with the shared prefix.
        """
        queue = iter(requests)
        rows = Rows(self._slots, self._limits[1])
        in_use, exhausted = self._slots, False
        self._cache.reset()
        with torch.inference_mode():
            self._arrange(rows, in_use)
        while True:
            with self._own_attention() as own, torch.inference_mode():
                num_active = int(rows.active.sum())
                if not exhausted and (in_use - num_active >= self._refill_at or not num_active):
                    exhausted = self._refill(rows, queue)
                    num_active = int(rows.active.sum())
                if not num_active:
                    return
                if exhausted and num_active <= 0.75 * in_use:
                    in_use = num_active
                    self._arrange(rows, in_use)
                elif self._age >= _ARRANGE_EVERY and self._native is None:
                    self._arrange(rows, in_use)
                self._age += 1
                finished = self._step(rows, in_use, own=own)
            tick()
            yield from finished

    # ---- one step ----

    def _step(self, rows: Rows, in_use: int, *, own: bool) -> list[Response]:
        """Decode one token in every row in use; return the answers that ended with it."""
        tokens, offsets = torch.from_numpy(rows.token[:in_use].copy()), torch.from_numpy(rows.offset[:in_use].copy())
        positions = torch.from_numpy(rows.length[:in_use].copy()).to(self._device)
        place = torch.from_numpy(rows.slot[:in_use].copy()).to(self._device), positions
        if self._native is not None:
            every = torch.arange(in_use)
            last = self._run_native(tokens, positions + offsets, every, torch.ones_like(every), positions, place)
            logits = self._model.get_output_embeddings()(last)
        else:
            self._cache.begin_decode(positions, gathers=not own)
            keys = torch.arange(max(group.columns for group in self._cache.groups), device=self._device)
            visible = keys[None, None] <= positions[:, None, None]
            offsets = offsets.to(self._device)
            logits = self._forward(tokens[:, None], positions[:, None], keys, visible, place, offsets[:, None])[:, -1]
        at = rows.count[:in_use]
        uniforms = rows.noise[np.arange(in_use), np.minimum(at, rows.noise.shape[1] - 1)]
        picked = pick_tokens(logits, torch.from_numpy(rows.temperature[:in_use]), torch.from_numpy(uniforms))
        return self._advance(rows, picked.cpu().numpy())

    def _advance(self, rows: Rows, token: NDArray[np.int64]) -> list[Response]:
        """Book one new token a row; free the rows whose answer has ended and return those answers."""
        had_ended = [row for row in np.flatnonzero(rows.active[: len(token)]) if rows.stop[row] is not None]
        before = int(rows.count.sum())
        rows.book(token, eos=self._eos, loop_repeats=self._loop_repeats)
        self.num_made += int(rows.count.sum()) - before
        # Features are of the last token, too, so where they are kept it is fed before the row is free.
        done = had_ended if self._kept is not None else np.flatnonzero(rows.stop != None)  # noqa: E711 - of each
        finished = [self._finish(rows, row) for row in done]
        self.num_under_way = int(rows.count.sum())
        return finished

    def _finish(self, rows: Rows, row: np.int64) -> Response:
        """Free a row whose answer has ended and return the answer."""
        features = None
        if self._kept is not None and self._keeps is not None:
            length = int(rows.length[row])
            keys = (self._cache.rows_of(int(row), length).cpu(),) if self._keeps.keys else ()
            features = Features(self._kept.take(int(rows.slot[row]), length).cpu(), keys)
        response = Response(rows.requests[row], rows.output[row, : rows.count[row]].copy(), rows.stop[row], features)
        rows.free(row)
        return response

    def _forward(  # noqa: PLR0917 - all of the same tokens
        self,
        ids: Tensor,
        positions: Tensor,
        key_positions: Tensor,
        visible: Tensor,
        place: Place,
        offsets: Tensor | int = 0,
    ) -> Tensor:
        """Return the logits ``[B, 1, V]`` of the last column of ``ids`` ``[B, q]``.

        Args:
            ids: Token ids.
            positions: ``[B, q]``.
            key_positions: ``[K]`` positions of the cached and new keys.
            visible: ``[B or 1, q, K]`` bool, without the sliding window.
            place: Of all tokens.
            offsets: ``[B, 1]``, added to what the model's position embedding is told.
        """
        masks = self._masks.of(positions, visible, key_positions)
        ids, positions = ids.to(self._device), positions + offsets
        if self._fused is not None:
            return self._run_fused(self._fused, ids, positions, masks, place)
        output = self._model(
            input_ids=ids,
            attention_mask=masks,
            position_ids=positions,
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits

    def _run_fused(
        self, layers: FusedLayers, ids: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor], place: Place
    ) -> Tensor:
        """Return the logits ``[B, 1, V]`` of the last column; the layers take the columns of all rows as one matrix."""
        batch, columns = ids.shape

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            asked, new_keys, new_values = (
                part.view(batch, columns, *part.shape[1:]).transpose(1, 2) for part in (queries, keys, values)
            )
            keys, values = self._cache.update(new_keys, new_values, index)
            mask = layers.mask_of(index, masks)
            output, _ = self._attention(None, asked, keys, values, mask, scaling=layers.scaling)
            return output.reshape(batch * columns, -1)

        embedded = self._model.get_input_embeddings()(ids.flatten())
        entering = {} if self._kept is None else self._kept.wanted()
        last = layers.run(embedded, positions.flatten(), attend, entering)
        if self._kept is not None:
            self._kept.put(place, entering, last)
        logits: Tensor = self._model.get_output_embeddings()(last.view(batch, columns, -1)[:, -1:])
        return logits

    def _run_native(  # noqa: PLR0917 - all of the same tokens
        self, ids: Tensor, positions: Tensor, rows: Tensor, counts: Tensor, lengths: Tensor, place: Place
    ) -> Tensor:
        """Return the ``[T, H]`` last normed states of new tokens of some rows, which see what is before them there.

        Args:
            ids: ``[T]``, row after row.
            positions: ``[T]``, as the model's position embedding is told them.
            rows: ``[B]`` of the cache.
            counts: ``[B]`` tokens of each.
            lengths: ``[B]`` columns that each has so far.
            place: Of all tokens.
        """
        assert self._fused is not None
        embedded = self._model.get_input_embeddings()(ids)
        storage, places = self._cache.storage(self._fused.num_layers, self._fused.shape, embedded)
        lines = sequence_rows(counts, lengths, places[0, rows], places[1, rows], rows)
        entering = {} if self._kept is None else self._kept.wanted()
        last = self._fused.run_native(embedded, positions, None, storage, lines, kept=entering)
        if self._kept is not None:
            self._kept.put(place, entering, last)
        return last

    # ---- filling and ordering slots ----

    def _refill(self, rows: Rows, queue: Iterator[Request]) -> bool:
        """Prefill as many requests as there are free rows; return whether the queue has run out."""
        if self._prefix and not self._cache.has_prefix:
            self._prefill([self._prefix], None, torch.tensor([self._slots]))
        free = np.flatnonzero(~rows.active)
        taken = [request for _, request in zip(free, queue, strict=False)]
        for request in taken:
            self._check(request)
        # Wide rows lie behind narrow ones, so the longest prompts go to the last rows.
        taken_by_length = sorted(taken, key=lambda request: len(request.prompt_ids))
        for row, request in zip(free[len(free) - len(taken) :], taken_by_length, strict=True):
            rows.seat(row, request, self._seed)
        if any(group.columns < self._needed(rows, group, _ARRANGE_EVERY - self._age) for group in self._cache.groups):
            self._arrange(rows, self._slots)
        filled = np.flatnonzero(rows.fresh)
        rows.fresh[filled] = False
        if self._prefix and len(filled):
            self._cache.put_prefix(torch.from_numpy(filled).to(self._device))
            if self._kept is not None:
                self._kept.copy_prefix(torch.from_numpy(rows.slot[filled]), len(self._prefix))
        seen = np.array([isinstance(rows.requests[row].prompt_ids, ImagePrompt) for row in filled], dtype=bool)
        self._read_images(rows, filled[seen])
        filled = filled[~seen]
        suffixes = [list(rows.requests[row].prompt_ids[len(self._prefix) : -1]) for row in filled]
        for pack in packs([len(suffix) for suffix in suffixes], self._pack):
            slots = torch.from_numpy(rows.slot[filled[pack]])
            self._prefill([suffixes[position] for position in pack], filled[pack], slots)
        return len(taken) < len(free)

    def _check(self, request: Request) -> None:
        ids, prefix = request.prompt_ids, self._prefix
        if not 0 < len(ids) <= self._limits[0]:
            raise ValueError(f"prompt {request.index} has {len(ids)} tokens, where 1 to {self._limits[0]} are allowed")
        if len(ids) <= len(prefix) or list(ids)[: len(prefix)] != prefix:
            raise ValueError(f"prompt {request.index} does not begin with the shared prefix of {len(prefix)} tokens")

    def _read_images(self, rows: Rows, filled: NDArray[np.int64]) -> None:
        """Let the target read the prompts of these rows, and keep their keys and values."""
        if not len(filled):
            return
        assert self._look is not None
        own = self._model.config._attn_implementation  # noqa: SLF001 - transformers has no public getter
        self._model.set_attn_implementation(self._usual)
        read = self._look([rows.requests[row].prompt_ids for row in filled])
        for row, (layers, rows.offset[row]) in zip(filled, read, strict=True):
            # the last token is the first one that is decoded
            before = [(keys[None, :, :-1], values[None, :, :-1]) for keys, values in layers]
            self._cache.adopt(torch.tensor([row], device=self._device), before)
        self._model.set_attn_implementation(own)

    def _prefill(self, sequences: Sequence[Sequence[int]], filled: NDArray[np.int64] | None, slots: Tensor) -> None:
        """Put the keys and values of the sequences, packed end to end, into their rows (None: into the prefix)."""
        lengths = [len(sequence) for sequence in sequences]
        start = 0 if filled is None else len(self._prefix)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self._device)
        positions = torch.cat([torch.arange(start, start + length) for length in lengths]).to(self._device)
        place = slots.to(self._device)[owner], positions
        if filled is not None and self._native is not None and self._native.takes(sum(lengths)):
            ids = torch.tensor([token for sequence in sequences for token in sequence])
            counts, before = torch.tensor(lengths), torch.full((len(lengths),), start)
            self._run_native(ids, positions, torch.from_numpy(filled), counts, before, place)
            return
        visible = (owner[:, None] == owner[None]) & (positions[:, None] >= positions[None])
        visible = torch.cat([visible.new_ones(len(owner), start), visible], dim=1)
        key_positions = torch.cat([torch.arange(start, device=self._device), positions])
        ids = torch.tensor([[token for sequence in sequences for token in sequence]])
        ends = np.cumsum(lengths).tolist()
        self._attention.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        rows = None if filled is None else torch.from_numpy(filled).to(self._device)
        self._cache.begin_prefill(rows, torch.tensor(lengths, device=self._device))
        self._forward(ids, positions[None], key_positions, visible[None], place)
        self._cache.end_prefill()
        self._attention.spans = []

    def _arrange(self, rows: Rows, in_use: int) -> None:
        """Order the rows by length, free ones last, in dense groups that have room for the steps until the next time.

        Args:
            rows: All of them.
            in_use: Rows to keep.
        """
        order = np.lexsort((rows.length, ~rows.active))
        rows.permute(order)
        groups: list[Group] = []
        offset = 0
        for first in range(0, in_use, self._group):
            end = min(first + self._group, in_use)
            group = Group(first, end, 0, offset)
            needed = self._columns if self._native is not None else _up(self._needed(rows, group, _ARRANGE_EVERY))
            group = replace(group, columns=min(needed, self._columns))
            groups.append(group)
            offset += (end - first) * group.columns
        kept = torch.from_numpy(order[:in_use]).to(self._device)
        self._cache.arrange(kept, torch.from_numpy(rows.length[:in_use]).to(self._device), groups)
        self._age = 0

    def _needed(self, rows: Rows, group: Group, steps: int) -> int:
        """Return the columns that the longest row of a group fills in so many steps."""
        return min(int(rows.length[group.first : group.end].max()) + steps, self._columns)

    @contextmanager
    def _own_attention(self) -> Iterator[bool]:
        """Run the model with ``SlotAttention``, unless it needs its own eager one (soft-capping, sinks).

        Yields:
            Whether it runs with ours.
        """
        config = self._model.config
        before = self._usual = config._attn_implementation  # noqa: SLF001 - transformers has no public getter
        if before == "eager":
            yield False
            return
        if before != SlotAttention.NAME:
            self._model.set_attn_implementation(self._attention.register())
        try:
            yield True
        finally:
            self._model.set_attn_implementation(before)
