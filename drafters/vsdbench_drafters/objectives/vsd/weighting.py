"""From log weights of S paths to weights that can be trained with: importance sampling, Metropolis-Hastings, ESS.

The posterior is π(z) ∝ p(z) κ(z) exp(U / β). Proposals drawn from q weigh log w = log p - log q + log κ + U / β; leaves
of a tree are enumerated and not drawn, so for them - log q is left out and π is restricted to what was enumerated.
Where the accept test has already been applied, survivors are κ times rarer, and log κ is dropped.

Shape legend: A anchors, S paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vsdbench.models.device import send

_BISECTIONS = 24


def effective_sample_size(weights: Tensor) -> Tensor:
    """Return ``[A]`` (Σ w)² / Σ w² of ``[A, S]`` weights (Kong, 1992).

    >>> effective_sample_size(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    tensor([2., 1.])
    """
    return weights.sum(-1).square() / weights.square().sum(-1).clamp(min=1e-30)


def importance_weights(log_weights: Tensor, real: Tensor, *, min_ess: float = 0.0, clip: float = 0.0) -> Tensor:
    """Return ``[A, S]`` self-normalised weights, tempered and truncated (ARW, this project's reconstruction).

    Weights are raised to a power of at most 1, the largest that keeps the effective sample size at ``min_ess`` of the
    paths or more, normalised, and cut off at ``clip`` / S (truncated importance sampling, Ionides 2008).

    Args:
        log_weights: ``[A, S]``, -inf allowed.
        real: ``[A, S]`` bool: entries that are paths. An anchor without one gets zeros.
        min_ess: Share of S; 0 leaves the weights as they are.
        clip: In units of 1 / S; 0 for none.
    """
    count = real.sum(-1, keepdim=True).clamp(min=1)
    best = log_weights.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
    hopeless = torch.isinf(best)  # no path has any weight: all have the same
    shifted = torch.where(hopeless, 0.0, log_weights - best.masked_fill(hopeless, 0.0))
    shifted = shifted.clamp(min=-1e4)  # so that a power of 0 makes all equal

    def normalised(power: Tensor | float) -> Tensor:
        raised = (power * shifted).exp() * real
        return raised / raised.sum(-1, keepdim=True).clamp(min=1e-30)

    weights = normalised(1.0)
    if min_ess > 0:
        wanted = min_ess * count[:, 0]
        low, high = torch.zeros_like(count, dtype=shifted.dtype), torch.ones_like(count, dtype=shifted.dtype)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            enough = (effective_sample_size(normalised(middle)) >= wanted)[:, None]
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        weights = torch.where((effective_sample_size(weights) >= wanted)[:, None], weights, normalised(low))
    return weights.minimum(clip / count) if clip > 0 else weights


def metropolis_hastings_weights(log_weights: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``[A, S]`` how often an independence Metropolis-Hastings chain stays on each path, divided by S.

    The proposals are the paths in their order, α = min(1, w(z') / w(z)); the first one starts the chain.

    Args:
        log_weights: ``[A, S]`` log π - log q.
        real: ``[A, S]`` bool: entries that are paths; those of an anchor stand first.
        generator: On the host; one number a proposal.
    """
    num_anchors, num_paths = log_weights.shape
    device = log_weights.device
    uniform = send(torch.rand(num_anchors, num_paths, generator=generator, dtype=torch.float64), device)
    current = torch.zeros(num_anchors, 1, dtype=torch.int64, device=device)
    visits = torch.zeros_like(log_weights)
    for proposal in range(num_paths):
        gain = log_weights[:, proposal, None] - log_weights.gather(1, current)
        moved = (uniform[:, proposal, None].log() < gain.nan_to_num(nan=0.0)) & real[:, proposal, None]
        current = torch.where(moved, proposal, current)
        visits.scatter_add_(1, current, real[:, proposal, None].to(visits.dtype))
    return visits / real.sum(-1, keepdim=True).clamp(min=1)
