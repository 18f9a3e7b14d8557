"""What the drafter reads of the target: its features, computed per batch or kept in a file (``feature_files``).

For every token the target gives three hidden states and the last normed one, from which its distribution follows by
one product: 4 H numbers, in place of V logits. They are what decoding hands to drafters (``interfaces.TargetOutput``).
Cached, they take ``8 H`` bytes a token in bfloat16 (4.6 kB for H = 576) and save every later arm or epoch the target's
forward.

The same forward makes the keys and values of every layer. Kept, they spare objectives that ask about drafted tokens the
text before those, at 23 kB a token for the embedded target: a second file, made only where it is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench.models.branching import Branches, branch_states, branch_states_behind
from vsdbench.models.device import send_numbers
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench.models.reading import read_sequences
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, ImageTokens, TargetView

if TYPE_CHECKING:
    from vsdbench.models.target import Target


class Sequenced(Protocol):
    """A training sequence (``shards.TokenSequence``)."""

    @property
    def ids(self) -> Any: ...  # noqa: ANN401, D102 - a NumPy array or a list of ints
    @property
    def prompt_len(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Features:
    """What the target says of a batch.

    Attributes:
        states: ``[N, 4H]``, the sequences packed.
        keys: ``[layers, 2, G, L, W]`` keys and values of each sequence (``branching.branch_states``); none: not kept.
        images: Which tokens are pieces of images, and what enters the target's first layer there; None: none is.
    """

    states: Tensor
    keys: tuple[Tensor, ...] = ()
    images: ImageTokens | None = None


class FeatureSource(Protocol):
    """Where a batch's features come from."""

    def read(self, indices: Sequence[int]) -> Features:
        """Return those of these sequences, in this order."""


class OnlineFeatures:
    """Runs the target for every batch.

    Args:
        target: The target.
        sequences: The data.
        keys: Hand out keys and values too.
    """

    def __init__(self, target: Target, sequences: Sequence[Sequenced], *, keys: bool = False) -> None:
        self._target = target
        self._sequences = sequences
        self._keys = keys

    def read(self, indices: Sequence[int]) -> Features:
        """Return features in the target's dtype."""
        found = run_target(self._target, [shown(self._sequences[i]) for i in indices], keys=self._keys)
        states = torch.cat([one.states for one in found])
        return Features(states, tuple(key for one in found for key in one.keys), _packed_images(found))


def shown(sequence: Sequenced, length: int | None = None) -> Any:  # noqa: ANN401 - ids, or an ImagePrompt
    """Return a sequence as the target takes it, its images included; its first ``length`` tokens (prompt or more)."""
    with_images = getattr(sequence, "shown", None)
    return sequence.ids[:length] if with_images is None else with_images(length)


def _packed_images(found: Sequence[Features]) -> ImageTokens | None:
    """Return the images of several sequences as those of their packed batch."""
    given = [one.images for one in found if one.images is not None]
    if not given:
        return None
    masks = [
        torch.zeros(len(one.states), dtype=torch.bool, device=one.states.device)
        if one.images is None
        else one.images.mask
        for one in found
    ]
    return ImageTokens(torch.cat(masks), torch.cat([images.embeddings for images in given]))


def run_target(target: Target, sequences: Sequence[Any], *, keys: bool) -> list[Features]:
    """Return the features of each sequence, with keys and values where they are wanted (``reading``)."""
    found = []
    for read in read_sequences(target, sequences, keys=keys):
        images = None
        if read.image_mask is not None and read.embeddings is not None:
            images = ImageTokens(read.image_mask, read.embeddings[read.image_mask])
        found.append(Features(read.features, (read.keys,) if keys else (), images))
    return found


