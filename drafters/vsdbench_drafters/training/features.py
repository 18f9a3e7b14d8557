"""What the drafter reads of the target: its features, computed per batch or kept in one file.

For every token the target gives three hidden states and the last normed one, from which its distribution follows by
one product: 4 H numbers, in place of V logits. They are what decoding hands to drafters (``interfaces.TargetOutput``).
Cached, they take ``8 H`` bytes a token in bfloat16 (4.6 kB for H = 576) and save every later arm or epoch the target's
forward.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vsdbench.config import content_hash
from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models.branching import Branches, branch_states
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, TargetView

if TYPE_CHECKING:
    from collections.abc import Callable

    from vsdbench.models.target import Target

_PASS_TOKENS = 2048  # tokens of one target forward


class Sequenced(Protocol):
    """A training sequence (``shards.TokenSequence``)."""

    @property
    def ids(self) -> Any: ...  # noqa: ANN401, D102 - a NumPy array or a list of ints
    @property
    def prompt_len(self) -> int: ...  # noqa: D102


class FeatureSource(Protocol):
    """Where a batch's ``[N, 4H]`` features come from."""

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """Return the states of these sequences, packed in this order."""


def num_bytes(num_tokens: int, hidden_size: int, itemsize: int = 2) -> int:
    """Return the size of a feature file.

    >>> num_bytes(1000, 576)
    4608000
    """
    return num_tokens * 4 * hidden_size * itemsize


class OnlineFeatures:
    """Runs the target for every batch."""

    def __init__(self, target: Target, sequences: Sequence[Sequenced]) -> None:
        self._target = target
        self._sequences = sequences

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """Return ``[N, 4H]`` in the target's dtype."""
        return torch.cat(target_pass(self._target, [self._sequences[i].ids for i in indices]))


class CachedFeatures:
    """Reads a memory-mapped ``[tokens, 4H]`` file.

    Args:
        path: The file.
        lengths: Tokens of every sequence, in file order.
        width: 4H.
        dtype: Of the file.
        device: Where batches go.
    """

    def __init__(
        self, path: Path, lengths: Sequence[int], width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        total = sum(lengths)
        mapped = torch.from_file(str(path), shared=False, size=total * width, dtype=dtype)
        self._states = mapped.view(total, width)
        self._device = device
        self._offsets = [0]
        for length in lengths:
            self._offsets.append(self._offsets[-1] + length)

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """Return ``[N, 4H]`` in the file's dtype."""
        parts = [self._states[self._offsets[i] : self._offsets[i + 1]] for i in indices]
        return torch.cat(parts).to(self._device)


@torch.inference_mode()
def target_pass(target: Target, sequences: Sequence[Any]) -> list[Tensor]:
    """Return ``[L, 4H]`` for each sequence of ids: the three features, then the last normed hidden state."""
    longest = max(len(ids) for ids in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor([int(token) for token in ids])
    # Padding stands on the right, where no real token can see it, so causal attention needs no mask.
    with target.as_shipped() as model:
        output = model.get_decoder()(input_ids=tokens.to(target.device), use_cache=False)
    states = torch.cat([*target.entered(), output.last_hidden_state], dim=-1)
    return [states[row, : len(ids)].clone() for row, ids in enumerate(sequences)]


def cached_features(
    target: Target,
    sequences: Sequence[Sequenced],
    folder: Path,
    *,
    fingerprint: str,
    progress: Callable[[int], None] = lambda _: None,
) -> CachedFeatures:
    """Return the features of a data set, from ``folder`` or made now.

    Args:
        target: The target.
        sequences: In file order.
        folder: Where feature files are kept.
        fingerprint: Of the data; with the target's it names the file.
        progress: Told how many tokens were done, batch by batch.

    Raises:
        EnvironmentProblemError: The disk is full.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    width = 4 * target.hidden_size
    key = content_hash([target.fingerprint, str(target.dtype), target.feature_layers, fingerprint])
    path = folder / f"{key}.bin"
    expected = num_bytes(sum(lengths), target.hidden_size, target.dtype.itemsize)
    if not path.exists() or path.stat().st_size != expected:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            _write(target, sequences, lengths, partial, progress)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
                raise EnvironmentProblemError(
                    f"the disk is full: {path} needs {expected / 1e9:.1f} GB; free it or set training.features=online."
                ) from error
            raise
        partial.replace(path)
    return CachedFeatures(path, lengths, width, target.dtype, target.device)


def _write(
    target: Target, sequences: Sequence[Sequenced], lengths: list[int], path: Path, progress: Callable[[int], None]
) -> None:
    """Fill a file with the features of all sequences, computed in batches of like length."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    width = 4 * target.hidden_size
    item = width * target.dtype.itemsize
    with path.open("wb") as file:
        file.truncate(starts[-1] * item)
        for batch in _by_length(lengths):
            states = target_pass(target, [sequences[i].ids for i in batch])
            for i, state in zip(batch, states, strict=True):
                file.seek(starts[i] * item)
                file.write(state.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            progress(sum(lengths[i] for i in batch))


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of sequences of like length, at most ``_PASS_TOKENS`` padded tokens together."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > _PASS_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


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
        states = self.source.hidden(indices)
        self.num_forwards += len(indices) if isinstance(self.source, OnlineFeatures) else 0
        chosen = [self.sequences[i] for i in indices]
        ids = [[int(token) for token in sequence.ids] for sequence in chosen]
        width = states.shape[-1] // 4
        prompt_lens = [sequence.prompt_len for sequence in chosen]
        batch = DraftBatch.pack(ids, prompt_lens, states, seed=seed)
        rows = states[batch.slots + 1, 3 * width :]
        return batch, TargetView(rows, self._draft_head, self._table, self.head, None if self.target is None else self)

    # A view asks the target through its maker, which counts (protocol ``BranchingTarget``).

    def branch_states(self, first: int, prefix: Tensor, branches: Branches) -> Tensor:  # noqa: ARG002 - the protocol's
        """Ask the target about drafted tokens."""
        if self.target is None:
            raise ConfigError("this objective asks the target about drafted tokens, and has none to ask.")
        self.num_forwards += 1
        return branch_states(self.target, prefix, branches)


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


def describe(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none that can be read."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
