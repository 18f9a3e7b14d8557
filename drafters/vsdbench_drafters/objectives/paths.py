"""Draft paths below anchors: proposed by the drafter, merged into one trie, scored by both models.

A token-level objective looks at the data's own tokens; a path objective looks at what the drafter itself would draft.
An *anchor* is a row of the batch from which S paths of at most L tokens start. Paths share prefixes, so everything is
computed once a distinct prefix: a *context* is an anchor (depth 0) or a drafted prefix of 1 … L - 1 tokens, the place
where the next token is drafted and accepted or not. The target scores all contexts of a sequence in one forward: its
tokens stand behind the sequence's and see its prefix, their ancestors and themselves.

Shape legend: R rows of the batch, A anchors, S paths an anchor, L depth, M contexts, H drafter width, V target
vocabulary, Vd draft vocabulary. Tokens of paths are draft ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.models.branching import Branches
from vsdbench.models.device import send
from vsdbench_drafters.largest import largest
from vsdbench_drafters.objectives.token import elements_at_once

if TYPE_CHECKING:
    from vsdbench_drafters.objectives.base import DraftBatch, DraftContext, DraftModel

_SCORE_ROWS = 256  # contexts whose whole-vocabulary logits are alive at a time, in the head's dtype
_SOFTMAX_ROWS = 16  # of them, as float32 on a CPU: what stays in its cache


class BranchingTarget(Protocol):
    """The part of a target that scores drafted tokens."""

    def branch_states(self, first: int, prefix: Tensor, branches: Branches) -> Tensor:
        """Return ``[n, H_target]`` last normed hidden states of the n tokens of branches.

        Args:
            first: Where the batch's sequence starts that they leave from.
            prefix: ``[P]`` int64, its tokens up to the last one that a branch leaves from.
            branches: The branches; positions count from the sequence's first token.
        """


@dataclass(frozen=True, slots=True)
class Paths:
    """What was proposed.

    Attributes:
        tokens: ``[A, S, L]`` int64 draft ids; 0 behind a path's end.
        lengths: ``[A, S]`` int64; 0 fills an anchor up that has fewer paths than others.
        sampled: How many of the S, counted from the first, were drawn from q; the others are leaves of trees.
    """

    tokens: Tensor
    lengths: Tensor
    sampled: int

    @property
    def valid(self) -> Tensor:
        """``[A, S, L]`` bool: tokens that are part of a path."""
        depth = torch.arange(self.tokens.shape[-1], device=self.tokens.device)
        return depth < self.lengths[..., None]


@dataclass(frozen=True, slots=True)
class Trie:
    """The distinct prefixes of paths. Contexts stand level by level, and by anchor within a level.

    Attributes:
        parents: ``[M]`` int64, the context one token shorter; -1 for anchors.
        tokens: ``[M]`` int64, the draft id that leads there; -1 for anchors.
        anchors: ``[M]`` int64, the anchor that it lies below.
        levels: First context of every depth, and M.
        rows: ``[A, S, L]`` int64, the context in which each token of each path was drafted; 0 behind a path's end.
    """

    parents: Tensor
    tokens: Tensor
    anchors: Tensor
    levels: tuple[int, ...]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.parents)

    def to(self, device: torch.device) -> Trie:
        """Return one that is on the host on a device."""
        parents, tokens, anchors, rows = (
            send(part, device) for part in (self.parents, self.tokens, self.anchors, self.rows)
        )
        return Trie(parents, tokens, anchors, self.levels, rows)

    @property
    def depths(self) -> Tensor:
        """``[M]`` int64, on the host: tokens drafted before each context."""
        counts = torch.tensor([b - a for a, b in zip(self.levels, self.levels[1:], strict=False)])
        return torch.repeat_interleave(torch.arange(len(counts)), counts)


@dataclass(frozen=True, slots=True)
class Scores:
    """Both models' view of every context.

    Attributes:
        draft: ``[M, Vd]`` q.
        target: ``[M, Vd]`` p, normalised over the whole vocabulary.
        choices: ``[M]`` draft id of the target's most likely token, -1 outside the draft vocabulary.
    """

    draft: Tensor
    target: Tensor
    choices: Tensor


def choose_anchors(batch: DraftBatch, per_sequence: int, generator: torch.Generator, *, share: float = 1.0) -> Tensor:
    """Return ``[A]`` int64 rows in increasing order, drawn without replacement.

    Args:
        batch: The batch.
        per_sequence: Anchors of a sequence.
        generator: On the host.
        share: Of the batch's sequences that get anchors (one at least). The target reads a whole sequence to judge what
            is drafted in it, so the same number of anchors is cheaper in fewer sequences.
    """
    count = max(1, round(share * len(batch.spans)))
    order = torch.randperm(len(batch.spans), generator=generator)[:count].sort().values
    chosen = [torch.empty(0, dtype=torch.int64)]
    for index in order.tolist():
        span = batch.spans[index]
        rows = torch.randperm(span.num_rows, generator=generator)[:per_sequence]
        chosen.append(rows.sort().values + span.first_row)
    return send(torch.cat(chosen), batch.slots.device)


@torch.no_grad()
def sample_paths(
    drafter: DraftModel, context: DraftContext, num_paths: int, depth: int, generator: torch.Generator
) -> Paths:
    """Draw paths from q, token by token, at temperature 1.

    Args:
        drafter: ψ_old.
        context: At step 0 of the A anchors.
        num_paths: S.
        depth: L.
        generator: On the host; it gives one number a token.
    """
    num_anchors = len(context.hidden)
    device = context.hidden.device
    row = torch.arange(num_anchors, device=device)[:, None].expand(-1, num_paths)
    hidden, drawn = context.hidden, []
    for level in range(depth):
        probs = draft_probs(drafter, drafter.norm(hidden))
        uniform = send(torch.rand(num_anchors, num_paths, generator=generator, dtype=torch.float64), device)
        token = draw(probs, row, uniform)
        drawn.append(token)
        if level + 1 < depth:
            keys, inverse = torch.unique(row * probs.shape[-1] + token, return_inverse=True)
            context = context.select(keys // probs.shape[-1])
            hidden = drafter.advance(context, drafter.draft_ids[keys % probs.shape[-1]])
            row = inverse
    tokens = torch.stack(drawn, dim=-1)
    return Paths(tokens, torch.full(tokens.shape[:2], depth, device=device), num_paths)


@torch.no_grad()
def tree_paths(drafter: DraftModel, context: DraftContext, *, budget: int, top_k: int, depth: int) -> Paths:
    """Return the paths to the leaves of the dynamic tree (EAGLE-2, arXiv 2406.16858) that decoding would send.

    Args:
        drafter: ψ_old.
        context: At step 0 of the A anchors.
        budget: Nodes of a tree.
        top_k: Children scored of a node, and nodes expanded a level.
        depth: L.
    """
    hidden, num_anchors = context.hidden, len(context.hidden)
    vocab = len(drafter.draft_ids)
    width = min(top_k, vocab)
    score = torch.zeros(num_anchors, 1, device=hidden.device)
    frontier = torch.full((num_anchors, 1), -1, device=hidden.device)  # candidate index of each expanded node
    tokens: list[Tensor] = []
    parents: list[Tensor] = []
    scores: list[Tensor] = []
    for level in range(depth):
        log_probs = draft_probs(drafter, drafter.norm(hidden)).log().view(num_anchors, -1, vocab)
        top = log_probs.topk(width, dim=-1)
        first = sum(t.shape[1] for t in tokens)
        tokens.append(top.indices.flatten(1))
        scores.append((score[..., None] + top.values).flatten(1))
        parents.append(frontier[..., None].expand_as(top.values).flatten(1))
        if level + 1 < depth:
            best = scores[-1].topk(width, dim=-1)
            score, frontier = best.values, best.indices + first
            rows = torch.arange(num_anchors, device=hidden.device)[:, None] * log_probs.shape[1] + best.indices // width
            context = context.select(rows.flatten())
            hidden = drafter.advance(context, drafter.draft_ids[tokens[-1].gather(1, best.indices).flatten()])
    kept = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True).indices[:, :budget]
    return _leaves(torch.cat(tokens, dim=1), torch.cat(parents, dim=1), kept, depth)


def _leaves(tokens: Tensor, parents: Tensor, kept: Tensor, depth: int) -> Paths:
    """Return the root-to-leaf paths of the kept nodes of every anchor's candidates, ``[A, n]`` tokens and parents."""
    device, num_anchors = tokens.device, len(tokens)
    token_lists, parent_lists = tokens.tolist(), parents.tolist()
    found: list[list[list[int]]] = []
    for anchor, nodes in enumerate(kept.tolist()):
        inner = {parent_lists[anchor][node] for node in nodes}
        paths = []
        for leaf in sorted(set(nodes) - inner):
            path: list[int] = []
            node = leaf
            while node >= 0:
                path.append(token_lists[anchor][node])
                node = parent_lists[anchor][node]
            paths.append(path[::-1])
        found.append(paths)
    most = max((len(paths) for paths in found), default=0)
    padded = torch.zeros(num_anchors, most, depth, dtype=torch.int64)
    lengths = torch.zeros(num_anchors, most, dtype=torch.int64)
    for anchor, paths in enumerate(found):
        for index, path in enumerate(paths):
            padded[anchor, index, : len(path)] = torch.tensor(path)
            lengths[anchor, index] = len(path)
    return Paths(send(padded, device), send(lengths, device), 0)


