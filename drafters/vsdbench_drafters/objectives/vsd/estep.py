"""The E-step: propose paths, let the target judge them, and weight what decoding would keep.

Everything here is without a graph, at the weights ψ_old that the drafter has now.

Shape legend: A anchors, S paths, L depth, M contexts, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vsdbench.models.device import send
from vsdbench_drafters.objectives.base import TINY
from vsdbench_drafters.objectives.paths import Paths, Scores, Trie, draw
from vsdbench_drafters.objectives.vsd.utility import Acceptance, acceptance, elbo, expected_length, log_validity
from vsdbench_drafters.objectives.vsd.weighting import (
    effective_sample_size,
    importance_weights,
    metropolis_hastings_weights,
)

Sampler = Literal["importance", "mh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EStepSettings:
    """The switches of the E-step.

    Attributes:
        model: What acceptance means.
        oracle: Apply the accept test; False keeps every proposal whole and puts κ into the weights instead.
        kl: Weights contain log p - log q (log p for leaves of trees, which are enumerated and not drawn).
        beta: Temperature of the utility in the weights; None: infinite, no utility.
        sampler: Importance weights, or visits of a Metropolis-Hastings chain.
        arw: Weights at all; False: 1 / S each.
        min_ess: Share of S below which the effective sample size may not fall.
        clip: Largest weight, in units of 1 / S.
    """

    model: Acceptance = "sampled"
    oracle: bool = True
    kl: bool = True
    beta: float | None = 1.0
    sampler: Sampler = "importance"
    arw: bool = True
    min_ess: float = 0.25
    clip: float = 4.0


@dataclass(frozen=True, slots=True)
class Judged:
    """What the E-step found.

    Attributes:
        accept: ``[A, S, L]`` a_t; 0 behind a path's end.
        kept: ``[A, S, L]`` bool, tokens that were accepted, all before them too.
        tested: ``[A, S, L]`` bool, these and the one that was rejected; what is behind it is unreachable when decoding.
        num_accepted: ``[A, S]`` τ_s.
        correction: ``[A, S]`` draft id of the token that replaces the rejected one; -1: none, or one that the drafter
            cannot draft.
        weights: ``[A, S]`` w_s.
        utility: ``[A, S]`` U.
        bound: ``[A, S]`` log κ + log p - log q.
    """

    accept: Tensor
    kept: Tensor
    tested: Tensor
    num_accepted: Tensor
    correction: Tensor
    weights: Tensor
    utility: Tensor
    bound: Tensor


@torch.no_grad()
def judge(settings: EStepSettings, paths: Paths, trie: Trie, scores: Scores, generator: torch.Generator) -> Judged:
    """Accept or correct every path and weight it.

    Args:
        settings: The switches.
        paths: The proposals.
        trie: Their contexts.
        scores: Of the contexts.
        generator: On the host: of accept tests, corrections and the Metropolis-Hastings chain, in this order.
    """
    valid = paths.valid
    q, p = scores.draft[trie.rows, paths.tokens], scores.target[trie.rows, paths.tokens]
    accept = acceptance(settings.model, q, p, scores.choices[trie.rows] == paths.tokens) * valid
    uniform = send(torch.rand(*accept.shape, generator=generator, dtype=torch.float64), accept.device)
    passed = (uniform < accept) if settings.oracle else valid
    kept = passed.int().cumprod(-1).bool()
    num_accepted = kept.sum(-1)
    tested = valid & (torch.arange(valid.shape[-1], device=valid.device) <= num_accepted[..., None])
    second = send(torch.rand(*num_accepted.shape, generator=generator, dtype=torch.float64), accept.device)
    correction = torch.full_like(num_accepted, -1)
    if settings.oracle:
        correction = _correct(settings.model, paths, trie, scores, num_accepted, second)
    log_q, log_p = q.clamp(min=TINY).log(), p.clamp(min=TINY).log()
    utility = expected_length(accept)
    log_weights = torch.zeros_like(utility)
    if settings.kl:
        # Only draws have a proposal density; leaves of a tree are enumerated.
        density = log_q.clone()
        density[:, paths.sampled :] = 0
        log_weights = log_weights + ((log_p - density) * kept).sum(-1)
    if not settings.oracle:
        log_weights = log_weights + log_validity(accept, valid)
    if settings.beta is not None:
        log_weights = log_weights + utility / settings.beta
    weights = _weigh(settings, log_weights, paths, generator)
    bound = elbo(log_q, log_p, accept, valid)
    return Judged(accept, kept, tested, num_accepted, correction, weights, utility, bound)


def _correct(  # noqa: PLR0917 - one step of ``judge``
    model: Acceptance, paths: Paths, trie: Trie, scores: Scores, num_accepted: Tensor, uniform: Tensor
) -> Tensor:
    """Return ``[A, S]`` the token that stands where a path was rejected; -1 for those that were not.

    The emitted token has the target's distribution: after a rejected sample it is drawn from norm((p - q)₊), after a
    rejected deterministic child from p without it, and greedily it is the target's choice.
    """
    rejected = num_accepted < paths.lengths
    last = num_accepted.clamp(max=paths.tokens.shape[-1] - 1)[..., None]
    contexts, tokens = (of.gather(-1, last)[..., 0] for of in (trie.rows, paths.tokens))
    if model == "greedy":
        return torch.where(rejected, scores.choices[contexts], -1)
    anchor, path = rejected.nonzero(as_tuple=True)
    rows = contexts[anchor, path]
    if model == "sampled":  # paths that are rejected in one context share the residual there
        rows, own = torch.unique(rows, return_inverse=True)
        target = scores.target[rows]
        others = (target - scores.draft[rows]).clamp_(min=0)
    else:
        own = torch.arange(len(rows), device=rows.device)
        target = scores.target[rows]
        others = target.scatter(-1, tokens[anchor, path][:, None], 0.0)
    outside = (1 - target.sum(-1, dtype=torch.float64)).clamp(min=0)
    total = others.sum(-1, dtype=torch.float64) + outside
    correction = torch.full_like(num_accepted, -1)
    correction[anchor, path] = draw(others, own, uniform[anchor, path], total)
    return correction


def _weigh(settings: EStepSettings, log_weights: Tensor, paths: Paths, generator: torch.Generator) -> Tensor:
    """Return ``[A, S]`` weights. Draws from q and leaves of trees are weighted apart and share the mass equally."""
    real = paths.lengths > 0
    if not settings.arw:
        return real / real.sum(-1, keepdim=True).clamp(min=1).to(log_weights.dtype)
    groups = [slice(0, paths.sampled), slice(paths.sampled, real.shape[1])]
    groups = [group for group in groups if group.stop > group.start]
    weights = []
    for group in groups:
        if settings.sampler == "mh":
            found = metropolis_hastings_weights(log_weights[:, group], real[:, group], generator)
        else:
            found = importance_weights(
                log_weights[:, group], real[:, group], min_ess=settings.min_ess, clip=settings.clip
            )
        weights.append(found / len(groups))
    return torch.cat(weights, dim=1)


def path_metrics(paths: Paths, trie: Trie, scores: Scores, judged: Judged) -> dict[str, Tensor]:
    """Return what is logged of an E-step, as scalars.

    ``elbo``: the bound, a mean over draws from q. ``ess``: mean effective sample size. ``path_tau``: mean τ_s.
    ``path_utility``: mean U. ``path_acceptance_d``: mean a at depth d over paths that reach it. ``brier``: mean squared
    distance of q from the outcome of the accept test, over tokens that were tested.
    """
    q = scores.draft[trie.rows, paths.tokens]
    real = (paths.lengths > 0).to(q.dtype)
    count = real.sum().clamp(min=1)
    metrics = {
        "ess": effective_sample_size(judged.weights).mean(),
        "path_tau": (judged.num_accepted * real).sum() / count,
        "path_utility": (judged.utility * real).sum() / count,
        "brier": ((q - judged.kept.to(q.dtype)).square() * judged.tested).sum() / judged.tested.sum().clamp(min=1),
    }
    if paths.sampled:
        metrics["elbo"] = judged.bound[:, : paths.sampled].mean()
    for level, (accept, at) in enumerate(zip(judged.accept.unbind(-1), judged.tested.unbind(-1), strict=True), start=1):
        metrics[f"path_acceptance_{level}"] = (accept * at).sum() / at.sum().clamp(min=1)
    return metrics
