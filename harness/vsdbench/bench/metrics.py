"""The one place where each metric is defined: pure functions of the frames that ``store.frames.to_frames`` gives.

``records`` has one row a record, ``steps`` one row a verification step with ``record`` naming its row. A metric that
has no value (no steps, no decode time) is None, never NaN, so that it is ``null`` in JSON.
"""

from __future__ import annotations

import numpy as np
import pandas as pd


def select(records: pd.DataFrame, steps: pd.DataFrame, **equal: object) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of both frames whose record has the given values, e.g. ``method="ngram", mode="greedy"``."""
    keep = pd.Series(data=True, index=records.index)
    for column, value in equal.items():
        keep &= records[column] == value
    chosen = records[keep]
    numbers = steps["record"].to_numpy()
    highest = max((int(values.max()) for values in (chosen.index, numbers) if len(values)), default=-1)
    wanted = np.zeros(highest + 1, dtype=bool)
    wanted[chosen.index] = True
    return chosen, steps[wanted[numbers]]


# --- accepted length -----------------------------------------------------------------------------------------------


def tau(steps: pd.DataFrame) -> float | None:
    """Return tokens emitted a verification step: sum of ``num_emitted`` / steps, pooled over everything given.

    The bonus or correction token is counted, tokens past EOS or the length limit are not, and the first token, which
    the prefill gives, belongs to no step. Plain autoregressive decoding has 1, an oracle chain of depth d has d + 1.
    """
    return _ratio(steps["num_emitted"].sum(), len(steps))


def tau_without_bonus(steps: pd.DataFrame) -> float | None:
    """Return draft tokens kept a step (zero-based): the ``accept_length`` that EAGLE's evaluation writes to its log."""
    return _ratio(steps["num_accepted"].sum(), len(steps))


def tau_accepted_plus_one(steps: pd.DataFrame) -> float | None:
    """Return 1 + draft tokens kept / steps, as read off vLLM's counters.

    It is a little above ``tau``: a step whose answer ends with a draft token emits no bonus, but has one counted here.
    """
    return _ratio(steps["num_accepted"].sum() + len(steps), len(steps))


def tau_prompt_mean(by_prompt: pd.DataFrame) -> float | None:
    """Return the mean over prompts of each prompt's own tau, so that short answers weigh as much as long ones.

    Args:
        by_prompt: As ``emitted_and_steps`` gives it.
    """
    return _mean(by_prompt["num_emitted"] / by_prompt["num_steps"])


def tau_answer_mean(steps: pd.DataFrame) -> float | None:
    """Return the mean over answers (prompt x turn x repeat) of each answer's own tau."""
    return _mean(steps.groupby("record")["num_emitted"].mean())


def tau_with_prefill(records: pd.DataFrame, steps: pd.DataFrame) -> float | None:
    """Return output tokens a target forward, prefills counted as forwards: (emitted + answers) / (steps + answers)."""
    answers = int(records.index.isin(steps["record"]).sum())
    return _ratio(steps["num_emitted"].sum() + answers, len(steps) + answers)


def tau_definitions(
    records: pd.DataFrame, steps: pd.DataFrame, by_prompt: pd.DataFrame | None = None
) -> dict[str, float | None]:
    """Return every definition of tau found in the literature by name; ``pooled`` is the one used everywhere else.

    Args:
        records: Rows of the records frame.
        steps: Their steps.
        by_prompt: What ``emitted_and_steps`` gives of both, where it is known already.
    """
    return {
        "pooled": tau(steps),
        "prompt_mean": tau_prompt_mean(emitted_and_steps(records, steps) if by_prompt is None else by_prompt),
        "answer_mean": tau_answer_mean(steps),
        "without_bonus": tau_without_bonus(steps),
        "accepted_plus_one": tau_accepted_plus_one(steps),
        "with_prefill": tau_with_prefill(records, steps),
    }


