"""What drafters lose when they are shown other pictures: each against its own control, paired by prompt.

A control is a drafter of the same weights and the same tree with ``images: shuffled`` (``bench.exchange``); the run's
manifest says whose control it is. Training seeds ``NAME@SEED`` count as a second level, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from vsdbench.bench import metrics
from vsdbench.bench.paired import Frames, tau_difference


def misled(manifest: Mapping[str, Any]) -> frozenset[str]:
    """Return the drafters of a run that were shown other pictures than the target."""
    return frozenset(method["name"] for method in manifest.get("methods", []) if method.get("images") == "shuffled")


def image_controls(
    frames: Frames, manifest: Mapping[str, Any], *, seed: int = 0, num_resamples: int
) -> list[dict[str, Any]]:
    """Return one entry a drafter that has a control x mode: tau with its own pictures, with others, and the change.

    Only prompts with pictures count. The change is that of the control relative to the drafter in per cent, below 0
    where the picture helps, with its 95 % interval and p-value.

    Args:
        frames: Records and steps of the run.
        manifest: Of the run; one from before there were controls has none.
        seed: Of the bootstrap.
        num_resamples: Of the bootstrap.
    """
    of = {method["name"]: method["control_of"] for method in manifest.get("methods", []) if method.get("control_of")}
    families: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for control, drafter in of.items():
        families.setdefault((family(drafter), family(control)), []).append((drafter, control))
    seeing = frames[0][frames[0]["num_image_tokens"] > 0]
    found: list[dict[str, Any]] = []
    for (mode, _), records in seeing.groupby(["mode", "temperature"], sort=True):
        for (drafter, control), members in families.items():
            sides = [[metrics.select(records, frames[1], method=pair[side]) for pair in members] for side in (0, 1)]
            if any(part[1].empty for side in sides for part in side):
                continue
            change = tau_difference(sides[1], sides[0], seed=seed, num_resamples=num_resamples)
            if change.change_pct is None:
                continue
            tau = [metrics.tau(pd.concat([steps for _, steps in side])) for side in sides]
            found.append(
                {
                    "drafter": drafter,
                    "control": control,
                    "mode": mode,
                    "temperature": float(records["temperature"].iloc[0]),
                    "num_prompts": change.num_prompts,
                    "num_seeds": change.num_seeds,
                    "tau": tau[0],
                    "tau_shuffled": tau[1],
                    **change.entries("tau"),
                }
            )
    return found


def told(entry: Mapping[str, Any]) -> str:
    """Return an entry of ``image_controls`` in words."""
    interval = ""
    if entry["delta_tau_ci"] is not None:
        interval = f" (95 % interval {entry['delta_tau_ci'][0]:+.1f} to {entry['delta_tau_ci'][1]:+.1f})"
    taus = f"tau {entry['tau']:.2f} becomes {entry['tau_shuffled']:.2f}, {entry['delta_tau_pct']:+.1f} %"
    return f"Shown another picture, {entry['drafter']} at T = {entry['temperature']:g}: {taus}{interval}."


def family(name: str) -> str:
    """Return what the training seeds ``NAME@SEED`` of a drafter have in common."""
    return name.partition("@")[0]