@dataclass(slots=True)
class BatchMaker:
    """Makes batches and the target's view of them.

    Attributes:
        sequences: The data.
        source: Their features.
        head: ``[V, H]`` the target's LM head.
        drafter: Gives the draft vocabulary.
        target: For objectives that ask the target about drafted tokens; None where none does.
        num_forwards: Forwards of the target so far, a sequence each: for features, and for drafted tokens.
    """

    sequences: Sequence[Sequenced]
    source: FeatureSource
    head: Tensor
    drafter: DraftModel
    target: Target | None = None
    num_forwards: int = 0
    _draft_head: Tensor | None = field(default=None, repr=False)
    _table: Tensor | None = field(default=None, repr=False)

    def make(self, indices: Sequence[int], *, seed: int = 0) -> tuple[DraftBatch, TargetView]:
        """Return the packed batch of these sequences and the target's view of its rows.

        Args:
            indices: The sequences.
            seed: For what an objective draws.
        """
        if self._draft_head is None or self._table is None:
            self._draft_head = self.head.detach()[self.drafter.draft_ids].clone()
            self._table = self.drafter.target_to_draft
        found = self.source.read(indices)
        states = found.states
        self.num_forwards += len(indices) if isinstance(self.source, OnlineFeatures) else 0
        chosen = [self.sequences[i] for i in indices]
        ids = [[int(token) for token in sequence.ids] for sequence in chosen]
        width = states.shape[-1] // 4
        prompt_lens = [sequence.prompt_len for sequence in chosen]
        batch = DraftBatch.pack(ids, prompt_lens, states, seed=seed, images=found.images)
        rows = states[batch.slots + 1, 3 * width :]
        starts = [0, *accumulate(len(sequence) for sequence in ids)]
        asked = None
        if self.target is not None:
            keys = dict(zip(starts, found.keys, strict=False))
            asked = _Asked(self, self.target, keys, dict(zip(starts, chosen, strict=False)))
        return batch, TargetView(rows, self._draft_head, self._table, self.head, asked)

    def slots(self, number: int) -> tuple[Tensor, Tensor]:
        """Return features ``[n, 4H]`` and tokens ``[n]`` int64 at the first ``number`` slots of text, or at all."""
        features, tokens, found = list[Tensor](), list[Tensor](), 0
        for index, sequence in enumerate(self.sequences):
            if found >= number:
                break
            read = self.source.read([index])
            text = torch.ones(len(read.states), dtype=torch.bool, device=read.states.device)
            text[0] = False  # the first token's state is like no other
            if read.images is not None:
                text &= ~read.images.mask.to(text.device)
            self.num_forwards += isinstance(self.source, OnlineFeatures)
            features.append(read.states[text])
            tokens.append(send_numbers([int(token) for token in sequence.ids], text.device)[text])
            found += len(tokens[-1])
        return torch.cat(features), torch.cat(tokens)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The target as the view of one batch asks it (protocol ``BranchingTarget``).

    Attributes:
        maker: Counts the forwards.
        target: The target.
        keys: Keys and values of the batch's sequences by their first token, as far as they are kept.
        sequences: The sequences, likewise.
    """

    maker: BatchMaker
    target: Target
    keys: dict[int, Tensor]
    sequences: dict[int, Sequenced]

    def branch_states(self, first: int, prefix: Tensor, branches: Branches) -> Tensor:
        """Ask about tokens drafted in the sequence that starts at ``first``."""
        self.maker.num_forwards += 1
        keys = self.keys.get(first)
        seen = shown(self.sequences[first], len(prefix)) if keys is None else None
        if isinstance(seen, ImagePrompt):
            return branch_states_behind(self.target, seen, branches)
        return branch_states(self.target, prefix, branches, keys)


def response_rows(sequences: Sequence[Sequenced]) -> list[int]:
    """Return how many rows of the loss each sequence has: its response tokens that a slot predicts."""
    return [len(sequence.ids) - max(sequence.prompt_len, 2) for sequence in sequences]


def plan_batches(num_rows: Sequence[int], batch_tokens: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Return one epoch's batches of sequence indices, in an order that seed and epoch alone determine.

    Args:
        num_rows: Response tokens of every sequence; those without any are left out.
        batch_tokens: A batch is closed once it holds so many.
        seed: Of the order.
        epoch: Every epoch has another one.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches: list[list[int]] = []
    filled = batch_tokens
    for i in torch.randperm(len(num_rows), generator=generator).tolist():
        if num_rows[i] < 1:
            continue
        if filled >= batch_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += num_rows[i]
    return batches


def draft_vocabulary(
    sequences: Sequence[Sequenced], vocab_size: int, size: int, always: Sequence[int]
) -> tuple[Tensor, float]:
    """Return ``([Vd] int64 target ids in increasing order, share of the responses that they cover)``.

    Args:
        sequences: Training data; responses count, and prompts only decide between tokens that no response has.
        vocab_size: V.
        size: Vd; no more than V.
        always: Ids that are kept whatever their count (end-of-sequence tokens).

    Raises:
        ConfigError: There are no responses to count.
    """
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    prompts = torch.zeros(vocab_size, dtype=torch.float64)
    for sequence in sequences:
        ids = torch.tensor([int(token) for token in sequence.ids], dtype=torch.int64)
        counts += torch.bincount(ids[sequence.prompt_len :], minlength=vocab_size)
        prompts += torch.bincount(ids[: sequence.prompt_len], minlength=vocab_size)
    if not counts.any():
        raise ConfigError(
            "the training data has no response tokens, so there is nothing to make a draft vocabulary of."
        )
    ranked = counts + prompts / (prompts.sum() + 1)
    ranked[torch.tensor(list(always), dtype=torch.int64)] = torch.inf
    ids = torch.sort(torch.sort(ranked, descending=True, stable=True).indices[: min(size, vocab_size)]).values
    return ids, float(counts[ids].sum() / counts.sum())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none that can be read."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
