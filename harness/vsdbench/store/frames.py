"""Records as two data frames, the form in which metrics and statistics take them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vsdbench.store.records import STEP_COLUMNS, Divergence, Record, Tree

_NESTED = {"steps", "tree", "divergence", "diagnostics"}
_INTEGERS = {"num_nodes", "depth", "num_accepted", "num_emitted"}


def to_frames(records: Sequence[Record]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return ``(records, steps)``.

    ``records`` has one row a record, numbered from 0, with the record's scalar fields, ``tree_*``, ``divergence_*``,
    ``num_steps``, ``unit`` (suite and prompt id: the unit of every statistic) and ``diagnostics`` as they are (objects,
    or None). ``steps`` has one row a verification step: ``record`` (the row of its record), ``step`` (0-based) and the
    columns of ``Steps``.
    """
    frame = pd.DataFrame(_columns(records))
    frame.index.name = "record"
    lengths = np.array([len(record.steps) for record in records], dtype=np.int64)
    data: dict[str, np.ndarray] = {
        "record": np.repeat(np.arange(len(records), dtype=np.int64), lengths),
        "step": np.concatenate([np.arange(n, dtype=np.int64) for n in lengths] or [np.empty(0, dtype=np.int64)]),
    }
    for name in STEP_COLUMNS:
        values = itertools.chain.from_iterable([getattr(record.steps, name) for record in records])
        data[name] = np.fromiter(values, np.int64 if name in _INTEGERS else np.float64, count=int(lengths.sum()))
    return frame, pd.DataFrame(data)


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Return the columns of the records frame, in order."""
    columns: dict[str, list[Any]] = {"unit": [f"{record.suite}/{record.prompt_id}" for record in records]}
    names = [name for name in Record.model_fields if name not in _NESTED]
    rows = list(map(operator.attrgetter(*names), records))  # a record at a time, which a processor's cache likes
    for index, name in enumerate(names):
        columns[name] = [row[index] for row in rows]
    for prefix, model in (("tree", Tree), ("divergence", Divergence)):
        parts = [getattr(record, prefix) for record in records]
        for name in model.model_fields:
            columns[f"{prefix}_{name}"] = [getattr(part, name) if part else None for part in parts]
    columns["num_steps"] = [len(record.steps) for record in records]
    columns["diagnostics"] = [record.diagnostics for record in records]
    return columns
