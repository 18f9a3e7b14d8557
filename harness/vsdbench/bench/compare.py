"""Two runs, or two methods of one run, held against each other prompt by prompt: what changed from A to B.

Within a run both methods were decoded block by block on one machine, so their times are compared directly. Between two
runs the machine may have changed, so each method is first held against its own run's same-engine baseline, prompt by
prompt, and the two speedups are compared: what slowed both down alike cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from vsdbench.bench import checks, metrics, paired, stats
from vsdbench.bench.paired import Difference, Frames
from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.provenance import differences
from vsdbench.store.frames import to_frames
from vsdbench.store.store import find_run, load_manifest, load_records

Comparison: TypeAlias = dict[str, Any]
COMPARISON_SCHEMA = 1
_SEEDS = "@"
"""Methods ``ARM@SEED`` are the training seeds of one arm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a comparison.

    Attributes:
        run: Folder.
        manifest: Of the run.
        frames: Records and steps of the whole run.
        method: Method or arm that was asked for; None for all.
    """

    run: Path
    manifest: Mapping[str, Any]
    frames: Frames
    method: str | None

    @property
    def run_id(self) -> str:
        """Return the run's id."""
        return str(self.manifest["run_id"])

    def arms(self) -> dict[str, dict[str, str]]:
        """Return the method of every training seed by arm; a method without seeds has the seed "".

        Raises:
            ConfigError: The run has no method or arm of the name that was asked for.
        """
        records = self.frames[0]
        known = list(dict.fromkeys(records["method"]))
        if self.method in known:
            return {str(self.method): {"": str(self.method)}}
        wanted = known if self.method else list(dict.fromkeys(records.loc[records["kind"] == "drafter", "method"]))
        found: dict[str, dict[str, str]] = {}
        for name in wanted:
            arm, _, label = name.partition(_SEEDS)
            found.setdefault(arm, {})[label] = name
        if self.method is None:
            return found
        if self.method not in found:
            raise ConfigError(
                f"Run '{self.run_id}' has no method '{self.method}'.{did_you_mean(self.method, [*known, *found])}"
            )
        return {self.method: found[self.method]}

    def describe(self) -> dict[str, Any]:
        """Return what this side is, for the JSON object."""
        records = self.frames[0]
        single = {name: _unique(records[name]) for name in ("suite", "suite_version", "target", "dtype")}
        return {"run_id": self.run_id, "method": self.method, "device": self.manifest.get("device")} | single


def load_side(spec: str, results: Path) -> Side:
    """Return the side that ``spec`` names.

    Args:
        spec: ``RUN`` or ``RUN:METHOD``; RUN is an id, a beginning of one, ``latest`` or a folder.
        results: Folder of runs.

    Raises:
        ConfigError: No such run, or one that cannot be read.
    """
    name, _, method = (spec, "", "") if Path(spec).exists() else spec.partition(":")
    try:
        run = find_run(results, name)
    except ConfigError as error:
        if not Path(name).exists():
            raise
        raise ConfigError(
            f"'{name}' is not a run: to compare checkpoints or recipes, say on what: "
            f"vsdbench compare {spec} OTHER --suite SUITE."
        ) from error
    records = load_records(run)
    if not records:
        raise ConfigError(f"Run '{run.name}' has no records yet; continue it with vsdbench run --resume.")
    return Side(run=run, manifest=load_manifest(run), frames=to_frames(records), method=method or None)


def compare(a: Side, b: Side, *, seed: int = 0, num_resamples: int = stats.NUM_RESAMPLES) -> Comparison:
    """Return what changed from ``a`` to ``b`` as plain JSON data, one row a method (or arm) and mode of both.

    Prompts are paired by their hash and turn (by their name within one run). P-values are Holm-adjusted over the rows,
    for tau and for speed apart.

    Args:
        a: The reference.
        b: What is held against it.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples of the prompts.

    Raises:
        ConfigError: Nothing in common.
    """
    same_run = a.run.resolve() == b.run.resolve()
    if same_run and (a.method is None or b.method is None or a.method == b.method):
        raise ConfigError(f"Both sides are of '{a.run_id}': name two of its methods, for example {_example(a)}.")
    warnings = [] if same_run else _differences_of_runs(a, b)
    for side in [a] if same_run else [a, b]:
        noise = checks.noise({"controls": checks.controls(side.frames[0])})
        warnings += [f"{side.run_id}: {sentence}" for sentence in noise]
    sides = [side.frames if same_run else _by_hash(side.frames) for side in (a, b)]
    rows: list[dict[str, Any]] = []
    for names, methods in _pairs(a, b, warnings):
        for mode, temperature in _modes(sides, methods):
            parts = [
                [metrics.select(*frames, method=method, mode=mode, temperature=temperature) for method in members]
                for frames, members in zip(sides, methods, strict=True)
            ]
            baselines = None if same_run else [_baseline(frames, mode, temperature) for frames in sides]
            identity = {"a": names[0], "b": names[1], "mode": mode, "temperature": temperature}
            rows.append(identity | _row(parts, baselines, seed, num_resamples))
    _check_common(rows, a, b)
    for metric in ("tau", "speedup"):
        adjusted = paired.holm([row[f"p_{metric}"] for row in rows])
        for row, p_value in zip(rows, adjusted, strict=True):
            row[f"p_{metric}_holm"] = p_value
    return {
        "schema": COMPARISON_SCHEMA,
        "a": a.describe(),
        "b": b.describe(),
        "same_run": same_run,
        "confidence": stats.CONFIDENCE,
        "rows": rows,
        "warnings": warnings,
        "gates": [],
    }


