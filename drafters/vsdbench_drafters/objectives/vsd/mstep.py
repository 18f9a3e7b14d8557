"""The M-step: likelihood of what was kept, weighted, and a price on confidence in what was not.

Both terms depend on a context's logits alone, so their gradients are written down: with soft targets C and
probabilities q, d(-Σ C log q) / d logits = q Σ C - C.

Shape legend: A anchors, S paths, L depth, M contexts, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vsdbench_drafters.objectives.paths import Paths, Scores, Trie
from vsdbench_drafters.objectives.vsd.confidence import Penalty, penalty
from vsdbench_drafters.objectives.vsd.estep import Judged
from vsdbench_drafters.objectives.vsd.utility import Acceptance


@dataclass(frozen=True, slots=True, kw_only=True)
class MStepSettings:
    """The switches of the M-step.

    Attributes:
        model: What acceptance means.
        targets: ``sampled``: the tokens of the corrected paths. ``full``: in every context that was reached, the
            expectation of that token from both models' whole distributions. Where all paths weigh the same (``arw``
            off) its gradient is the sampled one's mean, with less noise; otherwise weights go by the paths as drawn.
        arw: Correction tokens weigh 1 - ᾱ, ᾱ their anchor's mean acceptance; False: 1.
        correction: Corrections are learnt at all.
        car: Which penalty.
    """

    model: Acceptance = "sampled"
    targets: Literal["sampled", "full"] = "sampled"
    arw: bool = True
    correction: bool = True
    car: Penalty = "linear"


@torch.no_grad()
def soft_targets(settings: MStepSettings, paths: Paths, trie: Trie, scores: Scores, judged: Judged) -> Tensor:
    """Return ``[M, Vd]`` C: how much each context should learn of each token.

    The path term is (1 / A) Σ C · (-log q): every accepted token of path s counts w_s, its correction w_s v. Tokens
    behind a rejection are unreachable when decoding and count nothing.
    """
    share = _correction_share(settings, judged)
    targets = torch.zeros_like(scores.target)
    weights = judged.weights[..., None]
    if settings.targets == "full":
        reach = torch.zeros(len(trie), dtype=targets.dtype, device=targets.device)
        reach.index_add_(0, trie.rows.flatten(), (weights * judged.tested).flatten().to(targets.dtype))
        kept, emitted = _expected_tokens(settings.model, paths, trie, scores)
        return reach[:, None] * (kept + share[trie.anchors][:, None] * (emitted - kept))
    targets.index_put_((trie.rows, paths.tokens), (weights * judged.kept).to(targets.dtype), accumulate=True)
    corrected = judged.correction >= 0
    last = judged.num_accepted.clamp(max=paths.tokens.shape[-1] - 1)[..., None]
    rows = trie.rows.gather(-1, last)[..., 0]
    values = (judged.weights * share[:, None] * corrected).to(targets.dtype)
    return targets.index_put_((rows, judged.correction.clamp(min=0)), values, accumulate=True)


def _correction_share(settings: MStepSettings, judged: Judged) -> Tensor:
    """Return ``[A]`` v of the correction token: as the drafter improves, weight moves from corrections to paths."""
    tested = judged.tested
    if not settings.correction:
        return torch.zeros(len(tested), device=tested.device)
    if not settings.arw:
        return torch.ones(len(tested), device=tested.device)
    mean = (judged.accept * tested).sum((-1, -2)) / tested.sum((-1, -2)).clamp(min=1)
    return 1 - mean


def _expected_tokens(model: Acceptance, paths: Paths, trie: Trie, scores: Scores) -> tuple[Tensor, Tensor]:
    """Return ``[M, Vd]`` twice: chances that a token is accepted in a context, and that it is emitted at all."""
    if model == "sampled":
        return torch.minimum(scores.target, scores.draft), scores.target
    tried = _largest_at(trie, paths, paths.valid, scores.target)
    emitted = scores.target
    if model == "greedy":
        inside = (scores.choices >= 0)[:, None].to(emitted.dtype)
        emitted = torch.zeros_like(emitted).scatter_(1, scores.choices.clamp(min=0)[:, None], inside)
    return emitted * tried, emitted


@torch.no_grad()
def reached(trie: Trie, judged: Judged) -> Tensor:
    """Return ``[r]`` int64, the contexts in which some path's token was tested: no other one has anything to learn."""
    count = torch.zeros(len(trie), dtype=torch.int64, device=judged.tested.device)
    return count.index_add_(0, trie.rows.flatten(), judged.tested.flatten().long()).nonzero()[:, 0]


@torch.no_grad()
def rejections(paths: Paths, trie: Trie, judged: Judged, like: Tensor) -> Tensor:
    """Return ``[M, Vd]`` 1 - a of every distinct child that the oracle rejected, 0 elsewhere."""
    return _largest_at(trie, paths, (1 - judged.accept) * (judged.tested & ~judged.kept), like)


def _largest_at(trie: Trie, paths: Paths, values: Tensor, like: Tensor) -> Tensor:
    """Return ``[M, Vd]`` the largest of the ``[A, S, L]`` values, 0 or more, that stand at each child; 0 elsewhere."""
    places = trie.rows * like.shape[-1] + paths.tokens
    found = torch.zeros_like(like)
    found.view(-1).scatter_reduce_(0, places.flatten(), values.flatten().to(like.dtype), "amax")
    return found


def path_rows(omega: float, strength: float, car: Penalty) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the loss of contexts, ω Σ C (-log q) + λ CAR, with its gradient by the logits.

    Args:
        omega: ω.
        strength: λ.
        car: Which penalty.

    Returns:
        A function of ``[r, Vd]`` logits and ``[r, 2, Vd]`` C and rejections (see ``token.fused``).
    """

    def rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wanted, rejected = targets[:, 0].to(logits.dtype), targets[:, 1].to(logits.dtype)
        log_q = torch.log_softmax(logits, dim=-1)
        losses = -omega * (wanted * log_q).sum(-1)
        q = log_q.exp_()
        gradient = omega * (q * wanted.sum(-1, keepdim=True) - wanted)
        if strength > 0:
            value, slope = penalty(car, q, rejected)
            losses = losses + strength * value.sum(-1)
            gradient += strength * q * (slope - (q * slope).sum(-1, keepdim=True))
        return losses, gradient

    return rows
