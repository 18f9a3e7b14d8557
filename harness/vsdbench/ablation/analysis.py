"""What an ablation showed: every arm against the reference, paired by prompt and training seed, from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from vsdbench.bench import metrics, stats
from vsdbench.bench.paired import Difference, Frames, holm, speedup_difference, tau_difference
from vsdbench.errors import ConfigError
from vsdbench.store.frames import to_frames
from vsdbench.store.records import Record

SCHEMA = 1


def analyse(
    records: Sequence[Record],
    manifest: Mapping[str, Any],
    *,
    seed: int = 0,
    num_resamples: int = stats.NUM_RESAMPLES,
) -> dict[str, Any]:
    """Return the result of an ablation as plain JSON data: the object of ``ablate --json``.

    ``modes`` has the arms once a mode and temperature, in the manifest's order; ``arms`` are those of greedy decoding
    (of the first mode where there is none). Differences are the arm's from the reference, in per cent, above 0 where
    the arm is better. p-values are Holm's over the arms and, by themselves, over the controls: two questions. ``tau``
    pools an arm's seeds; its interval is over prompts, those of the differences over prompts and seeds. What an
    unfinished run cannot tell is None.

    Args:
        records: Of one run.
        manifest: Of the same run, with the key ``ablation``.
        seed: Of every bootstrap.
        num_resamples: Of every bootstrap.

    Raises:
        ConfigError: The run is no ablation, or has no records.
    """
    return analyse_frames(to_frames(records), manifest, seed=seed, num_resamples=num_resamples)


def analyse_frames(
    frames: Frames,
    manifest: Mapping[str, Any],
    *,
    seed: int = 0,
    num_resamples: int = stats.NUM_RESAMPLES,
) -> dict[str, Any]:
    """Return what ``analyse`` does, of records that are frames already."""
    frame, steps = frames
    told = manifest.get("ablation")
    if told is None:
        raise ConfigError(f"Run '{manifest.get('run_id')}' is no ablation; make one with `vsdbench ablate`.")
    if frame.empty:
        raise ConfigError("The run has no records yet, so there is nothing to analyse; continue it with --resume.")
    bootstrap = {"seed": seed, "num_resamples": num_resamples}
    modes = []
    for mode, temperature in sorted(set(zip(frame["mode"], frame["temperature"], strict=True))):
        chosen = metrics.select(frame, steps, mode=mode, temperature=temperature)
        arms = _mode(chosen, told["arms"], told["reference"], bootstrap)
        modes.append({"mode": mode, "temperature": float(temperature), "arms": arms})
    trained = [arm["budget"]["tokens"] for arm in told["arms"] if arm["seeds"]]
    return {
        "schema": SCHEMA,
        "run_id": manifest["run_id"],
        "recipe": told["recipe"],
        "reference": told["reference"],
        "equal_tokens": len(set(trained)) <= 1,
        "modes": modes,
        "arms": next((entry["arms"] for entry in modes if entry["mode"] == "greedy"), modes[0]["arms"]),
    }


def _mode(
    frames: Frames, arms: Sequence[Mapping[str, Any]], reference: str, bootstrap: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the rows of one mode, the reference's among them."""
    members = {arm["name"]: [metrics.select(*frames, method=name) for name in arm["methods"]] for arm in arms}
    theirs = members[reference]
    rows = [_row(arm, members[arm["name"]], theirs, arm["name"] == reference, bootstrap) for arm in arms]
    for control in (False, True):
        group = [row for row in rows if row["control"] is control]
        for measure in ("tau", "speedup"):
            for row, p_value in zip(group, holm([row[f"p_{measure}"] for row in group]), strict=True):
                row[f"p_{measure}_holm"] = p_value
    return rows


def _row(
    arm: Mapping[str, Any],
    ours: Sequence[Frames],
    theirs: Sequence[Frames],
    is_reference: bool,
    bootstrap: Mapping[str, int],
) -> dict[str, Any]:
    tau = _pooled_tau(ours, bootstrap)
    row = {
        "name": arm["name"],
        "disabled": arm["disabled"],
        "change": arm["change"],
        "control": arm["control"],
        "seeds": arm["seeds"],
        "tau": tau.value,
        "tau_ci": stats.as_list(tau.ci),
    }
    measured = all(len(records) for records, _ in (*ours, *theirs))
    for measure, difference in (("tau", tau_difference), ("speedup", speedup_difference)):
        found = Difference() if is_reference or not measured else difference(ours, theirs, **bootstrap)
        row |= found.entries(measure) | {f"p_{measure}_holm": None}
        if measure == "tau":
            row |= {"num_prompts": found.num_prompts or tau.num_units}
    return row | {"budget": arm["budget"]}


def _pooled_tau(members: Sequence[Frames], bootstrap: Mapping[str, int]) -> stats.Estimate:
    """Return tau over all seeds of an arm, prompts resampled with all that their seeds did on them."""
    records, steps = (pd.concat(parts) for parts in zip(*members, strict=True))
    if not len(steps):
        return stats.Estimate(value=None, ci=None, num_units=0)
    return stats.pooled_tau(metrics.emitted_and_steps(records, steps), **bootstrap)