def join(first: Paths, second: Paths) -> Paths:
    """Return the paths of both; the first ones are those drawn from q."""
    return Paths(
        torch.cat([first.tokens, second.tokens], dim=1),
        torch.cat([first.lengths, second.lengths], dim=1),
        first.sampled,
    )


def merge(paths: Paths, vocab: int) -> Trie:
    """Return the trie of all paths of all anchors, on the host, which waits for a GPU once and not every level.

    Args:
        paths: The paths.
        vocab: Vd.
    """
    num_anchors, _, depth = paths.tokens.shape
    drawn, lengths = paths.tokens.cpu(), paths.lengths.cpu()
    row = torch.arange(num_anchors)[:, None].expand(lengths.shape)
    rows = [torch.where(lengths > 0, row, 0)]
    parents = [torch.full((num_anchors,), -1)]
    tokens = [parents[0]]
    anchors = [torch.arange(num_anchors)]
    levels = [0, num_anchors]
    for level in range(1, depth):
        alive = lengths > level
        keys = row * vocab + drawn[..., level - 1]
        distinct, inverse = torch.unique(keys[alive], return_inverse=True)
        parents.append(distinct // vocab)
        tokens.append(distinct % vocab)
        anchors.append(torch.cat(anchors)[parents[-1]])
        row = torch.zeros_like(row).masked_scatter(alive, inverse + levels[-1])
        rows.append(row)
        levels.append(levels[-1] + len(distinct))
    return Trie(torch.cat(parents), torch.cat(tokens), torch.cat(anchors), tuple(levels), torch.stack(rows, dim=-1))


def trace(drafter: DraftModel, context: DraftContext, trie: Trie) -> Tensor:
    """Return ``[M, H]``: the drafter's normed output in every context, with its graph.

    Args:
        drafter: ψ.
        context: At step 0 of the A anchors.
        trie: The contexts.
    """
    outputs = [drafter.norm(context.hidden)]
    for before, first, stop in zip(trie.levels, trie.levels[1:], trie.levels[2:], strict=False):
        if first == stop:
            break
        context = context.select(trie.parents[first:stop] - before)
        outputs.append(drafter.norm(drafter.advance(context, drafter.draft_ids[trie.tokens[first:stop]])))
    return torch.cat(outputs)


def oracle(batch: DraftBatch, anchors: Tensor, trie: Trie, draft_ids: Tensor, target: BranchingTarget) -> Tensor:
    """Return ``[M - A, H_target]``: the target's last normed hidden state in every context below the anchors.

    One forward a sequence, over its tokens up to the last anchor and all contexts drafted there. What each is asked for
    is found on the host, where no step of it waits for a GPU.

    Args:
        batch: The batch.
        anchors: ``[A]`` rows of the batch.
        trie: The contexts, on the host.
        draft_ids: ``[Vd]`` the target id of every draft id.
        target: The target.
    """
    num_anchors, device = len(anchors), anchors.device
    roots = (batch.slots[anchors] + 1).cpu()  # the token below which an anchor drafts
    below = roots[trie.anchors[num_anchors:]]
    order, states = list[Tensor](), list[Tensor]()
    for span in batch.spans:
        mine = ((below >= span.start) & (below < span.start + span.length)).nonzero()[:, 0]
        if len(mine) == 0:
            continue
        own = below[mine] - span.start
        branches = _branches(trie, mine + num_anchors, own, draft_ids)
        prefix = batch.tokens[span.start : span.start + int(own.max()) + 1]
        order.append(mine)
        states.append(target.branch_states(span.start, prefix, branches))
    if not order:
        return torch.empty(0, 0, device=device)
    return torch.cat(states)[send(torch.cat(order).argsort(), device)]


def _branches(trie: Trie, rows: Tensor, roots: Tensor, draft_ids: Tensor) -> Branches:
    """Return the contexts ``rows`` (``[n]``, all those below the anchors of one sequence) with their roots.

    All arguments but the last, whose device the result is on, are on the host.
    """
    depths = trie.depths[rows]
    local = torch.full((len(trie),), -1)
    local[rows] = torch.arange(len(rows))
    parents = local[trie.parents[rows]]
    lineage = torch.full((len(rows), int(depths.max())), -1)
    for depth in range(1, lineage.shape[1] + 1):
        level = (depths == depth).nonzero()[:, 0]
        lineage[level, : depth - 1] = lineage[parents[level], : depth - 1]
        lineage[level, depth - 1] = level
    tokens, roots, lineage = (send(part, draft_ids.device) for part in (trie.tokens[rows], roots, lineage))
    return Branches(draft_ids[tokens], roots, lineage)


def draft_probs(drafter: DraftModel, hidden: Tensor) -> Tensor:
    """Return ``[n, Vd]`` q of normed outputs, without a graph."""
    with torch.no_grad():
        logits = F.linear(hidden, drafter.head())
        return torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


@torch.no_grad()
def target_probs(states: Tensor, head: Tensor, draft_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``([M, Vd] p of the draft vocabulary, [M] int64 the most likely target id)``.

    p is normalised over the whole vocabulary, as verification sees it, so a row sums to what the draft vocabulary
    covers.

    Args:
        states: ``[M, H_target]`` last normed hidden states.
        head: ``[V, H_target]`` the target's LM head.
        draft_ids: ``[Vd]``.
    """
    wide = torch.float64 if head.dtype == torch.float64 else torch.float32
    probs = torch.empty(len(states), len(draft_ids), dtype=wide, device=states.device)
    choices = torch.empty(len(states), dtype=torch.int64, device=states.device)
    at_once = _SOFTMAX_ROWS if states.device.type == "cpu" else _SCORE_ROWS
    whole = torch.empty(at_once, len(head), dtype=wide, device=states.device)  # reused: fresh pages cost more
    with torch.autocast(states.device.type, enabled=False):
        for first in range(0, len(states), _SCORE_ROWS):
            logits = states[first : first + _SCORE_ROWS].to(head.dtype) @ head.T
            choices[first : first + len(logits)] = largest(logits)[1]
            for start in range(0, len(logits), at_once):
                some = logits[start : start + at_once].to(wide)
                found = torch.softmax(some, dim=-1, out=whole[: len(some)])
                torch.index_select(found, 1, draft_ids, out=probs[first + start : first + start + len(some)])
    return probs, choices


def draw(probs: Tensor, rows: Tensor, uniform: Tensor, total: Tensor | None = None) -> Tensor:
    """Return int64 tokens of the shape of ``rows``, drawn from ``probs[rows]`` by inverting the running sum.

    Args:
        probs: ``[n, Vd]`` non-negative.
        rows: ``[...]`` int64.
        uniform: ``[...]`` float64 in [0, 1).
        total: ``[n]`` masses that may exceed the rows' sums; what falls behind a row's sum gives -1. None: the sums.
    """
    order = rows.flatten().argsort(stable=True)
    counts = torch.bincount(rows.flatten(), minlength=len(probs))
    firsts = counts.cumsum(0) - counts
    owner = rows.flatten()[order]
    place = torch.arange(len(owner), device=rows.device) - firsts[owner]
    wanted = torch.zeros(len(probs), int(counts.max()) if len(owner) else 0, dtype=torch.float64, device=rows.device)
    wanted[owner, place] = uniform.flatten()[order]  # the draws of each row, side by side
    found = torch.empty(wanted.shape, dtype=torch.int64, device=rows.device)
    step = max(1, elements_at_once(probs.device) // 2 // probs.shape[-1])  # running sums are float64
    for first in range(0, len(probs), step):
        some = slice(first, first + step)
        cumulative = probs[some].double().cumsum(-1)
        mass = cumulative[:, -1:] if total is None else total[some, None].double()
        found[some] = torch.searchsorted(cumulative, wanted[some] * mass, right=True)
    tokens = torch.empty_like(order)
    tokens[order] = found[owner, place]
    if total is not None:
        return tokens.masked_fill(tokens >= probs.shape[-1], -1).view(rows.shape)
    behind = (tokens >= probs.shape[-1]).nonzero()[:, 0]
    if len(behind):  # rounding put the threshold on the sum itself: the last token that has a probability is meant
        positive = probs[rows.flatten()[behind]] > 0
        tokens[behind] = probs.shape[-1] - 1 - positive.flip(-1).int().argmax(-1)
    return tokens.view(rows.shape)
