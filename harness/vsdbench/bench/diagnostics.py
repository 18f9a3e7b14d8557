"""What token losses do not see: how the drafter's own preference differs from what decoding keeps of its trees.

A drafter is trained along one path, the tokens that it finds likeliest; decoding ranks whole paths, prunes, and keeps
whatever the target agrees with. The engine keeps references to every tree and to the path kept of it; they are counted
here, after the clock was stopped, into the ``Diagnostics`` of a record. Shares and means are taken once counts are
summed over records.

**Greedy path.** From the root the likeliest child, the first of equals, as far as the tree goes. It was pruned if it is
shorter than what the drafter could have sent: the depth asked for, but not more than the budget or than the drafter's
own ``max_depth``. What the target keeps of it is the beginning that it shares with the kept path. Under the rules
``greedy`` and ``coupled`` that is exactly what the target would have kept had the greedy path been the whole tree.

**Calibration.** Counted are all children of every node that was kept, and of the root; not those of a kept token with
which the answer ends, since the target had no say about them. Siblings behind an accepted one count as not kept, under
every rule: at most one child of a node can be kept, and where children are chosen deterministically all four rules,
being lossless, keep a given child with the target's probability of it, whether it was tried first or last (under
``rejection`` the second is reached with probability 1 - p₁ and then accepted with p₂ / (1 - p₁)). At temperature 1 a
drafter that equals the target is therefore calibrated; at 0 the target has no doubts, so a good drafter is kept more
often than its confidence says where that is high, and less often where it is low. Where children are drawn from the
draft distribution, one is accepted with min(1, p/q): a perfect drafter has every first child kept, however unlikely,
and its probability is no forecast of that. Then there is no calibration, and no greedy path either, as the likeliest
child may not have been drawn.

**Compactness.** A node's rank is its place in its tree by the probability of its path, the first of equals first. The
best nodes of a dynamic tree are the smaller dynamic tree (growth only stops earlier), so the kept nodes of rank below b
are what a budget of b would have kept in these steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from vsdbench.store.records import NUM_BINS, Calibration, Diagnostics

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import Generation, TreeShape

SHARE_OF_KEPT: Final = 0.95
"""Of the kept nodes, for ``nodes_for_95``."""
_DIGITS = 6


def diagnose(generation: Generation, shape: TreeShape, *, max_depth: int | None = None) -> Diagnostics | None:
    """Return the counts of one answer; None where its engine does not tell what it proposed, or there were no steps.

    Args:
        generation: The answer.
        shape: What the drafter was asked for.
        max_depth: The deepest tree that the drafter can propose; None: any.
    """
    if not generation.drafted:
        return None
    reach = min(shape.depth, shape.budget, *([] if max_depth is None else [max_depth]))
    drawn = any(step.drawn for step in generation.drafted)
    has_probs = all(step.has_probs for step in generation.drafted)
    tally = _Tally()
    for step, counts in zip(generation.drafted, generation.steps, strict=True):
        ended = counts.num_emitted == len(step.path)  # with a kept draft token: what follows it was not looked at
        tally.add(step.parents, step.log_probs.tolist(), step.path, reach=reach, ended=ended)
    return tally.diagnostics(greedy=not drawn, pruned=has_probs and not drawn, calibrated=has_probs and not drawn)


class _Tally:
    """Counts of one answer's steps."""

    def __init__(self) -> None:
        self.num_steps = self.num_pruned = self.num_kept_steps = self.num_greedy_steps = 0
        self.greedy_tokens = self.tree_tokens = 0
        self.kept_by_rank: list[int] = []
        self.count, self.kept, self.sum_confidence = [0] * NUM_BINS, [0] * NUM_BINS, [0.0] * NUM_BINS
        self.brier_sum = 0.0

    def add(
        self, parents: Sequence[int], log_probs: Sequence[float], path: Sequence[int], *, reach: int, ended: bool
    ) -> None:
        """Count one step: a tree of N nodes and the nodes kept of it, from the root downwards."""
        children: list[list[int]] = [[] for _ in range(len(parents) + 1)]  # under each row, in order
        for node, parent in enumerate(parents):
            children[parent + 1].append(node)
        greedy = greedy_path(children, log_probs)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path, greedy, strict=False)))
        self.num_steps += 1
        self.num_pruned += len(greedy) < reach
        self.num_kept_steps += len(path) > 0
        self.num_greedy_steps += len(path) > 0 and shared == len(path)
        self.greedy_tokens += shared
        self.tree_tokens += len(path)
        ranks = path_ranks(parents, log_probs)
        for node in path:
            self.kept_by_rank += [0] * (ranks[node] + 1 - len(self.kept_by_rank))
            self.kept_by_rank[ranks[node]] += 1
        following = [*path, -1]
        for row, kept in zip([0, *(node + 1 for node in path)], following, strict=True):
            if kept == -1 and ended:
                break
            for node in children[row]:
                self._decided(math.exp(min(0.0, log_probs[node])), kept=node == kept)

    def _decided(self, confidence: float, *, kept: bool) -> None:
        at = min(int(confidence * NUM_BINS), NUM_BINS - 1)
        self.count[at] += 1
        self.sum_confidence[at] += confidence
        self.kept[at] += kept
        self.brier_sum += (confidence - kept) ** 2

    def diagnostics(self, *, greedy: bool, pruned: bool, calibrated: bool) -> Diagnostics:
        """Return the counts, those that mean nothing left out."""
        calibration = Calibration(
            count=tuple(self.count),
            sum_confidence=tuple(round(value, _DIGITS) for value in self.sum_confidence),
            kept=tuple(self.kept),
            brier_sum=round(self.brier_sum, _DIGITS),
        )
        return Diagnostics(
            num_steps=self.num_steps,
            num_pruned=self.num_pruned if pruned else None,
            num_kept_steps=self.num_kept_steps,
            num_greedy_steps=self.num_greedy_steps if greedy else None,
            greedy_tokens=self.greedy_tokens if greedy else None,
            tree_tokens=self.tree_tokens,
            calibration=calibration if calibrated else None,
            kept_by_rank=tuple(self.kept_by_rank),
        )


