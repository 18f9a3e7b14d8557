"""The record of a batch: one JSON line a group of prompts x turn x method x mode x repeat x batch size.

Batches have a file of their own, ``batches.jsonl``, beside the records of single answers: what a batch took belongs to
all of its answers together. A line holds every answer with its own steps, whose times are those of the whole step;
``num_sequences`` says how many answers shared it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, ValidationError, model_validator

from vsdbench.errors import ConfigError
from vsdbench.store.files import AppendLog, read_lines
from vsdbench.store.records import Count, Divergence, Model, Seconds, Steps, Tree, first_problem

BATCHES = "batches.jsonl"
BatchKey: TypeAlias = tuple[str, int, int, str, str, float, int, int]
"""Suite, group, turn, method, mode, temperature, repeat, batch size."""


class BatchAnswer(Model):
    """One answer of a batch. Names are those of ``Record``.

    Attributes:
        decode_s: While it was being decoded, beside others; their prefills are not in it.
        steps: Counts are its own, times those of the whole step.
        num_sequences: Answers that shared each of these steps.
    """

    prompt_id: str
    seed: int
    stop_reason: Literal["eos", "length", "context"]
    num_prompt_tokens: Count
    num_output_tokens: Annotated[int, Field(ge=1)]
    output_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    prefill_s: Seconds
    decode_s: Seconds
    steps: Steps = Steps()
    num_sequences: tuple[Annotated[int, Field(ge=1)], ...] = ()
    divergence: Divergence | None = None
    lossless: Literal["equal", "near_tie", "violation", "unchecked"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.num_sequences) != len(self.steps):
            raise ValueError(f"there are {len(self.steps)} steps, but {len(self.num_sequences)} num_sequences")
        if sum(self.steps.num_emitted) != self.num_output_tokens - 1:
            raise ValueError(
                f"the steps emit {sum(self.steps.num_emitted)} tokens, but num_output_tokens - 1 is "
                f"{self.num_output_tokens - 1}"
            )
        return self


class BatchRecord(Model):
    """The answers to a group of prompts, decoded ``batch_size`` at a time by one method."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    run_id: str
    suite: str
    group: Count
    turn: Count
    repeat: Count
    order_in_block: Count
    batch_size: Annotated[int, Field(ge=1)]
    method: str
    kind: Literal["baseline", "drafter"]
    mode: Literal["greedy", "stochastic"]
    temperature: Annotated[float, Field(ge=0)]
    rule: str
    tree: Tree | None = None
    max_new_tokens: Annotated[int, Field(ge=1)]
    answers: Annotated[tuple[BatchAnswer, ...], Field(min_length=1)]

    @property
    def key(self) -> BatchKey:
        """What identifies the record in its run, for resuming."""
        names = (self.suite, self.group, self.turn, self.method, self.mode)
        return (*names, self.temperature, self.repeat, self.batch_size)

    def to_line(self) -> str:
        """Return the record as one line of JSON, newline included."""
        return self.model_dump_json() + "\n"


class BatchStore:
    """The one writer of a run's batches; the run folder is held by its ``RunStore``.

    Attributes:
        done: Keys of the batches on disk.
        note: What was repaired on opening, if anything.
    """

    def __init__(self, directory: Path) -> None:
        self._log = AppendLog(directory / BATCHES)
        self.note = self._log.note
        self.done = {record.key for record in load_batches(directory)}

    def append(self, record: BatchRecord) -> None:
        """Write one record durably.

        Raises:
            ValueError: Its key is on disk already.
            EnvironmentProblemError: The disk is full; the file ends with the record before this one.
        """
        if record.key in self.done:
            raise ValueError(f"a batch of {record.key} is on disk already")
        self._log.append(record.to_line())
        self.done.add(record.key)

    def close(self) -> None:
        """Close the file; more than once is fine."""
        self._log.close()


def load_batches(directory: Path) -> list[BatchRecord]:
    """Return the batches of a run in the order in which they were written (none if it has no such file).

    Raises:
        ConfigError: A corrupt line; file and line number are named.
    """
    path = directory / BATCHES
    if not path.is_file():
        return []
    return [_parse(line, where=f"{path} line {number}") for number, line in enumerate(read_lines(path)[0], start=1)]


def _parse(line: bytes, *, where: str) -> BatchRecord:
    try:
        return BatchRecord.model_validate(json.loads(line))
    except ValidationError as error:
        reason = first_problem(error, "record")
    except ValueError as error:
        reason = f"not JSON ({error})"
    raise ConfigError(
        f"{where} is not a batch of schema 1: {reason}; restore the file from a copy, or delete that line and --resume "
        "the run."
    )
