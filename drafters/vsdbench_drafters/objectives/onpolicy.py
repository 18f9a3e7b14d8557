"""Entry point ``onpolicy``: token-level divergences where the drafter itself would be, not where the data is.

The control of VSD: the same samples, the same oracle, but every drafted context counts, accepted or not, and all
paths weigh the same. With ``divergence: rkl`` it is on-policy reverse KL (DistillSpec, arXiv 2310.08461; GKD, arXiv
2306.13649), which VSD's bound reduces to where κ is left out.
"""

from __future__ import annotations

from typing import Any

import torch

from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives import divergence, token
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, LossOutput, TargetView
from vsdbench_drafters.objectives.path_objective import PathObjective, check_choice

_DIVERGENCES: dict[str, type[token.DistributionObjective]] = {
    "kl": token.ForwardKL,
    "rkl": divergence.ReverseKL,
    "jsd": divergence.JensenShannon,
    "tvd": divergence.TotalVariation,
    "lk": divergence.LogAcceptance,
}


class OnPolicy(PathObjective):
    """Mean divergence of q from p over the contexts of drafted paths, beside the anchor loss.

    Args:
        omega: Weight of the path term.
        divergence: ``rkl``, ``kl``, ``jsd``, ``tvd`` or ``lk``.
        base: See ``PathObjective``.
    """

    name = "onpolicy"

    def __init__(self, *, omega: float = 0.5, divergence: str = "rkl", **base: Any) -> None:  # noqa: ANN401
        super().__init__(**base)
        check_choice(self.name, "divergence", divergence, tuple(_DIVERGENCES))
        if omega < 0:
            raise ConfigError(f"onpolicy: omega is {omega}; it may not be negative.")
        self.omega = omega
        self._divergence = _DIVERGENCES[divergence]()

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the anchor loss and ω times the mean, over anchors, of Σ over depths of the paths' mean divergence."""
        generator = torch.Generator().manual_seed(batch.seed)
        anchors = self.place(batch, generator)
        terms, branch = self.walk(batch, drafter, target_view, anchors)
        paths = self.propose(drafter, branch, generator)
        trie, hidden, scores = self.score(batch, drafter, target_view, anchors, branch, paths)
        valid = paths.valid
        share = (1 / (paths.lengths > 0).sum(-1).clamp(min=1)).float()[:, None, None] * valid
        weights = torch.zeros(len(trie), device=hidden.device).index_add_(0, trie.rows.flatten(), share.flatten())
        path_term = token.fused(
            hidden,
            drafter.head(),
            # As elsewhere, p is renormalised over the draft vocabulary: closed-form gradients need Σ p = 1.
            scores.target / scores.target.sum(-1, keepdim=True),
            weights * (self.omega / max(1, len(anchors))),
            self._divergence.row_losses,
        )
        return self.beside_anchor(path_term, terms, {"loss_paths": path_term.detach()})
