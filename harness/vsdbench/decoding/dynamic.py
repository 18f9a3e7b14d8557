"""Trees that grow by the draft probabilities: the most probable nodes of each level are expanded (EAGLE-2).

On the host growing is a matter of small lists, and stops where more levels are not worth their time. A device would
have to be waited for to know, so a tree without thresholds grows there without a look, level by level to its depth.
"""

from __future__ import annotations

import functools
import heapq
import math
from typing import TYPE_CHECKING

import torch

from vsdbench.decoding.growing import Level
from vsdbench.decoding.interfaces import TokenTree
from vsdbench.decoding.structure import Numbers
from vsdbench.models.device import apart, send_numbers
from vsdbench.models.native import top_k

if TYPE_CHECKING:
    from torch import Tensor

    from vsdbench.decoding.growing import Growing, LevelScorer
    from vsdbench.decoding.interfaces import TreeShape


def grow_dynamic(scorer: LevelScorer, root: Tensor, shape: TreeShape) -> Growing:
    """Grow by cumulative log-probability, then keep the ``budget`` best nodes of all that were scored.

    A node's cumulative log-probability is at most its parent's, so the kept set is always a tree.

    Args:
        scorer: Scores levels.
        root: ``[Vd]`` log-probabilities of the root's children.
        shape: What may be proposed.
    """
    unseen = apart(root.device) and not shape.adapts
    return _grow_unseen(scorer, root, shape) if unseen else _grow_watched(scorer, root, shape)


def _grow_watched(scorer: LevelScorer, root: Tensor, shape: TreeShape) -> Growing:
    """Grow with every number at hand.

    Growing stops before ``depth`` when the frontier has less probability than ``min_level_prob``, or when none of its
    descendants can be kept any more.
    """
    width, device = shape.top_k, root.device
    least = math.log(shape.min_node_prob) if shape.min_node_prob else -math.inf
    tokens, parents, depths = list[int](), list[int](), list[int]()
    own, sums = list[float](), list[float]()
    scored, frontier, slots = root[None], [-1], {-1: -1}
    for depth in range(1, shape.depth + 1):
        first = len(tokens)
        values, places = top_k(scored, width)
        for node, ids, logs in zip(frontier, scorer.to_target(places).tolist(), values.tolist(), strict=True):
            above = sums[node] if node >= 0 else 0.0
            tokens += ids
            own += logs
            sums += [above + log for log in logs]
            parents += [node] * width
        depths += [depth] * (len(tokens) - first)
        frontier = heapq.nlargest(width, range(first, len(tokens)), key=sums.__getitem__)
        least_kept = heapq.nlargest(shape.budget, sums)[-1] if len(sums) >= shape.budget else -math.inf
        if depth == shape.depth or sums[frontier[0]] < max(least, least_kept):
            break
        if sum(math.exp(sums[node]) for node in frontier) < shape.min_level_prob:
            break
        above_slots = [slots[parents[node]] for node in frontier]
        slots |= {node: len(slots) - 1 + place for place, node in enumerate(frontier)}
        ids = [tokens[node] for node in frontier]
        scored = yield Level(send_numbers(ids, device), send_numbers(above_slots, device), depth)
    # The sort is stable: at equal sums a parent, which has the smaller index, stays before its child.
    best = sorted(range(len(sums)), key=sums.__getitem__, reverse=True)[: shape.budget]
    kept = sorted(node for node in best if sums[node] >= least)
    index = {node: place for place, node in enumerate(kept)} | {-1: -1}
    return TokenTree(
        send_numbers([tokens[node] for node in kept], device),
        [index[parents[node]] for node in kept],
        [depths[node] for node in kept],
        send_numbers([own[node] for node in kept], device, torch.float32),
    )


@functools.lru_cache(maxsize=64)
def _numbering(width: int, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for every node that dynamic growth may score, the slot of its parent (-1 for the root) and its depth.

    >>> [numbers.tolist() for numbers in _numbering(2, 2, torch.device("cpu"))]
    [[-1, -1, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]]
    """
    parent_slots = [slot for slot in range(-1, (depth - 1) * width) for _ in range(width)]
    depths = [1] * width + [level for level in range(2, depth + 1) for _ in range(width * width)]
    return send_numbers(parent_slots, device), send_numbers(depths, device)


def _grow_unseen(scorer: LevelScorer, root: Tensor, shape: TreeShape) -> Growing:
    """Grow on a device, without waiting for it.

    A node's index counts all that were scored, level by level: ``width`` children of the root, then ``width`` of each
    frontier node.
    """
    width, device = shape.top_k, root.device
    parent_slot, depth_of = _numbering(width, shape.depth, device)
    top = root.topk(width)
    tokens, cumulative, own = [scorer.to_target(top.indices)], [top.values], [top.values]
    frontier = torch.arange(-1, width, device=device)
    inner = [frontier]  # the root, and all frontiers: what took slot s stands at s + 1
    frontier, num_scored = frontier[1:], width
    frontier_tokens, frontier_scores = tokens[0], top.values
    for depth in range(1, shape.depth):
        scored = yield Level(frontier_tokens, parent_slot.index_select(0, frontier), depth)
        top = scored.topk(width, dim=-1)
        ids = scorer.to_target(top.indices).flatten()
        sums = (frontier_scores[:, None] + top.values).flatten()
        tokens.append(ids)
        cumulative.append(sums)
        own.append(top.values.flatten())
        best = sums.topk(width)
        frontier = best.indices + num_scored
        inner.append(frontier)
        frontier_tokens, frontier_scores = ids.index_select(0, best.indices), best.values
        num_scored += len(ids)
    # Stable descending sort: at equal scores a parent, which has the smaller index, stays before its child.
    kept = torch.cat(cumulative).sort(descending=True, stable=True).indices[: shape.budget].sort().values
    above = torch.cat(inner).index_select(0, parent_slot.index_select(0, kept) + 1)
    parents = torch.searchsorted(kept, above, right=True) - 1  # -1 for the root, which is before all that were kept
    depths = depth_of.index_select(0, kept)
    ids, log_probs = torch.cat(tokens).index_select(0, kept), torch.cat(own).index_select(0, kept)
    return TokenTree(ids, Numbers(parents, shape.depth), Numbers(depths, shape.depth), log_probs)
