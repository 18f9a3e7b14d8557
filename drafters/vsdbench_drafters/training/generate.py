"""Fast batched decoding of many prompts, because drafters learn from the target's own answers and those cost the most.

A fixed number of slots decodes in step. A slot whose answer ends is given the next prompt at once, so no row idles
until the longest answer of a batch is done. The cache is allocated once, with keys stored transposed: the score
product of one query then reads memory in order, which on CPUs is several times faster than a fused attention kernel
made for long queries. Prompts are prefilled packed end to end, without padding, and a prefix that all prompts share
(the chat template's system turn) is computed once. Rows are kept sorted by length, and attention reads each group of
rows only as far as its longest one.

The model is the stock transformers one: it gets a cache object, explicit masks and positions.

Shape legend: S slots, n rows in use, P prefix tokens, C cache columns, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench_drafters.training.sampling import pick_tokens
from vsdbench_drafters.training.slots import SlotAttention, SlotCache

StopReason = Literal["eos", "length", "loop"]

_LOOP_CHECK_EVERY = 16
_LOOP_MAX_PERIOD = 48
_LOOP_MIN_TOKENS = 48
_PACK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be answered.

    Attributes:
        index: The caller's number for it; with the seed it keys the sampling noise.
        prompt_ids: The rendered prompt, the shared prefix included.
        temperature: 0 for greedy.
    """

    index: int
    prompt_ids: Sequence[int]
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; ``response_ids`` is ``[n]`` int32 and ends with the EOS token where ``stop_reason`` is ``eos``."""

    request: Request
    response_ids: NDArray[np.int32]
    stop_reason: StopReason


def ends_in_loop(tokens: NDArray[np.int32], repeats: int) -> bool:
    """Return whether the tokens end in ``repeats`` exact repetitions of a period of up to 48 tokens.

    Short periods must fill at least 48 tokens, so that a row of dashes or of digits is not taken for a loop.

    >>> ends_in_loop(np.tile(np.arange(20, dtype=np.int32), 3), 3)
    True
    >>> ends_in_loop(np.arange(60, dtype=np.int32), 3)
    False
    """
    for period in range(1, _LOOP_MAX_PERIOD + 1):
        span = max(period * repeats, _LOOP_MIN_TOKENS)
        if span > len(tokens):
            continue
        tail = tokens[-span:]
        if tail[-1] == tail[-1 - period] and np.array_equal(tail[period:], tail[:-period]):
            return True
    return False


def _packs(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return positions of the sequences that are not empty, in packs of up to 512 tokens (or one longer sequence)."""
    packs: list[list[int]] = []
    tokens = _PACK_TOKENS
    for position, sequence in enumerate(sequences):
        if not sequence:
            continue
        if tokens + len(sequence) > _PACK_TOKENS:
            packs.append([])
            tokens = 0
        packs[-1].append(position)
        tokens += len(sequence)
    return packs


