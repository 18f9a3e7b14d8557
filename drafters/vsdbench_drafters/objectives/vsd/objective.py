"""Entry point ``vsd``: Variational Speculative Decoding as one training objective.

    L = L_anchor + ω · path term + λ · CAR

L_anchor is EAGLE-3's loss along the data. The path term is the M-step on what an E-step at the current weights kept,
drawn anew for every batch (online EM). Source of the objective: arXiv 2602.05774; utility, ARW and CAR are this
project's reconstruction (``docs/vsd.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, LossOutput, TargetView
from vsdbench_drafters.objectives.path_objective import PathObjective, check_choice
from vsdbench_drafters.objectives.paths import Paths, Scores, Trie, trace
from vsdbench_drafters.objectives.token import fused
from vsdbench_drafters.objectives.vsd.estep import EStepSettings, Judged, Sampler, judge, path_metrics
from vsdbench_drafters.objectives.vsd.mstep import MStepSettings, path_rows, reached, rejections, soft_targets

if TYPE_CHECKING:
    from vsdbench_drafters.objectives.vsd.confidence import Penalty
    from vsdbench_drafters.objectives.vsd.utility import Acceptance


class VSD(PathObjective):
    """Entry point ``vsd`` (arXiv 2602.05774, reconstructed).

    Args:
        omega: ω, weight of the path term.
        car: λ, weight of the Confidence-Aware Regularization; 0: none.
        car_form: ``linear``, ``squared`` or ``unlikelihood``.
        acceptance: ``sampled``, ``tree`` or ``greedy``: what verification is modelled.
        beta: Temperature of the utility in the weights; ``null``: no utility.
        sampler: ``importance`` or ``mh``.
        arw: Adaptive Rejection Weighting; False: every path 1 / S, every correction 1.
        correction: The target's own token stands in the place of a rejected one; False: rejected paths just end.
        kl: Weights contain log p - log q.
        oracle: The accept test is applied; False: proposals are kept whole.
        targets: ``sampled`` tokens of the corrected paths, or ``full``: their expectation.
        min_ess: Share of the paths that the effective sample size may not fall below.
        clip: Largest weight, in units of 1 / S.
        m_steps: Optimiser steps on one E-step's paths.
        base: See ``PathObjective``.
    """

    name = "vsd"

    def __init__(
        self,
        *,
        omega: float = 0.5,
        car: float = 0.1,
        car_form: Penalty = "linear",
        acceptance: Acceptance = "sampled",
        beta: float | None = 1.0,
        sampler: Sampler = "importance",
        arw: bool = True,
        correction: bool = True,
        kl: bool = True,
        oracle: bool = True,
        targets: Literal["sampled", "full"] = "sampled",
        min_ess: float = 0.25,
        clip: float = 4.0,
        m_steps: int = 1,
        **base: Any,  # noqa: ANN401 - options of the base class
    ) -> None:
        super().__init__(**base)
        check_choice(self.name, "acceptance", acceptance, ("sampled", "tree", "greedy"))
        check_choice(self.name, "sampler", sampler, ("importance", "mh"))
        check_choice(self.name, "targets", targets, ("sampled", "full"))
        check_choice(self.name, "car_form", car_form, ("linear", "squared", "unlikelihood"))
        if targets == "full" and not oracle:
            raise ConfigError(
                "vsd: targets: full is the expectation of the accept test, which oracle: false leaves out."
            )
        if beta is not None and beta <= 0:
            raise ConfigError(f"vsd: beta is {beta}; it must be above 0, or null for no utility.")
        if not 1 <= m_steps <= 4:
            raise ConfigError(f"vsd: m_steps is {m_steps}; use 1 to 4.")
        if omega < 0 or car < 0:
            raise ConfigError(f"vsd: omega is {omega} and car {car}; neither may be negative.")
        self.omega, self.car, self.m_steps = omega, car, m_steps
        self.e_settings = EStepSettings(
            model=acceptance,
            oracle=oracle,
            kl=kl,
            beta=beta,
            sampler=sampler,
            arw=arw,
            min_ess=min_ess,
            clip=clip,
        )
        self.m_settings = MStepSettings(model=acceptance, targets=targets, arw=arw, correction=correction, car=car_form)
        self._rounds: dict[int, _Round] = {}

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return anchor, path term and CAR; an E-step is made unless this batch's is still to be used again."""
        generator = torch.Generator().manual_seed(batch.seed)
        known = self._rounds.pop(batch.seed, None)
        anchors = known.anchors if known else self.place(batch, generator)
        terms, branch = self.walk(batch, drafter, target_view, anchors)
        if known:
            hidden = trace(drafter, branch, known.trie)
        else:
            paths = self.propose(drafter, branch, generator)
            trie, hidden, scores = self.score(batch, drafter, target_view, anchors, branch, paths)
            judged = judge(self.e_settings, paths, trie, scores, generator)
            rows = reached(trie, judged)
            targets = self.targets(paths, trie, scores, judged)[rows]
            known = _Round(anchors, trie, rows, targets, path_metrics(paths, trie, scores, judged), self.m_steps)
        if known.left > 1:
            self._rounds[batch.seed] = replace(known, left=known.left - 1)
        weights = torch.full((len(known.rows),), 1 / max(1, len(anchors)), device=hidden.device)
        losses = path_rows(self.omega, self.car, self.m_settings.car)
        path_term = fused(hidden[known.rows], drafter.head(), known.targets, weights, losses)
        return self.beside_anchor(path_term, terms, known.metrics | {"loss_paths": path_term.detach()})

    def targets(self, paths: Paths, trie: Trie, scores: Scores, judged: Judged) -> Tensor:
        """Return ``[M, 2, Vd]``: soft targets and rejections of every context."""
        wanted = soft_targets(self.m_settings, paths, trie, scores, judged)
        rejected = rejections(paths, trie, judged, wanted) if self.e_settings.oracle else torch.zeros_like(wanted)
        return torch.stack([wanted, rejected], dim=1)


@dataclass(frozen=True, slots=True)
class _Round:
    """One E-step of a batch, kept until its last M-step: its anchors, contexts, and what those reached shall learn."""

    anchors: Tensor
    trie: Trie
    rows: Tensor
    targets: Tensor
    metrics: dict[str, Tensor]
    left: int
