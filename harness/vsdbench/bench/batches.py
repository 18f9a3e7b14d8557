"""What batches show: throughput, waiting time and speedup by method and batch size, from the records of batches alone.

A step's time belongs to all answers that shared it. ``whole_s`` counts it once, by giving each its share; an answer's
own ``decode_s`` counts it whole, since that is how long it waited. The unit of every statistic is a group of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from vsdbench.bench import metrics, stats
from vsdbench.store.batches import BatchRecord

Frames: TypeAlias = tuple[pd.DataFrame, pd.DataFrame]
_PLAIN = "autoregressive"  # ``bench.methods.REFERENCE``; a report needs no torch
_TIMES = ("draft_ms", "verify_ms", "other_ms")
_IDENTITY = ("group", "turn", "repeat", "batch_size", "method", "kind", "mode", "temperature")


def to_frames(records: Sequence[BatchRecord]) -> Frames:
    """Return ``(answers, steps)``, with one row an answer and one a step of an answer.

    ``answers`` is numbered from 0 and has what identifies its batch, ``num_output_tokens``, ``decode_s``, ``whole_s``
    (its share of the batch's decode time) and ``lossless``; ``steps`` has ``record`` (the row of its answer), counts as
    in ``Steps``, and milliseconds as its share.
    """
    answers: list[dict[str, Any]] = []
    steps: list[pd.DataFrame] = []
    for record in records:
        for answer in record.answers:
            share = np.asarray(answer.num_sequences, dtype=np.float64)
            own = answer.steps
            frame = pd.DataFrame(
                {
                    "record": len(answers),
                    "num_accepted": np.asarray(own.num_accepted, dtype=np.int64),
                    "num_emitted": np.asarray(own.num_emitted, dtype=np.int64),
                    **{name: np.asarray(getattr(own, name), dtype=np.float64) / share for name in _TIMES},
                }
            )
            steps.append(frame)
            answers.append(
                {
                    **{name: getattr(record, name) for name in _IDENTITY},
                    "prompt_id": answer.prompt_id,
                    "num_output_tokens": answer.num_output_tokens,
                    "decode_s": answer.decode_s,
                    "whole_s": float(frame[list(_TIMES)].to_numpy().sum()) / 1e3,
                    "lossless": answer.lossless,
                }
            )
    return pd.DataFrame(answers), pd.concat(steps, ignore_index=True) if steps else pd.DataFrame()


def summarise_batches(records: Sequence[BatchRecord]) -> list[dict[str, Any]]:
    """Return one entry a mode, method and batch size, as plain JSON data (empty without records).

    ``tokens_per_s`` is the throughput of the whole batch, prefills apart; ``ms_per_token`` what an answer waits for a
    token; ``mean_sequences`` the answers in a step, fewer than ``batch_size`` where a group runs out. ``speedup`` is
    over plain decoding at the same batch size, paired by group (geometric mean; Student's t over groups), and
    ``scaling`` is throughput over that of the same method at the smallest batch size, likewise.
    """
    answers, steps = to_frames(records)
    if answers.empty:
        return []
    smallest = int(answers["batch_size"].min())
    rows = []
    for (mode, temperature), part in answers.groupby(["mode", "temperature"], sort=True):
        cells = {
            (str(method), int(str(size))): rows_of
            for (method, size), rows_of in part.groupby(["method", "batch_size"], sort=False)
        }
        for method in sorted({method for method, _ in cells}, key=lambda name: (_kind(part, name) != "baseline", name)):
            for size in sorted({size for name, size in cells if name == method}):
                chosen = cells[method, size]
                row = {
                    "drafter": method,
                    "kind": _kind(part, method),
                    "mode": mode,
                    "temperature": float(str(temperature)),
                    "batch_size": size,
                    "num_prompts": int(chosen["prompt_id"].nunique()),
                    "num_groups": int(chosen["group"].nunique()),
                }
                row |= _measures(chosen, steps[steps["record"].isin(chosen.index)])
                plain = cells.get((_PLAIN, size))
                row |= _ratio("speedup", chosen, None if method == _PLAIN else plain)
                row |= _ratio("scaling", chosen, None if size == smallest else cells.get((method, smallest)))
                rows.append(row)
    return rows


def _kind(answers: pd.DataFrame, method: str) -> str:
    return str(answers.loc[answers["method"] == method, "kind"].iloc[0])


def _measures(answers: pd.DataFrame, steps: pd.DataFrame) -> dict[str, Any]:
    tokens = int((answers["num_output_tokens"] - 1).sum())
    whole_s, waited_s = float(answers["whole_s"].sum()), float(answers["decode_s"].sum())
    shares = {name.removesuffix("_ms"): float(steps[name].sum()) / 1e3 for name in _TIMES}
    known = tokens > 0 and whole_s > 0
    return {
        "tau": metrics.tau(steps),
        "tokens_per_s": tokens / whole_s if known else None,
        "ms_per_token": 1e3 * waited_s / tokens if known else None,
        "mean_sequences": waited_s / whole_s if known else None,
        "time_share": {name: value / whole_s if known else None for name, value in shares.items()},
        "lossless": metrics.lossless_counts(answers),
    }


def _ratio(name: str, ours: pd.DataFrame, theirs: pd.DataFrame | None) -> dict[str, Any]:
    """Return how many times the throughput of ``theirs`` ``ours`` has, by group, with the interval over groups."""
    if theirs is None:
        return {name: None, f"{name}_ci": None}
    sides = [_seconds_a_token(side) for side in (theirs, ours)]
    both = pd.concat(sides, axis=1, keys=["theirs", "ours"]).dropna()
    if both.empty:
        return {name: None, f"{name}_ci": None}
    estimate = stats.t_estimate(np.log(both["theirs"].to_numpy() / both["ours"].to_numpy())).map(math.exp)
    return {name: estimate.value, f"{name}_ci": None if estimate.ci is None else list(estimate.ci)}


def _seconds_a_token(answers: pd.DataFrame) -> pd.Series[float]:
    """Return seconds a token of each group, turns and repeats pooled; groups without a decoded token are left out."""
    frame = answers[["group", "whole_s"]].assign(num_tokens=answers["num_output_tokens"] - 1)
    sums = frame.groupby("group").sum()
    sums = sums[(sums > 0).all(axis=1)]
    return sums["whole_s"] / sums["num_tokens"]
