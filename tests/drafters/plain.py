"""Losses and features written the plain way, which the faster ones of training are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vsdbench_drafters.training.features import run_target


def cross_entropy(draft_logits, target_tokens, mask):
    """The mean of -log q(y) over the kept rows; tokens of -1 are outside the draft vocabulary and masked."""
    keep = mask & (target_tokens >= 0)
    losses = F.cross_entropy(_wide(draft_logits), target_tokens.clamp(min=0), reduction="none")
    return (losses * keep).sum() / keep.sum().clamp(min=1)


def forward_kl(draft_logits, target_probs, mask):
    """Means over the kept rows of -Σ p log q and of Σ p log(p/q), which differ by the target's entropy."""
    log_q = torch.log_softmax(_wide(draft_logits), dim=-1)
    soft_ce = -(target_probs * log_q).sum(-1)
    entropy = torch.special.entr(target_probs).sum(-1)
    count = mask.sum().clamp(min=1)
    return (soft_ce * mask).sum() / count, ((soft_ce - entropy) * mask).sum() / count


def reverse_kl(draft, target):
    """Σ q log(q / p) of each row (arXiv 2310.08461), as all that follow of probabilities ``[R, Vd]``."""
    return (draft * (draft / target).log()).sum(-1)


def jensen_shannon(draft, target, beta=0.5):
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q (arXiv 2310.08461)."""
    middle = beta * target + (1 - beta) * draft
    return (beta * target * (target / middle).log() + (1 - beta) * draft * (draft / middle).log()).sum(-1)


def total_variation(draft, target):
    """½ Σ |p - q|: one minus the chance that a sampled token is accepted."""
    return 0.5 * (draft - target).abs().sum(-1)


def top_k_cross_entropy(draft, target, k):
    """-Σ p log q over the k likeliest tokens of p, not renormalised (arXiv 2408.15766)."""
    top = target.topk(k, dim=-1)
    return -(top.values * draft.gather(-1, top.indices).log()).sum(-1)


def log_acceptance(draft, target):
    """-log Σ min(p, q), the LK-α loss (arXiv 2602.23881)."""
    return -torch.minimum(draft, target).sum(-1).log()


def acceptance_mixture(draft, target, eta=3.0):
    """λ KL(p ‖ q) + (1 - λ) TV, λ = exp(-η Σ min(p, q)) held constant, the LK-λ loss (arXiv 2602.23881)."""
    share = torch.exp(-eta * torch.minimum(draft, target).sum(-1)).detach()
    return share * (target * (target / draft).log()).sum(-1) + (1 - share) * total_variation(draft, target)


def target_pass(target, sequences):
    """``[L, 4H]`` for each sequence: the three features, then the last normed hidden state."""
    return [one.states for one in run_target(target, sequences, keys=False)]


def _wide(logits):
    return logits if logits.dtype == torch.float64 else logits.float()
