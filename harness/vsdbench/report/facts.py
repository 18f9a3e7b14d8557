"""A run as a report needs it: its summary in the suite's order, and what only records and configuration can tell."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from vsdbench.bench import metrics
from vsdbench.bench.batches import summarise_batches
from vsdbench.bench.image_controls import misled
from vsdbench.bench.paired import Difference, Frames, speedup_difference, tau_difference
from vsdbench.bench.summary import Summary, summarise_frames
from vsdbench.store.batches import load_batches
from vsdbench.store.examples import Examples, load_examples
from vsdbench.store.frames import to_frames
from vsdbench.store.records import Tree
from vsdbench.store.store import CONFIG, RECORDS, load_manifest, load_records

Row = dict[str, Any]
Mode = tuple[str, float]
MAX_ARMS = 8
"""Lines that can be told apart in one plot."""


def size_note(sizes: Iterable[str]) -> str:
    """Return what stands behind a table with sizes of trees (``size_words``)."""
    least = "behind ≥ the least probability of a node that is sent and of a level that is drafted"
    return f"budget/depth/children per node{f', {least}' if any('≥' in size for size in sizes) else ''}"


def size_words(tree: Mapping[str, Any]) -> str:
    """Return a tree's size, and from which probabilities on it has nodes and levels.

    >>> size_words({"budget": 8, "depth": 6, "top_k": 4, "min_node_prob": 0.1, "min_level_prob": 0.5})
    '8/6/4 ≥ 0.1/0.5'
    """
    size = "/".join(f"{tree[name]:.0f}" for name in ("budget", "depth", "top_k"))
    least = [tree.get(name, 0.0) for name in ("min_node_prob", "min_level_prob")]
    return f"{size} ≥ {least[0]:g}/{least[1]:g}" if any(least) else size


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, read once.

    Attributes:
        folder: Where it lies.
        label: Empty where it is the only one; else a letter.
        manifest: As it is on disk.
        config: The resolved suite; empty where there is none.
        summary: Of its records; baselines and drafters in the suite's order.
        frames: Records and steps.
        analysis: Of the ablation, or None.
        digest: sha256 of ``records.jsonl``.
    """

    folder: Path
    label: str
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    summary: Summary
    frames: Frames
    analysis: dict[str, Any] | None
    digest: str

    @property
    def name(self) -> str:
        """The run's id."""
        return str(self.manifest["run_id"])

    @property
    def suite(self) -> str:
        """The suite's name."""
        return str(self.summary["suite"])

    @cached_property
    def rows(self) -> list[Row]:
        """Results over all prompts, a row a drafter x mode, drafters in the suite's order within a mode."""
        return [row for row in self.summary["results"] if row["category"] is None]

    @cached_property
    def modes(self) -> list[Mode]:
        """Mode and temperature, in the order of ``rows``."""
        return list(dict.fromkeys((row["mode"], row["temperature"]) for row in self.rows))

    @cached_property
    def categories(self) -> list[str]:
        """Categories, if there is more than one."""
        found = list(dict.fromkeys(r["category"] for r in self.summary["results"] if r["category"] is not None))
        return found if len(found) > 1 else []

    @cached_property
    def methods(self) -> dict[str, Mapping[str, Any]]:
        """The manifest's entry of each drafter."""
        return {m["name"]: m for m in self.manifest.get("methods", []) if m.get("kind") == "drafter"}

    @cached_property
    def trees(self) -> dict[str, str]:
        """``kind budget/depth/top_k`` of each drafter, as its records have it (``size_words``)."""
        trees = self.frames[0].dropna(subset=["tree_kind"]).drop_duplicates("method")
        return {
            str(row["method"]): f"{row['tree_kind']} {size_words({n: row[f'tree_{n}'] for n in Tree.model_fields})}"
            for row in trees.to_dict("records")
        }

    @cached_property
    def budgets(self) -> dict[str, int]:
        """Tree budget of each drafter."""
        return {name: int(tree.split()[1].split("/")[0]) for name, tree in self.trees.items()}

    def of(self, mode: Mode, **equal: object) -> Frames:
        """Return records and steps of one mode, and of a ``method`` where it is given."""
        records, steps = self.frames
        return metrics.select(records, steps, mode=mode[0], temperature=mode[1], **equal)

    def in_mode(self, mode: Mode) -> list[Row]:
        """Return the rows of one mode."""
        return [row for row in self.rows if (row["mode"], row["temperature"]) == mode]

    @cached_property
    def view(self) -> Summary:
        """The summary that figures show: of an ablation its arms, all seeds together, else the run's own."""
        return self.summary if self.analysis is None else _arms(self, self.analysis)

    @cached_property
    def leaders(self) -> dict[tuple[Mode, str], Leader]:
        """By mode and measure (``tau``, ``speedup``): the best drafter against the second best, where there are two."""
        measures = {"tau": tau_difference, "speedup": speedup_difference}
        found: dict[tuple[Mode, str], Leader] = {}
        for mode in self.modes:
            for measure, difference in measures.items():
                leader = _leader(self, mode, measure, difference)
                if leader is not None:
                    found[mode, measure] = leader
        return found

    @cached_property
    def misled(self) -> frozenset[str]:
        """Drafters that were shown other pictures than the target: controls, which compete with nobody."""
        return misled(self.manifest)

    @cached_property
    def examples(self) -> Examples | None:
        """Answers that were kept to be drawn; None in a run from before that."""
        return load_examples(self.folder)

    @cached_property
    def control(self) -> dict[str, bool]:
        """Whether each baseline's A/A interval holds 1 in every mode; baselines without a control are left out."""
        held: dict[str, bool] = {}
        for control in self.summary["controls"]:
            if control["holds"] is not None:
                held[control["name"]] = held.get(control["name"], True) and control["holds"]
        return held

    @cached_property
    def lossless(self) -> dict[str, int]:
        """Answers of all drafters that were compared with the baseline's, and how they compared."""
        return {
            name: sum(row["lossless"][name] for row in self.rows)
            for name in ("checked", "equal", "near_tie", "violations")
        }

    @cached_property
    def date(self) -> datetime.datetime:
        """When the run ended, or began where it never ended; 1970 where a manifest says neither."""
        text = self.manifest.get("finished") or self.manifest.get("started")
        moment = datetime.datetime.fromisoformat(text) if text else datetime.datetime.fromtimestamp(0, datetime.UTC)
        return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)

    def throughput(self, name: str | None, mode: Mode) -> float | None:
        """Return tokens/s of a baseline."""
        found = [b["tokens_per_s"] for b in self.summary["baselines"]
                 if (b["name"], b["mode"], b["temperature"]) == (name, *mode)]  # fmt: skip
        return found[0] if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """The best drafter of a mode by one measure, and by how much it is ahead of the second best."""

    best: str
    second: str
    ahead: Difference

    @property
    def certain(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.ahead.ci_pct is not None and self.ahead.ci_pct[0] > 0


def load_run(folder: Path, label: str = "") -> Run:
    """Return a run, its summary made anew from its records; of an ablation, also what compares the arms.

    Raises:
        ConfigError: The folder holds no run, or its records cannot be read or are none.
    """
    manifest = load_manifest(folder)
    frames = to_frames(load_records(folder))
    if "ablation" in manifest:  # dozens of drafters, whose categories nobody reads and whose intervals take long
        frames = frames[0].assign(category=frames[0]["suite"]), frames[1]
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else None
    analysis = None
    if "ablation" in manifest:
        from vsdbench.ablation.analysis import analyse_frames  # noqa: PLC0415 - most reports need no ablation

        analysis = analyse_frames(frames, manifest)
    return Run(
        folder=folder,
        label=label,
        manifest=manifest,
        config=config or {},
        summary=ordered(summarise_frames(frames, manifest=manifest), manifest) | _batches(folder),
        frames=frames,
        analysis=analysis,
        digest=hashlib.sha256((folder / RECORDS).read_bytes()).hexdigest(),
    )


def _batches(folder: Path) -> dict[str, Any]:
    """Return the summary's entry of batches, where a run has some."""
    records = load_batches(folder)
    return {"batches": summarise_batches(records)} if records else {}


def ordered(summary: Summary, manifest: Mapping[str, Any]) -> Summary:
    """Return the summary with modes by temperature and methods in the manifest's order, not as they were drawn."""
    place = {method["name"]: index for index, method in enumerate(manifest.get("methods", []))}

    def by_method(name: str) -> Callable[[Row], tuple[float, int, str]]:
        return lambda row: (row["temperature"], place.get(row[name], len(place)), row[name])

    results = sorted(summary["results"], key=by_method("drafter"))  # stable: categories stay as they are
    rest = {name: sorted(summary[name], key=by_method("name")) for name in ("baselines", "controls")}
    return summary | rest | {"results": results}


def gaps(records: pd.DataFrame) -> list[float]:
    """Return the logit gaps of near-ties, sorted."""
    found = records.loc[records["lossless"] == "near_tie", "divergence_gap"].dropna().abs()
    return sorted(float(gap) for gap in found)


def merged(runs: Sequence[Run]) -> Summary:
    """Return one view of several runs: drafters get the run's letter, results and baselines stand one after another."""
    if len(runs) == 1:
        return runs[0].view
    results = [
        row | {"drafter": f"{row['drafter']} [{run.label}]", "baselines": run.summary["baselines"]}
        for run in runs
        for row in run.view["results"]
    ]
    return runs[0].view | {"results": sorted(results, key=lambda row: float(row["temperature"]))}


def plotted(runs: Sequence[Run]) -> list[Row]:
    """Return rows over all prompts, of an ablation only those of the arms that one plot has room for."""
    rows = [row for row in merged(runs)["results"] if row["category"] is None]
    if len(runs) == 1 and runs[0].analysis is not None:
        shown = set(shown_arms(runs[0].analysis))
        rows = [row for row in rows if row["drafter"] in shown]
    return rows


def same_prompts(first: Run, second: Run) -> bool:
    """Return whether two runs decoded the same prompts, so that they may be paired."""
    prompts = [set(zip(run.frames[0]["unit"], run.frames[0]["prompt_hash"], strict=True)) for run in (first, second)]
    return prompts[0] == prompts[1]


def _leader(
    run: Run, mode: Mode, measure: str, difference: Callable[[list[Frames], list[Frames]], Difference]
) -> Leader | None:
    rows = [row for row in run.in_mode(mode) if row[measure] is not None and row["drafter"] not in run.misled]
    known = sorted(rows, key=lambda row: -row[measure])
    if len(known) < 2:
        return None
    best, second = known[0]["drafter"], known[1]["drafter"]
    ahead = difference([run.of(mode, method=best)], [run.of(mode, method=second)])
    return Leader(best=best, second=second, ahead=ahead)


# --- ablations -----------------------------------------------------------------------------------------------------


def shown_arms(analysis: Mapping[str, Any]) -> list[str]:
    """Return the arms that one plot has room for: the reference, the controls, then those that change tau the most."""
    arms = {arm["name"]: arm for arm in analysis["arms"]}
    rest = [arm for arm in arms.values() if arm["name"] != analysis["reference"]]
    rest.sort(key=lambda arm: (not arm.get("control"), -abs(arm.get("delta_tau_pct") or 0.0)))
    chosen = {analysis["reference"], *(arm["name"] for arm in rest[: MAX_ARMS - 1])}
    return [name for name in arms if name in chosen]


def _arms(run: Run, analysis: Mapping[str, Any]) -> Summary:
    """Return the summary by arm, all seeds pooled, with the analysis' intervals of tau and none of speed."""
    listed = {arm["name"]: arm for arm in run.manifest["ablation"]["arms"]}
    tau = {
        (mode["mode"], float(mode["temperature"]), arm["name"]): arm
        for mode in analysis["modes"]
        for arm in mode["arms"]
    }
    results = []
    for mode in run.modes:
        rows = run.in_mode(mode)
        members = {name: set(arm["methods"]) for name, arm in listed.items()}
        named = set().union(*members.values())
        members |= {row["drafter"]: {row["drafter"]} for row in rows if row["drafter"] not in named}
        for name, methods in members.items():
            chosen = [row for row in rows if row["drafter"] in methods]
            if chosen:
                results.append(_arm(run, mode, name, chosen, tau.get((*mode, name))))
    return run.summary | {"results": results}


def _arm(run: Run, mode: Mode, name: str, rows: list[Row], arm: Mapping[str, Any] | None) -> Row:
    in_mode = run.of(mode)
    records = in_mode[0][in_mode[0]["method"].isin([row["drafter"] for row in rows])]
    steps = in_mode[1][in_mode[1]["record"].isin(records.index)]
    speeds = [row["speedup"] for row in rows]
    return rows[0] | {
        "drafter": name,
        "tau": metrics.tau(steps),
        "tau_definitions": metrics.tau_definitions(records, steps),
        "tau_ci": arm["tau_ci"] if arm else rows[0]["tau_ci"],
        "speedup": None if None in speeds else math.exp(sum(map(math.log, speeds)) / len(speeds)),
        "speedup_ci": None,
        "tokens_per_s": metrics.tokens_per_s(records),
        "acceptance_by_depth": metrics.acceptance_by_depth(steps),
        "time_share": metrics.time_share(records, steps),
        "lossless": metrics.lossless_counts(records),
        "diagnostics": _diagnostics(records),
        "members": [row["drafter"] for row in rows],
    }


def _diagnostics(records: pd.DataFrame) -> dict[str, Any] | None:
    """Return the misalignment of all records together, where they recorded it."""
    if "diagnostics" not in records or not records["diagnostics"].notna().any():
        return None
    from vsdbench.bench.diagnostics import misalignment  # noqa: PLC0415 - only runs that recorded it need it

    return misalignment(records["diagnostics"])
