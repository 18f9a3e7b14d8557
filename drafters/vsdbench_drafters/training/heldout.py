"""What a drafter is worth on answers it was not trained on: agreement with the target, step by step.

``tau_chain`` is the number that training is steered by: the expected tokens of a verification step when chains of
four are drafted greedily along the held-out answers. It costs one training-time test and needs no decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, TargetView, unroll

if TYPE_CHECKING:
    from vsdbench_drafters.training.features import BatchMaker

NUM_STEPS = 4


@dataclass(frozen=True, slots=True)
class _Reference:
    """One held-out batch with the target's choices over its whole vocabulary."""

    batch: DraftBatch
    view: TargetView
    choice: Tensor
    """``[R]`` int64: the target's most likely token."""
    covered: Tensor
    """``[R]`` float32: the target's probability mass inside the draft vocabulary."""


class HeldOut:
    """Held-out batches, ready to be scored again and again.

    Args:
        maker: Makes the batches; its head is the target's whole LM head.
        batches: Indices of held-out sequences.
    """

    def __init__(self, maker: BatchMaker, batches: Sequence[Sequence[int]]) -> None:
        self._references = [self._refer(maker, indices) for indices in batches]

    @staticmethod
    @torch.no_grad()
    def _refer(maker: BatchMaker, indices: Sequence[int]) -> _Reference:
        batch, view = maker.make(indices)
        choices, covered = [], []
        for rows in torch.split(view.hidden, 256):
            logits = (rows.to(maker.head.dtype) @ maker.head.T).float()
            choices.append(logits.argmax(-1))
            inside = torch.logsumexp(logits[:, maker.drafter.draft_ids], dim=-1)
            covered.append((inside - torch.logsumexp(logits, dim=-1)).exp())
        return _Reference(batch, view, torch.cat(choices), torch.cat(covered))

    @torch.no_grad()
    def evaluate(self, drafter: DraftModel, *, autocast: bool) -> dict[str, float]:
        """Return ``tau_chain``, and ``agreement_i``, ``acceptance_i`` (Σ min(p, q)) and ``kl_i`` of every step i."""
        sums = torch.zeros(NUM_STEPS, 4, dtype=torch.float64)
        counts = torch.zeros(NUM_STEPS, dtype=torch.float64)
        for reference in self._references:
            self._score(reference, drafter, autocast, sums, counts)
        means = sums / counts.clamp(min=1)[:, None]
        metrics = {"tau_chain": 1 + float(sums[:, 0].sum() / counts[0].clamp(min=1))}
        for step in range(NUM_STEPS):
            for column, name in enumerate(("agreement", "acceptance", "kl"), start=1):
                metrics[f"{name}_{step}"] = float(means[step, column])
        return metrics

    @staticmethod
    def _score(reference: _Reference, drafter: DraftModel, autocast: bool, sums: Tensor, counts: Tensor) -> None:
        """Add one batch's sums of (reached, agreed, acceptance, KL) by step."""
        batch = reference.batch
        alive = torch.ones(batch.num_rows, dtype=torch.bool, device=batch.slots.device)
        device_type = batch.slots.device.type
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=autocast):
            for step, hidden in unroll(drafter, batch, NUM_STEPS):
                rows = batch.num_rows - step
                keep = batch.mask(step)[:rows]
                log_q = torch.log_softmax(F.linear(hidden[:rows], drafter.head(step)).float(), dim=-1)
                probs = reference.view.probs()[step:]
                agreed = (drafter.draft_ids[log_q.argmax(-1)] == reference.choice[step:]) & keep
                alive = alive[:rows] & agreed
                overlap = torch.minimum(log_q.exp(), probs * reference.covered[step:, None]).sum(-1)
                divergence = -(torch.special.entr(probs) + probs * log_q).sum(-1)
                values = torch.stack([alive.float(), agreed.float(), overlap * keep, divergence * keep])
                sums[step] += values.double().sum(-1).cpu()
                counts[step] += float(keep.sum())