def greedy_path(children: Sequence[Sequence[int]], log_probs: Sequence[float]) -> list[int]:
    """Return the nodes from the root down, at every node the likeliest child (the first of equals), to a leaf.

    Args:
        children: Nodes under each row (0 the root, node + 1), in the tree's order.
        log_probs: Of each node given its parent's path.

    >>> greedy_path([[0, 1], [], [2], []], [-1.2, -0.4, -3.0])
    [1, 2]
    """
    path: list[int] = []
    row = 0
    while children[row]:
        path.append(max(children[row], key=lambda node: log_probs[node]))
        row = path[-1] + 1
    return path


def path_ranks(parents: Sequence[int], log_probs: Sequence[float]) -> list[int]:
    """Return each node's rank by the probability of its path from the root, 0 the best, the first of equals first.

    >>> path_ranks([-1, -1, 0, 1], [-0.5, -1.0, -1.0, 0.0])
    [0, 1, 3, 2]
    """
    sums: list[float] = []
    for parent, log_prob in zip(parents, log_probs, strict=True):
        sums.append(log_prob + (sums[parent] if parent >= 0 else 0.0))
    ranks = [0] * len(sums)
    for rank, node in enumerate(sorted(range(len(sums)), key=lambda node: -sums[node])):
        ranks[node] = rank
    return ranks


