"""Features on their way from decoding to their file (``feature_files``): in the order in which answers ended.

A spool is a folder of chunks. Each has a file of states, perhaps one of keys and values, and, written last, an index
that says which answers are where; what a killed process left without one is removed. Answers are known by a hash of
their tokens, so what a chunk says can only be taken for what it is of.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import inf, prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vsdbench.store.files import storage_errors, write_atomic
from vsdbench_drafters.training.features import Features, read_json

if TYPE_CHECKING:
    from vsdbench_drafters.training.kept import Keeps

_STATES, _KEYS, _INDEX = ".states", ".keys", ".json"


class FeatureSpool:
    """Features of answers, one chunk after the other.

    Args:
        folder: Where they are kept.
        keeps: What is kept; chunks of other layers are not looked at.
        most_key_bytes: Where keys and values would be more, none are kept.
    """

    def __init__(self, folder: Path, keeps: Keeps, most_key_bytes: float = inf) -> None:
        self.folder = folder
        self.keeps = keeps
        self._key_bytes_left = most_key_bytes - sum(path.stat().st_size for path in folder.glob(f"*{_KEYS}"))
        self._name = ""
        self._open = ExitStack()
        self._streams: list[IO[bytes]] = []
        self._index: dict[str, tuple[int, int]] = {}
        self._tokens = 0

    def add(self, ids: Any, features: Features) -> None:  # noqa: ANN401 - a NumPy array or a list of ints
        """Write down what the target said of a sequence.

        Raises:
            EnvironmentProblemError: The disk is full, or the folder may not be written.
        """
        keys = features.keys if self.keeps.keys else ()
        self._key_bytes_left -= sum(part.nbytes for part in keys)
        parts = [features.states, *keys]
        with storage_errors(self.folder):
            if self._key_bytes_left < 0 and keys:
                self._forget_keys()
                parts = [features.states]
            if not self._streams:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._name = uuid.uuid4().hex
                paths = [self.folder / f"{self._name}{ending}" for ending in (_STATES, _KEYS)[: len(parts)]]
                self._streams = [self._open.enter_context(path.open("wb")) for path in paths]
            for part, stream in zip(parts, self._streams, strict=True):
                stream.write(part.contiguous().view(torch.uint8).numpy().data)
        self._index[_digest(ids)] = self._tokens, len(ids)
        self._tokens += len(ids)

    def close(self) -> None:
        """End the chunk; what is added later begins another one.

        Raises:
            EnvironmentProblemError: The disk is full, or the folder may not be written.
        """
        if not self._streams:
            return
        text = json.dumps({"layers": self.keeps.layers, "tokens": self._tokens, "answers": self._index})
        with storage_errors(self.folder):
            self._open.close()
        write_atomic(self.folder / f"{self._name}{_INDEX}", text.encode())
        self._streams, self._index, self._tokens = [], {}, 0

    def _forget_keys(self) -> None:
        for stream in self._streams[1:]:
            stream.close()
        self._streams = self._streams[:1]
        for path in self.folder.glob(f"*{_KEYS}"):
            path.unlink()

    def take(
        self, sequences: Sequence[Any], dtype: torch.dtype, width: int, key_shape: tuple[int, ...] | None
    ) -> Iterator[tuple[int, Features]]:
        """Yield the indices of sequences that are here, with their features, and remove each chunk behind the last.

        Args:
            sequences: Their tokens.
            dtype: Of the files.
            width: 4H.
            key_shape: ``(layers, 2, G, W)``; None: keys and values are not wanted.
        """
        wanted = {_digest(ids): index for index, ids in enumerate(sequences)}
        for path in sorted(self.folder.glob(f"*{_INDEX}")):
            chunk = read_json(path)
            files = [(path.with_suffix(_STATES), width)]
            if key_shape is not None:
                files.append((path.with_suffix(_KEYS), prod(key_shape)))
            total = int(chunk.get("tokens", 0))
            if total and tuple(chunk["layers"]) == self.keeps.layers and _are_whole(files, total, dtype):
                mapped = [
                    torch.from_file(str(file), shared=False, size=total * numbers, dtype=dtype).view(total, numbers)
                    for file, numbers in files
                ]
                for digest, (start, length) in chunk["answers"].items():
                    if (index := wanted.pop(digest, None)) is not None:
                        states, *keys = (part[start : start + length] for part in mapped)
                        yield index, Features(states, tuple(_shaped(part, key_shape) for part in keys))
            for ending in (_INDEX, _KEYS, _STATES):
                path.with_suffix(ending).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove what there is."""
        self._open.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _shaped(keys: Tensor, key_shape: tuple[int, ...] | None) -> Tensor:
    assert key_shape is not None
    *outer, width = key_shape
    return keys.reshape(*outer, -1, width)


def _are_whole(files: Sequence[tuple[Path, int]], total: int, dtype: torch.dtype) -> bool:
    return all(file.is_file() and file.stat().st_size == total * numbers * dtype.itemsize for file, numbers in files)


def _digest(ids: Any) -> str:  # noqa: ANN401 - a NumPy array or a list of ints
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:32]