# --- rows ----------------------------------------------------------------------------------------------------------


def _row(
    parts: Sequence[Sequence[Frames]], baselines: Sequence[Frames | None] | None, seed: int, num_resamples: int
) -> dict[str, Any]:
    """Return the numbers of one row.

    Args:
        parts: Members (one a training seed) of A and of B, of one mode.
        baselines: Of each run, if there are two; a member is None where a run lacks it.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples.
    """
    options = {"seed": seed, "num_resamples": num_resamples}
    ours, theirs = _on_common_turns(parts)
    tau = paired.tau_difference(theirs, ours, **options)
    if baselines is None:
        speedup = paired.speedup_difference(theirs, ours, **options)
    else:
        speedup = _speedup_against_own(ours, theirs, baselines, options)
    return {
        "num_prompts": len(set.intersection(*(set(records["unit"]) for records, _ in (*ours, *theirs)))),
        "num_seeds": tau.num_seeds,
        "tau_a": metrics.tau(pd.concat([steps for _, steps in ours])),
        "tau_b": metrics.tau(pd.concat([steps for _, steps in theirs])),
        **tau.entries("tau"),
        **speedup.entries("speedup"),
    }


def _speedup_against_own(
    ours: Sequence[Frames], theirs: Sequence[Frames], baselines: Sequence[Frames | None], options: dict[str, int]
) -> Difference:
    """Return the change from A's speedup over A's baseline to B's over B's, paired by prompt."""
    num_seeds = max(len(ours), len(theirs))
    if baselines[0] is None or baselines[1] is None:
        return Difference(num_seeds=num_seeds)
    (own, *ours), (other, *theirs) = _on_common_turns([[baselines[0], *ours], [baselines[1], *theirs]])
    before = [stats.log_ratios(records, own[0]) for records, _ in ours]
    after = [stats.log_ratios(records, other[0]) for records, _ in theirs]
    before, after = (side * (num_seeds if len(side) == 1 else 1) for side in (before, after))
    changes = [(new - old).dropna() for old, new in zip(before, after, strict=True)]
    return paired.mean_difference(changes, **options)


def _on_common_turns(parts: Sequence[Sequence[Frames]]) -> list[list[Frames]]:
    """Return the same frames with the prompts and turns that all of them have."""
    keys = [pd.MultiIndex.from_frame(records[["unit", "turn"]]) for side in parts for records, _ in side]
    common = keys[0]
    for other in keys[1:]:
        common = common.intersection(other)

    def cut(records: pd.DataFrame, steps: pd.DataFrame) -> Frames:
        kept = records[pd.MultiIndex.from_frame(records[["unit", "turn"]]).isin(common)]
        return kept, steps[steps["record"].isin(kept.index)]

    return [[cut(*frames) for frames in side] for side in parts]


# --- what is paired with what --------------------------------------------------------------------------------------


def _pairs(a: Side, b: Side, warnings: list[str]) -> Iterator[tuple[tuple[str, str], tuple[list[str], list[str]]]]:
    """Yield the names of both arms and their methods, seed by seed; what has no partner is added to ``warnings``."""
    ours, theirs = a.arms(), b.arms()
    both = a.method is not None and b.method is not None
    names = [(str(a.method), str(b.method))] if both else [(name, name) for name in ours if name in theirs]
    if not names:
        raise ConfigError(
            f"No method has the same name in '{a.run_id}' ({', '.join(ours)}) and '{b.run_id}' ({', '.join(theirs)}): "
            f"name one of each, for example {a.run_id}:{next(iter(ours), 'METHOD')} "
            f"{b.run_id}:{next(iter(theirs), 'METHOD')}."
        )
    if not (a.method or b.method):
        for side, own, others in ((a, ours, theirs), (b, theirs, ours)):
            alone = [name for name in own if name not in others]
            warnings += [f"only '{side.run_id}' has {', '.join(alone)}"] if alone else []
    for mine, other in names:
        yield (mine, other), _same_seeds((mine, ours[mine]), (other, theirs[other]), warnings)