def total(found: Iterable[Diagnostics]) -> Diagnostics | None:
    """Return the sums of counts; what one of them lacks, the sum lacks. None of none."""
    known = list(found)
    if not known:
        return None
    calibrations = [entry.calibration for entry in known if entry.calibration is not None]
    ranks = itertools.zip_longest(*(entry.kept_by_rank for entry in known), fillvalue=0)
    return Diagnostics(
        **{name: _sum([getattr(entry, name) for entry in known]) for name in _COUNTS},
        calibration=_total_calibration(calibrations) if len(calibrations) == len(known) else None,
        kept_by_rank=tuple(sum(column) for column in ranks),
    )


_COUNTS = ("num_steps", "num_pruned", "num_kept_steps", "num_greedy_steps", "greedy_tokens", "tree_tokens")


def _sum(values: Sequence[int | None]) -> Any:  # noqa: ANN401 - an int, or None where the field may be None
    return None if None in values else sum(value for value in values if value is not None)


def _total_calibration(found: Sequence[Calibration]) -> Calibration:
    return Calibration(
        count=tuple(sum(column) for column in zip(*(entry.count for entry in found), strict=True)),
        sum_confidence=tuple(sum(column) for column in zip(*(entry.sum_confidence for entry in found), strict=True)),
        kept=tuple(sum(column) for column in zip(*(entry.kept for entry in found), strict=True)),
        brier_sum=sum(entry.brier_sum for entry in found),
    )


METRICS: Final = (
    "greedy_pruned_share",
    "accepted_is_greedy_share",
    "greedy_path_length",
    "tree_path_length",
    "brier",
    "calibration",
    "nodes_for_95",
)
"""Keys of ``misalignment``, in order."""


def misalignment(found: Iterable[Diagnostics | None]) -> dict[str, Any] | None:
    """Return the metrics of all counts together as plain JSON data; None where nothing was counted.

    ``greedy_pruned_share`` is of steps, ``accepted_is_greedy_share`` of the steps that kept something,
    ``greedy_path_length`` and ``tree_path_length`` are draft tokens kept a step, ``brier`` is the mean over draft
    tokens whose fate was decided, ``calibration`` has ten bins (mean ``confidence``, share ``accepted``, ``count``; the
    first two None in an empty bin), and ``nodes_for_95`` is the smallest budget that holds 95 % of the kept nodes.

    Args:
        found: Diagnostics of records; None entries (and whatever else stands for none in a data frame) do not count.
    """
    counts = total(entry for entry in found if isinstance(entry, Diagnostics))
    if counts is None:
        return None
    calibration = counts.calibration
    return {
        "greedy_pruned_share": _ratio(counts.num_pruned, counts.num_steps),
        "accepted_is_greedy_share": _ratio(counts.num_greedy_steps, counts.num_kept_steps),
        "greedy_path_length": _ratio(counts.greedy_tokens, counts.num_steps),
        "tree_path_length": _ratio(counts.tree_tokens, counts.num_steps),
        "brier": _ratio(calibration.brier_sum, sum(calibration.count)) if calibration else None,
        "calibration": _bins(calibration) if calibration else None,
        "nodes_for_95": nodes_for(SHARE_OF_KEPT, counts.kept_by_rank),
    }


def nodes_for(share: float, kept_by_rank: Sequence[int]) -> int | None:
    """Return the smallest b for which the first b ranks hold ``share`` of all that was kept; None of nothing.

    >>> nodes_for(0.95, [18, 1, 0, 1])
    2
    """
    kept = sum(kept_by_rank)
    if kept == 0:
        return None
    sums = itertools.accumulate(kept_by_rank)
    return next(b for b, held in enumerate(sums, start=1) if held >= share * kept - 1e-9)


def _bins(calibration: Calibration) -> list[dict[str, float | int | None]]:
    columns = zip(calibration.count, calibration.sum_confidence, calibration.kept, strict=True)
    return [
        {"confidence": _ratio(confidence, count), "accepted": _ratio(kept, count), "count": count}
        for count, confidence, kept in columns
    ]


def _ratio(numerator: float | None, denominator: int) -> float | None:
    return None if numerator is None or denominator == 0 else numerator / denominator
