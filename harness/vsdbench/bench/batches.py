"""What batches show: throughput, waiting time and speedup by method and batch size, from the records of batches alone.

A step's time belongs to all answers that shared it, so each of them has its share. Where a group runs out of prompts
the batch gets smaller, and sooner for a drafter, whose answers end at different times: what is said of a batch size is
therefore said of steps in which the batch was full, and what the ends cost is said apart. The unit of every statistic
is a group of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vsdbench.bench import metrics, stats
from vsdbench.bench.paired import Frames
from vsdbench.store.batches import BatchRecord

PLAIN = "autoregressive"  # ``bench.methods.REFERENCE``; a report needs no torch
_TIMES = ("draft_ms", "verify_ms", "other_ms")
_IDENTITY = ("group", "turn", "repeat", "batch_size", "method", "kind", "mode", "temperature")


def to_frames(records: Sequence[BatchRecord]) -> Frames:
    """Return ``(answers, steps)``, with one row an answer and one a step of an answer.

    ``answers`` is numbered from 0 and has what identifies its batch, and ``lossless``; ``steps`` has ``record`` (the
    row of its answer), ``group``, ``num_sequences``, ``full`` (these are as many as the batch size), counts as in
    ``Steps``, and milliseconds as its share of the step's.
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
                    "group": record.group,
                    "num_sequences": share,
                    "full": share == record.batch_size,
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
                    "lossless": answer.lossless,
                }
            )
    return pd.DataFrame(answers), pd.concat(steps, ignore_index=True) if steps else pd.DataFrame()


def summarise_batches(records: Sequence[BatchRecord]) -> list[dict[str, Any]]:
    """Return one entry a mode, method and batch size, as plain JSON data (empty without records).

    ``tokens_per_s`` is the throughput of full batches, prefills apart; ``ms_per_token`` what an answer in them waits
    for a token; ``mean_sequences`` the answers in a step, the ends of groups included. ``speedup`` is throughput over
    that of plain decoding at the same batch size, paired by group (geometric mean; Student's t over groups), and
    ``speedup_to_end`` the same for whole groups, their ends included; ``scaling`` is throughput over that of the same
    method at the smallest batch size.
    """
    answers, steps = to_frames(records)
    if answers.empty:
        return []
    smallest = int(answers["batch_size"].min())
    rows = []

    def of(chosen: pd.DataFrame) -> pd.DataFrame:
        return steps[steps["record"].isin(chosen.index)]

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
                row |= _measures(chosen, of(chosen), size)
                plain = None if method == PLAIN else cells.get((PLAIN, size))
                smaller = None if size == smallest else cells.get((method, smallest))
                row |= _ratio("speedup", of(chosen), None if plain is None else of(plain), full=True)
                row |= _ratio("speedup_to_end", of(chosen), None if plain is None else of(plain), full=False)
                row |= _ratio("scaling", of(chosen), None if smaller is None else of(smaller), full=True)
                rows.append(row)
    return rows


def _kind(answers: pd.DataFrame, method: str) -> str:
    return str(answers.loc[answers["method"] == method, "kind"].iloc[0])


def _measures(answers: pd.DataFrame, steps: pd.DataFrame, size: int) -> dict[str, Any]:
    full = steps[steps["full"]]
    tokens, seconds = int(full["num_emitted"].sum()), _seconds(full)
    shares = {name.removesuffix("_ms"): float(full[name].sum()) / 1e3 for name in _TIMES}
    known = tokens > 0 and seconds > 0
    return {
        "tau": metrics.tau(steps),
        "tokens_per_s": tokens / seconds if known else None,
        "ms_per_token": 1e3 * size * seconds / tokens if known else None,
        "mean_sequences": len(steps) / float((1 / steps["num_sequences"]).sum()) if len(steps) else None,
        "time_share": {name: value / seconds if known else None for name, value in shares.items()},
        "lossless": metrics.lossless_counts(answers),
    }


def _seconds(steps: pd.DataFrame) -> float:
    return float(steps[list(_TIMES)].to_numpy().sum()) / 1e3


def _ratio(name: str, ours: pd.DataFrame, theirs: pd.DataFrame | None, *, full: bool) -> dict[str, Any]:
    """Return how many times the throughput of ``theirs`` ``ours`` has, by group, with the interval over groups."""
    if theirs is None:
        return {name: None, f"{name}_ci": None}
    sides = [_seconds_a_token(side[side["full"]] if full else side) for side in (theirs, ours)]
    both = pd.concat(sides, axis=1, keys=["theirs", "ours"]).dropna()
    if both.empty:
        return {name: None, f"{name}_ci": None}
    estimate = stats.t_estimate(np.log(both["theirs"].to_numpy() / both["ours"].to_numpy())).map(math.exp)
    return {name: estimate.value, f"{name}_ci": stats.as_list(estimate.ci)}


def _seconds_a_token(steps: pd.DataFrame) -> pd.Series[float]:
    """Return seconds a token of each group, turns and repeats pooled."""
    ms = steps[list(_TIMES)].sum(axis=1)
    sums = steps[["group", "num_emitted"]].assign(ms=ms).groupby("group").sum()
    sums = sums[(sums > 0).all(axis=1)]
    return sums["ms"] / 1e3 / sums["num_emitted"]