def _same_seeds(
    ours: tuple[str, dict[str, str]], theirs: tuple[str, dict[str, str]], warnings: list[str]
) -> tuple[list[str], list[str]]:
    (name, mine), (other_name, other) = ours, theirs
    if len(mine) == 1 or len(other) == 1:
        return list(mine.values()), list(other.values())
    common = [label for label in mine if label in other]
    if not common:
        raise ConfigError(
            f"'{name}' (training seeds {', '.join(mine)}) and '{other_name}' ({', '.join(other)}) have no seed in "
            f"common: name one method of each, for example {next(iter(mine.values()))}."
        )
    alone = [label for label in {**mine, **other} if label not in common]
    if alone:
        warnings.append(f"training seeds {', '.join(alone)} of '{name}' or '{other_name}' have no partner")
    return [mine[label] for label in common], [other[label] for label in common]


def _modes(sides: Sequence[Frames], methods: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Return mode and temperature of what every method was decoded in, greedy first."""
    found = [
        set(zip(rows["mode"], rows["temperature"], strict=True))
        for (records, _), members in zip(sides, methods, strict=True)
        for rows in (records[records["method"] == method] for method in members)
    ]
    return sorted(set.intersection(*found))


def _baseline(frames: Frames, mode: str, temperature: float) -> Frames | None:
    """Return the same engine's baseline: the method whose answers are the reference of the others."""
    records, steps = metrics.select(*frames, mode=mode, temperature=temperature, lossless="reference")
    return (records, steps) if len(records) else None


def _by_hash(frames: Frames) -> Frames:
    records, steps = frames
    return records.assign(unit=records["prompt_hash"]), steps


def _check_common(rows: Sequence[Mapping[str, Any]], a: Side, b: Side) -> None:
    if not rows:
        raise ConfigError(f"'{a.run_id}' and '{b.run_id}' were decoded in no common mode and temperature.")
    if not any(row["num_prompts"] for row in rows):
        raise ConfigError(
            f"'{a.run_id}' and '{b.run_id}' have no prompt in common: run one suite with both, or compare methods "
            "within a run."
        )


def _example(side: Side) -> str:
    names = [*dict.fromkeys(side.frames[0]["method"]), "METHOD", "METHOD"]
    return f"{side.run_id}:{names[0]} {side.run_id}:{names[1]}"


# --- warnings ------------------------------------------------------------------------------------------------------


def _differences_of_runs(a: Side, b: Side) -> list[str]:
    """Return a sentence for everything beside the methods that is not the same in both runs."""
    told = []
    modes = set(a.frames[0]["mode"]) & set(b.frames[0]["mode"])
    in_common = [side.frames[0][side.frames[0]["mode"].isin(modes)] for side in (a, b)]
    for name, columns in {
        "targets": ("target", "target_fingerprint"),
        "suites": ("suite", "suite_version"),
        "dtypes": ("dtype",),
        "chat templates": ("template_hash",),
        "token limits": ("max_new_tokens",),
        "verification rules": ("rule",),
        "values of top_p": ("top_p",),
        "values of sampling_top_k": ("sampling_top_k",),
    }.items():
        values = [[_unique(records[column]) for column in columns] for records in in_common]
        if values[0] != values[1]:
            told.append(f"the {name} differ: {' and '.join(map(' '.join, values))}")
    if changed := differences(*(side.manifest.get("machine") or {} for side in (a, b))):
        told.append(f"the machines differ: {'; '.join(changed)}")
    prompts = [set(side.frames[0]["prompt_hash"]) for side in (a, b)]
    common = prompts[0] & prompts[1]
    if prompts[0] != prompts[1]:
        told.append(f"of {len(prompts[0])} and {len(prompts[1])} prompts, {len(common)} are in both runs and compared")
    return told


def _unique(values: Iterable[Any]) -> str:
    known = {value if isinstance(value, str) else f"{value:g}" for value in values if not pd.isna(value)}
    return " + ".join(sorted(known)) or "none"
