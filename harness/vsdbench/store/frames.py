"""Records as two data frames, the form in which metrics and statistics take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vsdbench.store.records import STEP_COLUMNS, Divergence, Record, Tree

_NESTED = {"steps": True, "tree": True, "divergence": True, "diagnostics": True}
_INTEGERS = {"num_nodes", "depth", "num_accepted", "num_emitted"}


def to_frames(records: Sequence[Record]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return ``(records, steps)``.

    ``records`` has one row a record, numbered from 0, with the record's scalar fields, ``tree_*``, ``divergence_*``,
    ``num_steps``, ``unit`` (suite and prompt id: the unit of every statistic) and ``diagnostics`` as they are (objects,
    or None). ``steps`` has one row a verification step: ``record`` (the row of its record), ``step`` (0-based) and the
    columns of ``Steps``.
    """
    frame = pd.DataFrame([_row(record) for record in records], columns=_columns())
    frame.index.name = "record"
    lengths = np.array([len(record.steps) for record in records], dtype=np.int64)
    data: dict[str, np.ndarray] = {
        "record": np.repeat(np.arange(len(records), dtype=np.int64), lengths),
        "step": np.concatenate([np.arange(n, dtype=np.int64) for n in lengths] or [np.empty(0, dtype=np.int64)]),
    }
    for name in STEP_COLUMNS:
        values = [value for record in records for value in getattr(record.steps, name)]
        data[name] = np.array(values, dtype=np.int64 if name in _INTEGERS else np.float64)
    return frame, pd.DataFrame(data)


def _row(record: Record) -> dict[str, object]:
    row: dict[str, object] = {"unit": f"{record.suite}/{record.prompt_id}"}
    row |= record.model_dump(exclude=_NESTED, by_alias=False)
    for prefix, part, model in (("tree", record.tree, Tree), ("divergence", record.divergence, Divergence)):
        row |= {f"{prefix}_{name}": getattr(part, name) if part else None for name in model.model_fields}
    return row | {"num_steps": len(record.steps), "diagnostics": record.diagnostics}


def _columns() -> list[str]:
    scalars = [name for name in Record.model_fields if name not in _NESTED]
    nested = [
        f"{prefix}_{name}"
        for prefix, model in (("tree", Tree), ("divergence", Divergence))
        for name in model.model_fields
    ]
    return ["unit", *scalars, *nested, "num_steps", "diagnostics"]