class _Rows:
    """What is known on the host about every slot; row ``i`` of each array is the slot that lies in cache row ``i``."""

    def __init__(self, slots: int, max_new_tokens: int) -> None:
        self.requests: NDArray[np.object_] = np.full(slots, None, dtype=object)
        self.active = np.zeros(slots, dtype=bool)
        self.length = np.zeros(slots, dtype=np.int64)  # columns of the cache that are filled
        self.count = np.zeros(slots, dtype=np.int64)  # response tokens so far
        self.token = np.zeros(slots, dtype=np.int64)  # fed in the next step
        self.temperature = np.zeros(slots, dtype=np.float32)
        self.output = np.zeros((slots, max_new_tokens), dtype=np.int32)
        self.noise = np.zeros((slots, max_new_tokens), dtype=np.float64)

    def permute(self, order: NDArray[np.int64]) -> None:
        for name, array in vars(self).items():
            setattr(self, name, array[order])


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
    ) -> None:
        self._model = model
        self._eos = np.array(sorted(eos_ids), dtype=np.int64)
        self._slots = slots
        self._limits = (max_prompt_tokens, max_new_tokens)
        self._seed = seed
        self._prefix = list(shared_prefix)
        self._loop_repeats = loop_repeats
        self._refill_at = max(1, slots // 16)
        self._group = max(4, slots // 8)
        self._resort_every = 32
        self._device, self._dtype = model.device, model.dtype
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        if kinds - {"full_attention", "sliding_attention"}:
            odd = min(kinds - {"full_attention", "sliding_attention"})
            raise ConfigError(
                f"The target has layers of type '{odd}', for which no static cache is written; use another."
            )
        self._window: int | None = getattr(config, "sliding_window", None)
        self._mixed = "sliding_attention" in kinds
        self._slides = self._window is not None and (self._mixed or not kinds)
        columns = -(-(max_prompt_tokens + max_new_tokens) // 32) * 32
        self._cache = SlotCache(slots, columns, len(self._prefix))
        self._attention = SlotAttention()

    def stream(self, requests: Iterable[Request]) -> Iterator[Response]:
        """Yield the answers in the order in which they end, drawing requests as slots become free.

        Raises:
            ValueError: A prompt is too long, empty, or does not begin with the shared prefix.
        """
        queue = iter(requests)
        rows = _Rows(self._slots, self._limits[1])
        in_use, step, exhausted = self._slots, 0, False
        self._cache.reset()
        while True:
            with self._own_attention(), torch.inference_mode():
                free = np.flatnonzero(~rows.active[:in_use])
                if not exhausted and (len(free) >= self._refill_at or not rows.active.any()):
                    exhausted = self._refill(rows, free, queue)
                if not rows.active.any():
                    return
                num_active = int(rows.active.sum())
                if step % self._resort_every == 0 or (exhausted and num_active <= 0.75 * in_use):
                    self._sort(rows)
                    in_use = num_active if exhausted else self._slots
                step += 1
                finished = self._step(rows, in_use)
            yield from finished

    # ---- one step ----

    def _step(self, rows: _Rows, in_use: int) -> list[Response]:
        """Decode one token in every row in use; return the answers that ended with it."""
        length = rows.length[:in_use]
        groups = [
            (start, min(start + self._group, in_use), -(-int(length[start : start + self._group].max() + 1) // 32) * 32)
            for start in range(0, in_use, self._group)
        ]
        self._attention.groups = groups
        columns = max(bound for _, _, bound in groups)
        positions = torch.from_numpy(length.copy()).to(self._device)
        self._cache.begin_decode(positions, columns)
        keys = torch.arange(columns, device=self._device)
        logits = self._forward(
            torch.from_numpy(rows.token[:in_use, None].copy()),
            positions[:, None],
            keys,
            keys[None, None] <= positions[:, None, None],
        )[:, -1]
        at = rows.count[:in_use]
        uniforms = rows.noise[np.arange(in_use), np.minimum(at, rows.noise.shape[1] - 1)]
        token = (
            pick_tokens(logits, torch.from_numpy(rows.temperature[:in_use]), torch.from_numpy(uniforms)).cpu().numpy()
        )
        return self._advance(rows, token)

    def _advance(self, rows: _Rows, token: NDArray[np.int64]) -> list[Response]:
        """Book one new token a row; free the rows whose answer has ended and return those answers."""
        live = np.flatnonzero(rows.active[: len(token)])
        rows.output[live, rows.count[live]] = token[live]
        rows.token[live] = token[live]
        rows.count[live] += 1
        rows.length[live] += 1
        at_eos = np.isin(token[live], self._eos)
        at_limit = rows.count[live] >= self._limits[1]
        in_loop = np.zeros(len(live), dtype=bool)
        if self._loop_repeats:
            for position in np.flatnonzero(rows.count[live] % _LOOP_CHECK_EVERY == 0):
                row = live[position]
                in_loop[position] = ends_in_loop(rows.output[row, : rows.count[row]], self._loop_repeats)
        finished = []
        for position in np.flatnonzero(at_eos | at_limit | in_loop):
            row = live[position]
            reason: StopReason = "eos" if at_eos[position] else "loop" if in_loop[position] else "length"
            finished.append(Response(rows.requests[row], rows.output[row, : rows.count[row]].copy(), reason))
            rows.active[row] = False
            rows.length[row] = rows.temperature[row] = rows.count[row] = 0
        return finished

    def _forward(self, ids: Tensor, positions: Tensor, key_positions: Tensor, visible: Tensor) -> Tensor:
        """Return the logits ``[B, 1, V]`` of the last column of ``ids`` ``[B, q]``.

        Args:
            ids: Token ids.
            positions: ``[B, q]``.
            key_positions: ``[K]`` positions of the cached and new keys.
            visible: ``[B or 1, q, K]`` bool, without the sliding window.
        """
        masks: Tensor | dict[str, Tensor]
        if self._slides:
            assert self._window is not None
            near = visible & (positions[..., None] - key_positions < self._window)
            masks = self._additive(near)
            if self._mixed:
                masks = {"full_attention": self._additive(visible), "sliding_attention": masks}
        else:
            masks = self._additive(visible)
        output = self._model(
            input_ids=ids.to(self._device),
            attention_mask=masks,
            position_ids=positions,
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits

    def _additive(self, visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~visible, torch.finfo(self._dtype).min)[:, None]

    # ---- filling and ordering slots ----

    def _refill(self, rows: _Rows, free: NDArray[np.int64], queue: Iterator[Request]) -> bool:
        """Prefill as many requests as there are free rows; return whether the queue has run out."""
        if self._prefix and not self._cache.has_prefix:
            self._prefill([self._prefix], None)
        taken: list[Request] = []
        for _, request in zip(free, queue, strict=False):
            self._check(request)
            taken.append(request)
        filled = free[: len(taken)]
        suffixes = [list(request.prompt_ids[len(self._prefix) : -1]) for request in taken]
        for pack in _packs(suffixes):
            self._prefill([suffixes[position] for position in pack], filled[pack])
        for row, request in zip(filled, taken, strict=True):
            rows.requests[row] = request
            rows.active[row] = True
            rows.length[row] = len(request.prompt_ids) - 1
            rows.count[row] = 0
            rows.token[row] = request.prompt_ids[-1]
            rows.temperature[row] = request.temperature
            if request.temperature > 0:
                key = np.array([self._seed, request.index], dtype=np.uint64)
                rows.noise[row] = np.random.Generator(np.random.Philox(key=key)).random(self._limits[1])
        return len(taken) < len(free)

    def _check(self, request: Request) -> None:
        ids, prefix = request.prompt_ids, self._prefix
        if not 0 < len(ids) <= self._limits[0]:
            msg = f"prompt {request.index} has {len(ids)} tokens, where 1 to {self._limits[0]} are allowed"
            raise ValueError(msg)
        if len(ids) <= len(prefix) or list(ids[: len(prefix)]) != prefix:
            msg = f"prompt {request.index} does not begin with the shared prefix of {len(prefix)} tokens"
            raise ValueError(msg)

    def _prefill(self, sequences: Sequence[Sequence[int]], filled: NDArray[np.int64] | None) -> None:
        """Put the keys and values of the sequences, packed end to end, into their rows (None: into the prefix)."""
        lengths = [len(sequence) for sequence in sequences]
        start = 0 if filled is None else len(self._prefix)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self._device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self._device) + start
        visible = (owner[:, None] == owner[None]) & (positions[:, None] >= positions[None])
        visible = torch.cat([visible.new_ones(len(owner), start), visible], dim=1)
        key_positions = torch.cat([torch.arange(start, device=self._device), positions])
        ids = torch.tensor([[token for sequence in sequences for token in sequence]])
        ends = np.cumsum(lengths).tolist()
        self._attention.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self._cache.begin_prefill(None if filled is None else filled.tolist(), lengths)
        self._forward(ids, positions[None], key_positions, visible[None])
        self._cache.end_prefill()
        self._attention.spans = []

    def _sort(self, rows: _Rows) -> None:
        """Order the rows by length, free ones last, so that groups of rows have about the same length."""
        order = np.lexsort((rows.length, ~rows.active))
        if not np.array_equal(order, np.arange(len(order))):
            self._cache.permute(torch.from_numpy(order).to(self._device), int(rows.length.max()) + 1)
            rows.permute(order)

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """Run the model with the attention of this file, unless it needs its own eager one (soft-capping, sinks)."""
        config = self._model.config
        before = config._attn_implementation  # noqa: SLF001 - transformers has no public getter
        if before == "eager":
            yield
            return
        if before != SlotAttention.NAME:
            self._model.set_attn_implementation(self._attention.register())
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)
