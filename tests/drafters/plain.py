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


def target_pass(target, sequences):
    """``[L, 4H]`` for each sequence: the three features, then the last normed hidden state."""
    return [one.states for one in run_target(target, sequences, keys=False)]


def _wide(logits):
    return logits if logits.dtype == torch.float64 else logits.float()
