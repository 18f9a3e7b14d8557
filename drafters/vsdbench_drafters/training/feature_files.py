"""The target's features in files, made once for all epochs and arms that read the same data.

States are one file. Keys and values, where they are wanted, are another one, since they are five times as large for the
embedded target. Data with images has a third one: what entered the target's first layer where an image stands. The same
forwards fill all of them: those that made the answers (``spool``), or else new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench.config import content_hash
from vsdbench.errors import EnvironmentProblemError, is_disk_full
from vsdbench.models.branching import key_shape
from vsdbench.models.device import send
from vsdbench.store.files import FileLock
from vsdbench_drafters.objectives.base import ImageTokens
from vsdbench_drafters.training.features import Features, run_target, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from vsdbench.models.target import Target
    from vsdbench_drafters.training.features import Sequenced
    from vsdbench_drafters.training.spool import FeatureSpool

_PASS_TOKENS = 2048  # tokens of one target forward


def num_bytes(num_tokens: int, numbers: int, itemsize: int = 2) -> int:
    """Return the size of a file that has so many numbers a token.

    >>> num_bytes(1000, 4 * 576)
    4608000
    """
    return num_tokens * numbers * itemsize


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a data set: so many numbers a token, sequence by sequence.

    Attributes:
        path: Where it is once it is complete.
        shape: Of a token's numbers, around the token axis where there is one: ``(4H,)`` or ``(layers, 2, G, W)``.
        part: What of a sequence's features it has.
    """

    path: Path
    shape: tuple[int, ...]
    part: Callable[[Features], Tensor]

    @property
    def numbers(self) -> int:
        """Numbers a token."""
        return prod(self.shape)

    @property
    def partial(self) -> Path:
        """Where it is until it is complete."""
        return self.path.with_suffix(f"{self.path.suffix}.partial")

    def is_whole(self, num_tokens: int, itemsize: int) -> bool:
        """Whether it is there in full."""
        return self.path.exists() and self.path.stat().st_size == num_bytes(num_tokens, self.numbers, itemsize)

    def mapped(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Return ``[tokens, numbers]``, read as it is used."""
        size = num_tokens * self.numbers
        return torch.from_file(str(self.path), shared=False, size=size, dtype=dtype).view(num_tokens, self.numbers)


class CachedFeatures:
    """Reads memory-mapped files.

    Args:
        lengths: Tokens of every sequence, in file order.
        states: The file of the states.
        keys: The file of keys and values; None: they are not kept.
        images: The file of images; None: there are none.
        dtype: Of the files.
        device: Where batches go.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        states: _File,
        *,
        keys: _File | None,
        images: _File | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._offsets = [0, *accumulate(lengths)]
        self._states = states.mapped(self._offsets[-1], dtype)
        self._keys = None if keys is None else keys.mapped(self._offsets[-1], dtype)
        self._images = None if images is None else images.mapped(self._offsets[-1], dtype)
        self._shape = () if keys is None else keys.shape
        self._device = device

    def read(self, indices: Sequence[int]) -> Features:
        """Return features in the files' dtype; keys and values are views of their file."""
        spans = [slice(self._offsets[i], self._offsets[i + 1]) for i in indices]
        states = send(torch.cat([self._states[span] for span in spans]), self._device)
        images = None if self._images is None else _unpacked(torch.cat([self._images[span] for span in spans]))
        if self._keys is None:
            return Features(states, images=images)
        *outer, width = self._shape
        return Features(states, tuple(self._keys[span].view(*outer, -1, width) for span in spans), images)


def _beside_mask(one: Features) -> Tensor:
    """Return ``[L, 1 + H]``: 1 and what enters the first layer where an image stands, zeros everywhere else."""
    width = one.states.shape[-1] // 4
    rows = one.states.new_zeros(len(one.states), 1 + width)
    if one.images is not None:
        rows[one.images.mask, 0] = 1
        rows[one.images.mask, 1:] = one.images.embeddings
    return rows


def _unpacked(rows: Tensor) -> ImageTokens | None:
    mask = rows[:, 0] > 0
    return ImageTokens(mask, rows[mask, 1:]) if bool(mask.any()) else None


def cached_features(
    target: Target,
    sequences: Sequence[Sequenced],
    folder: Path,
    *,
    fingerprint: str,
    keys: bool = False,
    images: bool = False,
    spool: FeatureSpool | None = None,
    progress: Callable[[int], None] = lambda _: None,
    console: Console | None = None,
) -> CachedFeatures:
    """Return the features of a data set, from ``folder`` or made now.

    Args:
        target: The target.
        sequences: In file order.
        folder: Where feature files are kept.
        fingerprint: Of the data; with the target's it names the files.
        keys: Keep keys and values too (``branching.can_branch`` says for which targets they are of use).
        images: Some sequences have images.
        spool: Has those of some sequences already, and is removed.
        progress: Told how many tokens were done, batch by batch.
        console: Where it is said if another process is making them, for which this one waits; None: it does not wait.

    Raises:
        ConfigError: Another process is making them, and there is no console.
        EnvironmentProblemError: The disk is full.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    total, itemsize = sum(lengths), target.dtype.itemsize
    same = [target.fingerprint, str(target.dtype), target.feature_layers, fingerprint]
    files = [_File(folder / f"{content_hash(same)}.bin", (4 * target.hidden_size,), lambda one: one.states)]
    if keys:
        shape = key_shape(target)
        name = content_hash([*same, "keys", shape, target.attention])
        files.append(_File(folder / f"{name}.keys", shape, lambda one: one.keys[0]))
    if images:
        name, width = content_hash([*same, "images"]), 1 + target.hidden_size
        files.append(_File(folder / f"{name}.images", (width,), _beside_mask))
    if not all(file.is_whole(total, itemsize) for file in files):
        with FileLock(folder / f".{files[0].path.stem}.lock", "The target's features are being made", console=console):
            missing = [file for file in files if not file.is_whole(total, itemsize)]
            if missing:
                _make(target, sequences, missing, spool, progress)
    if spool is not None:
        spool.remove()
    return CachedFeatures(
        lengths,
        files[0],
        keys=files[1] if keys else None,
        images=files[-1] if images else None,
        dtype=target.dtype,
        device=target.device,
    )


def _make(
    target: Target,
    sequences: Sequence[Sequenced],
    files: Sequence[_File],
    spool: FeatureSpool | None,
    progress: Callable[[int], None],
) -> None:
    """Make files that appear whole or not at all; what a killed process left of them is written over."""
    try:
        _write(target, sequences, files, spool, progress)
        for file in files:
            file.partial.replace(file.path)
    except (OSError, RuntimeError) as error:
        if is_disk_full(error):
            total = sum(len(sequence.ids) for sequence in sequences)
            size = num_bytes(total, sum(file.numbers for file in files), target.dtype.itemsize)
            cheaper = "keys=false" if any(len(file.shape) > 1 for file in files) else "features=online"
            raise EnvironmentProblemError(
                f"the disk is full: the target's features in {files[0].path.parent} need {size / 1e9:.1f} GB; free it "
                f"or set training.{cheaper}."
            ) from error
        raise
    finally:
        for file in files:
            file.partial.unlink(missing_ok=True)


def _write(
    target: Target,
    sequences: Sequence[Sequenced],
    files: Sequence[_File],
    spool: FeatureSpool | None,
    progress: Callable[[int], None],
) -> None:
    """Fill files with the features of all sequences: those of the spool, the others computed in batches."""
    lengths = [len(sequence.ids) for sequence in sequences]
    starts = [0, *accumulate(lengths)]
    keys = any(len(file.shape) > 1 for file in files)
    missing = dict(enumerate(lengths))
    with ExitStack() as stack:
        opened = [stack.enter_context(file.partial.open("wb")) for file in files]
        items = [file.numbers * target.dtype.itemsize for file in files]
        for stream, item in zip(opened, items, strict=True):
            stream.truncate(starts[-1] * item)

        def put(i: int, one: Features) -> None:
            for file, stream, item in zip(files, opened, items, strict=True):
                numbers = file.part(one)
                if numbers.numel() != lengths[i] * file.numbers:
                    msg = f"a layer of '{target.name}' has other keys than its config says"
                    raise ValueError(msg)
                stream.seek(starts[i] * item)
                stream.write(numbers.cpu().contiguous().view(torch.uint8).numpy().data)
            progress(missing.pop(i))

        if spool is not None:
            ids = [sequence.ids for sequence in sequences]
            for i, one in spool.take(ids, target.dtype, 4 * target.hidden_size, key_shape(target) if keys else None):
                put(i, one)
        for batch in _by_length(missing):
            for i, one in zip(batch, run_target(target, [shown(sequences[i]) for i in batch], keys=keys), strict=True):
                put(i, one)


def _by_length(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Yield indices of sequences of like length, at most ``_PASS_TOKENS`` padded tokens together."""
    batch: list[int] = []
    for i in sorted(lengths, key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > _PASS_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