def emitted_and_steps(records: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Return ``num_emitted`` and ``num_steps`` summed by prompt (index ``unit``, sorted), turns and repeats pooled."""
    by_record = steps.groupby("record")["num_emitted"].agg(num_emitted="sum", num_steps="size")
    sums: pd.DataFrame = by_record.assign(unit=records["unit"].loc[by_record.index]).groupby("unit").sum()
    return sums


def acceptance_rate_at_depth(steps: pd.DataFrame, depth: int) -> float | None:
    """Return draft tokens kept at ``depth`` (1-based) / steps that reached it.

    A step reaches depth d if its tree was at least d deep, it kept at least d - 1 draft tokens, and the answer did not
    end with the last of these: about what stands behind an end token or the length limit the target had no say.
    """
    accepted = steps["num_accepted"].to_numpy()
    kept = accepted >= depth
    refused = (accepted == depth - 1) & (steps["num_emitted"].to_numpy() > accepted)
    reached = (steps["depth"].to_numpy() >= depth) & (kept | refused)
    return _ratio(int(np.count_nonzero(reached & kept)), int(np.count_nonzero(reached)))


def acceptance_by_depth(steps: pd.DataFrame) -> list[float | None]:
    """Return ``acceptance_rate_at_depth`` for depths 1 … deepest tree proposed (empty without drafting)."""
    deepest = int(steps["depth"].max()) if len(steps) else 0
    return [acceptance_rate_at_depth(steps, depth) for depth in range(1, deepest + 1)]


# --- time ----------------------------------------------------------------------------------------------------------


def tokens_per_s(records: pd.DataFrame) -> float | None:
    """Return decode throughput: sum of ``num_output_tokens - 1`` / sum of ``decode_s`` (prefill apart)."""
    return _ratio((records["num_output_tokens"] - 1).sum(), records["decode_s"].sum())


def seconds_per_token(records: pd.DataFrame) -> pd.Series[float]:
    """Return decode seconds a token by prompt (index ``unit``, sorted): repeats averaged, then turns pooled.

    Prompts without a decoded token (every answer ended with its first) are left out.
    """
    return _pool_turns(by_turn(records))


def paired_seconds_per_token(method: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Return ``method_s`` and ``reference_s``, decode seconds a token by prompt (index ``unit``), on what both did.

    Only prompt x turn pairs that both have count, so that an interrupted run compares like with like. Repeats are
    averaged within a turn (their numbers may differ), turns are pooled within the prompt.

    Args:
        method: As ``by_turn`` gives it.
        reference: Likewise.
    """
    theirs = reference.reindex(method.index).add_suffix("_reference")
    both = pd.concat([method, theirs], axis=1).dropna()
    sums = both.groupby(level="unit").sum()
    sums = sums[(sums > 0).all(axis=1)]
    pair = {
        "method_s": sums["decode_s"] / sums["num_tokens"],
        "reference_s": sums["decode_s_reference"] / sums["num_tokens_reference"],
    }
    return pd.DataFrame(pair)


def by_turn(records: pd.DataFrame) -> pd.DataFrame:
    """Return ``num_tokens`` and ``decode_s`` averaged over repeats, indexed by (unit, turn)."""
    frame = records[["unit", "turn", "decode_s"]].assign(num_tokens=records["num_output_tokens"] - 1)
    return frame.groupby(["unit", "turn"])[["num_tokens", "decode_s"]].mean()


def time_share(records: pd.DataFrame, steps: pd.DataFrame) -> dict[str, float | None]:
    """Return the shares of decode time spent in the drafter, in the target, and in everything else.

    ``other`` is decode time minus the two, so that the three add up to 1. Answers without steps are left out.
    """
    decode_s = records.loc[records.index.isin(steps["record"]), "decode_s"].sum()
    draft = _ratio(steps["draft_ms"].sum() / 1e3, decode_s)
    verify = _ratio(steps["verify_ms"].sum() / 1e3, decode_s)
    other = None if draft is None or verify is None else 1.0 - draft - verify
    return {"draft": draft, "verify": verify, "other": other}


# --- losslessness --------------------------------------------------------------------------------------------------


def lossless_counts(records: pd.DataFrame) -> dict[str, int]:
    """Return how many answers were compared with the baseline token by token, and how those compared."""
    counts = {name: int((records["lossless"] == name).sum()) for name in ("equal", "near_tie", "violation")}
    return {
        "checked": sum(counts.values()),
        "equal": counts["equal"],
        "near_tie": counts["near_tie"],
        "violations": counts["violation"],
    }


# --- shared --------------------------------------------------------------------------------------------------------


def _pool_turns(by_turn: pd.DataFrame) -> pd.Series[float]:
    sums = by_turn.groupby(level="unit").sum()
    sums = sums[(sums["num_tokens"] > 0) & (sums["decode_s"] > 0)]
    return sums["decode_s"] / sums["num_tokens"]


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator) / float(denominator) if denominator > 0 else None


def _mean(values: pd.Series[float]) -> float | None:
    return float(values.mean()) if len(values) else None
