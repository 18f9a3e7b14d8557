"""How far what training looks at, the drafter's greedy path, is from what decoding sends, its tree.

Token losses make each next token likely, so they shape the greedy path; decoding ranks whole paths by cumulative
probability, prunes, and keeps whatever the target agrees with. These numbers say how often the two differ. They are
counted at anchors along held-out answers, under greedy verification.

Shape legend: A anchors, S paths, L depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, TargetView
from vsdbench_drafters.objectives.path_objective import PathObjective
from vsdbench_drafters.objectives.paths import Paths, join, tree_paths


@dataclass(frozen=True, slots=True)
class Misalignment:
    """Counts over anchors; ratios are taken once all batches are summed.

    Attributes:
        num_anchors: Anchors.
        num_pruned: Of them, those whose whole greedy path is not in the tree.
        num_kept: Anchors at which the target keeps something of the tree.
        num_greedy: Of these, those where what is kept is the beginning of the greedy path.
        greedy_length: Σ tokens that the target keeps of greedy paths, pruned or not.
        tree_length: Σ tokens that it keeps of trees.
    """

    num_anchors: int = 0
    num_pruned: int = 0
    num_kept: int = 0
    num_greedy: int = 0
    greedy_length: int = 0
    tree_length: int = 0

    def __add__(self, other: Misalignment) -> Misalignment:
        return Misalignment(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def shares(self) -> dict[str, float]:
        """Return what is logged: two shares, and the mean lengths of both paths."""
        anchors, kept = max(1, self.num_anchors), max(1, self.num_kept)
        return {
            "greedy_pruned_share": self.num_pruned / anchors,
            "accepted_is_greedy_share": self.num_greedy / kept,
            "greedy_path_length": self.greedy_length / anchors,
            "tree_path_length": self.tree_length / anchors,
        }


@torch.no_grad()
def misalignment(
    batch: DraftBatch, drafter: DraftModel, view: TargetView, *, per_sequence: int, budget: int, top_k: int, depth: int
) -> Misalignment:
    """Return the counts of one batch; the view must have a target to ask.

    Args:
        batch: The batch; its seed places the anchors.
        drafter: The drafter.
        view: The target's view.
        per_sequence: Anchors of a sequence.
        budget: Nodes of the tree.
        top_k: Children scored a node.
        depth: L.
    """
    asked = PathObjective(anchors=per_sequence, depth=depth, tree_budget=budget, tree_top_k=top_k)
    anchors = asked.place(batch, torch.Generator().manual_seed(batch.seed))
    context = drafter.start(batch)
    drafter.advance(context, batch.inputs(0))
    branch = context.select(anchors)
    # The likeliest child of the likeliest child: a tree of one path.
    greedy = tree_paths(drafter, branch, budget=depth, top_k=1, depth=depth)
    leaves = tree_paths(drafter, branch, budget=budget, top_k=top_k, depth=depth)
    paths = join(greedy, leaves)
    trie, _, scores = asked.score(batch, drafter, view, anchors, branch, paths)
    agreed = (scores.choices[trie.rows] == paths.tokens) & paths.valid
    kept = agreed.int().cumprod(-1).sum(-1)
    return _count(paths, kept)


def _count(paths: Paths, kept: Tensor) -> Misalignment:
    """Return the counts from ``[A, S]`` kept tokens; the first path is the greedy one, the others are the tree's."""
    greedy, leaves = paths.tokens[:, :1], paths.tokens[:, 1:]
    depth = torch.arange(paths.tokens.shape[-1], device=kept.device)
    shared = ((greedy == leaves) & (depth < paths.lengths[:, 1:, None])).int().cumprod(-1).sum(-1).amax(-1)
    tree_kept = kept[:, 1:].amax(-1)
    best = leaves.gather(1, kept[:, 1:].argmax(-1)[:, None, None].expand(-1, 1, len(depth)))
    same = ((best == greedy) | (depth >= tree_kept[:, None, None])).all(-1)[:, 0]
    any_kept = tree_kept > 0
    return Misalignment(
        num_anchors=len(kept),
        num_pruned=int((shared < len(depth)).sum()),
        num_kept=int(any_kept.sum()),
        num_greedy=int((any_kept & same).sum()),
        greedy_length=int(kept[:, 0].sum()),
        tree_length=int(tree_kept.sum()),
    )
