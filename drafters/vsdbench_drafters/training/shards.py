"""How training data lies on disk: shards while it is being made, then two memory-mapped arrays and a description.

Every file is written beside its place, synchronised and renamed, so a killed process leaves whole files only. The
description is written last: a folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from vsdbench.errors import EnvironmentProblemError, is_disk_full
from vsdbench.store.files import FileLock

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench_drafters.training.scenes import ShownSequences

HELDOUT_OFFSET = 1 << 40
"""Added to the index of held-out prompts, so that one number says which prompt it is."""
STOP_REASONS = ("skipped", "eos", "length", "loop")

_TABLE = np.dtype(
    [
        ("offset", np.int64),
        ("prompt_len", np.int32),
        ("response_len", np.int32),
        ("key", np.int64),
        ("temperature", np.float32),
        ("stop", np.uint8),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt with the target's answer.

    Attributes:
        key: Index of the prompt, plus ``HELDOUT_OFFSET`` for a held-out one.
        ids: ``[prompt + response]`` int32.
        prompt_len: Where the response begins; equal to ``len(ids)`` for a prompt that was left out.
        temperature: It was sampled with; 0 is greedy.
        stop: One of ``STOP_REASONS``.
    """

    key: int
    ids: NDArray[np.int32]
    prompt_len: int
    temperature: float
    stop: str

    @property
    def num_response_tokens(self) -> int:
        """Tokens of the response."""
        return len(self.ids) - self.prompt_len

    @property
    def response_digest(self) -> bytes:
        """A hash of the response alone, to find duplicates by."""
        return hashlib.sha256(np.ascontiguousarray(self.ids[self.prompt_len :]).tobytes()).digest()[:16]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A training sequence: prompt and response.

    Attributes:
        ids: ``[L]`` token ids, uint16 or int32, a view of the file; convert before doing arithmetic.
        prompt_len: Where the response begins.
        index: Of the prompt in its split.
        temperature: Of the response; 0 is greedy.
        stop: ``eos``, ``length`` or ``loop``.
    """

    ids: NDArray[Any]
    prompt_len: int
    index: int
    temperature: float
    stop: str


class SequenceList(Sequence[TokenSequence]):
    """Sequences read from memory-mapped arrays when they are asked for."""

    def __init__(self, tokens: NDArray[Any], table: NDArray[Any]) -> None:
        self._tokens = tokens
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, position: int) -> TokenSequence: ...
    @overload
    def __getitem__(self, position: slice) -> SequenceList: ...
    def __getitem__(self, position: int | slice) -> TokenSequence | SequenceList:
        if isinstance(position, slice):
            return SequenceList(self._tokens, self._table[position])
        row = self._table[position]
        start, prompt_len = int(row["offset"]), int(row["prompt_len"])
        return TokenSequence(
            ids=self._tokens[start : start + prompt_len + int(row["response_len"])],
            prompt_len=prompt_len,
            index=int(row["key"]) % HELDOUT_OFFSET,
            temperature=float(row["temperature"]),
            stop=STOP_REASONS[int(row["stop"])],
        )

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """``[n]`` tokens of each sequence, prompt included."""
        lengths: NDArray[np.int64] = self._table["prompt_len"].astype(np.int64) + self._table["response_len"]
        return lengths

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all sequences."""
        return int(self._table["response_len"].sum())


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Data that is complete.

    Attributes:
        sequences: For training, by prompt index.
        heldout: For validation; no article or scene in it occurs in ``sequences``.
        fingerprint: Hash of the tokens themselves.
        next_index: First prompt index that was not used.
        meta: Licence, source, target and configuration.
        path: The folder.
    """

    sequences: SequenceList | ShownSequences
    heldout: SequenceList | ShownSequences
    fingerprint: str
    next_index: int
    meta: dict[str, Any]
    path: Path

    @property
    def num_response_tokens(self) -> int:
        """Response tokens to train on."""
        return self.sequences.num_response_tokens


class DataFolder:
    """The folder of one data set, complete or in the making; one process at a time writes it, under its ``lock``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> TrainingData | None:
        """Return the data if it is complete and whole, else None."""
        try:
            meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
            tokens = np.load(self.path / "tokens.npy", mmap_mode="r", allow_pickle=False)
            table = np.load(self.path / "sequences.npy", allow_pickle=False)
            whole = table.dtype == _TABLE and len(tokens) == meta["num_tokens"] and len(table) == meta["num_sequences"]
        except (OSError, ValueError, KeyError, EOFError):
            return None
        if not whole:
            return None
        heldout = table["key"] >= HELDOUT_OFFSET
        return TrainingData(
            sequences=SequenceList(tokens, table[~heldout]),
            heldout=SequenceList(tokens, table[heldout]),
            fingerprint=meta["fingerprint"],
            next_index=meta["next_index"],
            meta=meta,
            path=self.path,
        )

    def lock(self, console: Console | None) -> FileLock:
        """Hold the folder, after waiting for another process that does; None: without waiting.

        Raises:
            ConfigError: Another process holds it, and there is no console to say so.
        """
        return FileLock(self.path / ".lock", "The training data are being made", console=console)

    def save_shard(self, answers: Sequence[Answer]) -> None:
        """Write answers as a new shard.

        Raises:
            EnvironmentProblemError: The disk is full or the folder cannot be written.
        """
        arrays: dict[str, Any] = {
            "tokens": np.concatenate([answer.ids for answer in answers]),
            "lengths": np.array([len(answer.ids) for answer in answers], dtype=np.int64),
            "prompts": np.array([answer.prompt_len for answer in answers], dtype=np.int64),
            "keys": np.array([answer.key for answer in answers], dtype=np.int64),
            "temperatures": np.array([answer.temperature for answer in answers], dtype=np.float32),
            "stops": np.array([STOP_REASONS.index(answer.stop) for answer in answers], dtype=np.uint8),
        }
        self._write(f"shard-{uuid.uuid4().hex}.npz", lambda stream: np.savez(stream, allow_pickle=False, **arrays))

    def load_shards(self) -> dict[int, Answer]:
        """Return the answers of every shard by key; one that is damaged is removed and made again.

        One that cannot be read now (``OSError``) stays: it holds answers that took hours.
        """
        found: dict[int, Answer] = {}
        for path in sorted(self.path.glob("shard-*.npz")):
            try:
                with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                    found.update((answer.key, answer) for answer in _answers(dict(arrays)))
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
                path.unlink()
        return found

    def finish(self, answers: Sequence[Answer], *, next_index: int, meta: dict[str, Any]) -> TrainingData:
        """Write the final arrays and the description, remove the shards, and return the data.

        Raises:
            EnvironmentProblemError: The disk is full or the folder cannot be written.
        """
        self._write_arrays(answers, next_index, meta)
        for path in self.path.glob("shard-*.npz"):
            path.unlink(missing_ok=True)
        data = self.open()
        if data is None:
            raise EnvironmentProblemError(f"{self.path} cannot be read back after writing; check the disk.")
        return data

    def _write_arrays(self, answers: Sequence[Answer], next_index: int, meta: dict[str, Any]) -> None:
        tokens = np.concatenate([answer.ids for answer in answers]) if answers else np.zeros(0, dtype=np.int32)
        small = tokens.size == 0 or int(tokens.max()) < 1 << 16
        tokens = tokens.astype(np.uint16 if small else np.int32)
        table = np.zeros(len(answers), dtype=_TABLE)
        offset = 0
        for row, answer in enumerate(answers):
            stop = STOP_REASONS.index(answer.stop)
            size = answer.num_response_tokens
            table[row] = (offset, answer.prompt_len, size, answer.key, answer.temperature, stop)
            offset += len(answer.ids)
        digest = hashlib.sha256(tokens.tobytes() + table.tobytes()).hexdigest()[:16]
        counts = {"num_tokens": len(tokens), "num_sequences": len(table)}
        text = json.dumps({**meta, **counts, "next_index": next_index, "fingerprint": digest}, indent=2)
        self._write("tokens.npy", lambda stream: np.save(stream, tokens))
        self._write("sequences.npy", lambda stream: np.save(stream, table))
        self._write("meta.json", lambda stream: stream.write(text.encode()))

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Write a file beside its place and rename it; what a killed process left there is written over."""
        temporary = self.path / ".partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            fix = "free some space" if is_disk_full(error) else "make it writable"
            raise EnvironmentProblemError(
                f"training data cannot be written to {self.path} ({error.strerror}); {fix} or set VSDBENCH_CACHE."
            ) from error


def _answers(arrays: dict[str, NDArray[Any]]) -> Iterable[Answer]:
    ends = np.cumsum(arrays["lengths"])
    for position, end in enumerate(ends):
        yield Answer(
            key=int(arrays["keys"][position]),
            ids=arrays["tokens"][int(end - arrays["lengths"][position]) : int(end)],
            prompt_len=int(arrays["prompts"][position]),
            temperature=float(arrays["temperatures"][position]),
            stop=STOP_REASONS[int(arrays["stops"][position])],
        )
