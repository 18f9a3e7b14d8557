"""Token-level objectives: cross-entropy on the target's own tokens, and forward KL to the target's distribution.

Plain functions of logits say what is meant; ``fused`` computes the same from hidden states and the LM head without
keeping a ``[rows, vocabulary]`` float32 tensor per step alive, and the tests hold it against the plain ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, LossOutput, TargetView, unroll

if TYPE_CHECKING:
    from collections.abc import Callable


_CHUNK_ELEMENTS = 1 << 20  # a chunk of float32 logits stays in the cache of a CPU core complex (4 MiB)


def cross_entropy(draft_logits: Tensor, target_tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of -log q(y) over the kept rows (EAGLE, arXiv 2401.15077; Medusa, arXiv 2401.10774).

    Args:
        draft_logits: ``[R, Vd]``.
        target_tokens: ``[R]`` int64 draft-vocabulary ids of the target's own tokens; -1 (outside) is masked.
        mask: ``[R]`` bool.
    """
    keep = mask & (target_tokens >= 0)
    losses = F.cross_entropy(_wide(draft_logits), target_tokens.clamp(min=0), reduction="none")
    return (losses * keep).sum() / keep.sum().clamp(min=1)


def forward_kl(draft_logits: Tensor, target_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(soft_ce, kl)``, means over the kept rows of -Σ p log q and of Σ p log(p/q) (EAGLE-3, arXiv 2503.01840).

    They differ by the target's entropy, so their gradients are equal; the soft cross-entropy is the training loss.

    Args:
        draft_logits: ``[R, Vd]``.
        target_probs: ``[R, Vd]`` p, normalised over the draft vocabulary.
        mask: ``[R]`` bool.
    """
    log_q = torch.log_softmax(_wide(draft_logits), dim=-1)
    soft_ce = -(target_probs * log_q).sum(-1)
    entropy = torch.special.entr(target_probs).sum(-1)
    count = mask.sum().clamp(min=1)
    return (soft_ce * mask).sum() / count, ((soft_ce - entropy) * mask).sum() / count


def step_weights(num_steps: int, decay: float = 0.8) -> list[float]:
    """Return the weights ``decay**i`` of the training-time-test steps, divided by their sum.

    >>> [round(w, 3) for w in step_weights(3)]
    [0.41, 0.328, 0.262]
    """
    raw = [decay**i for i in range(num_steps)]
    return [weight / sum(raw) for weight in raw]


RowLosses: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"
"""``(logits [r, Vd], targets) -> (losses [r], d loss / d logits [r, Vd])``; it may overwrite the logits."""


def fused(hidden: Tensor, head: Tensor, targets: Tensor, row_weights: Tensor, row_losses: RowLosses) -> Tensor:
    """Return Σ_r w_r loss_r of the logits ``hidden @ head.T``, gradients computed in the same pass.

    Losses whose gradient is known in closed form need one sweep over each chunk of logits instead of four, and keep
    only the gradient, in ``hidden``'s dtype.

    Args:
        hidden: ``[R, H]``.
        head: ``[Vd, H]``, any floating dtype; multiplied in ``hidden``'s dtype.
        targets: ``[R, ...]``, what ``row_losses`` compares the logits with, row by row.
        row_weights: ``[R]``; 0 masks a row.
        row_losses: The loss.
    """
    loss: Tensor = _Fused.apply(hidden, head, targets, row_weights, row_losses)  # type: ignore[no-untyped-call]
    return loss


class _Fused(torch.autograd.Function):
    """LM head, loss and gradients, chunk by chunk over the rows."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd's form
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        row_losses: RowLosses,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(hidden.dtype)
            wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            total = torch.zeros((), dtype=wide, device=hidden.device)
            grad_logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
            chunk = max(1, _CHUNK_ELEMENTS // len(weight))
            for first in range(0, len(hidden), chunk):
                rows = slice(first, min(first + chunk, len(hidden)))
                loss, gradient = row_losses((hidden[rows] @ weight.T).to(wide), targets[rows])
                total += (loss * row_weights[rows]).sum()
                grad_logits[rows] = gradient.mul_(row_weights[rows, None])
            grad_hidden = grad_logits @ weight if ctx.needs_input_grad[0] else None
            grad_head = (grad_logits.T @ hidden).to(head.dtype) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_head) if g is not None))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # noqa: ANN401
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) * grad_output if needed else None for needed in ctx.needs_input_grad[:2]]
        return grads[0], grads[1], None, None, None


def cross_entropy_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses -log q(y) and gradients q - 1[y]; ``targets`` are ``[r]`` int64 draft ids, at least 0."""
    log_q = torch.log_softmax(logits, dim=-1)
    picked = targets[:, None]
    losses = -log_q.gather(-1, picked)[:, 0]
    gradient = log_q.exp_()
    return losses, gradient.scatter_add_(-1, picked, -torch.ones_like(picked, dtype=gradient.dtype))


def soft_cross_entropy_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses -Σ p log q and gradients q - p; ``targets`` are ``[r, Vd]`` probabilities p."""
    expected = torch.linalg.vecdot(logits, targets.to(logits.dtype))
    normaliser = torch.logsumexp(logits, dim=-1)
    gradient = logits.sub_(normaliser[:, None]).exp_().sub_(targets)
    return normaliser - expected, gradient


class CrossEntropy:
    """Entry point ``ce``: -log q of the target's own tokens, over ``ttt_steps`` weighted ``step_weight**i``."""

    name = "ce"

    def __init__(self, *, ttt_steps: int = 4, step_weight: float = 0.8) -> None:
        self.weights = step_weights(ttt_steps, step_weight)

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the weighted mean over the steps; tokens outside the draft vocabulary are masked."""

        def of_step(step: int, hidden: Tensor) -> Tensor:
            labels = target_view.target_to_draft[batch.labels(step)]
            keep = (batch.mask(step) & (labels >= 0)).float()
            return fused(hidden, drafter.head(step), labels.clamp(min=0), mean_weights(keep), cross_entropy_rows)

        return _weighted_steps(self.weights, batch, drafter, of_step)


class DistributionObjective:
    """Base of the objectives that compare q with the target's distribution p, token by token.

    A subclass says what it compares by ``row_losses``; masks, steps and weights are the same for all of them.
    """

    name: str
    architectures: ClassVar[tuple[str, ...] | None] = None
    """Those that it can train; None: any."""

    def __init__(self, *, ttt_steps: int = 4, step_weight: float = 0.8) -> None:
        self.weights = step_weights(ttt_steps, step_weight)

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``([r] losses, [r, Vd] d loss / d logits)`` for ``[r, Vd]`` logits and target probabilities."""
        raise NotImplementedError

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the weighted mean over the steps."""
        probs = target_view.probs()

        def of_step(step: int, hidden: Tensor) -> Tensor:
            return self.step_loss(step, hidden, batch, drafter, probs)

        return _weighted_steps(self.weights, batch, drafter, of_step)

    def step_loss(self, step: int, hidden: Tensor, batch: DraftBatch, drafter: DraftModel, probs: Tensor) -> Tensor:
        """Return the mean over the kept rows of one step.

        Args:
            step: The step.
            hidden: ``[R, H]`` the drafter's normed outputs there.
            batch: The batch.
            drafter: Whose LM head is applied.
            probs: ``[R, Vd]`` of the target; row r at this step is held against its row r + step.
        """
        rows = len(hidden) - step
        keep = batch.mask(step)[:rows].float()
        return fused(hidden[:rows], drafter.head(step), probs[step:], mean_weights(keep), self.row_losses)


class ForwardKL(DistributionObjective):
    """Entry point ``kl``: soft cross-entropy to the target's distribution, over ``ttt_steps`` (EAGLE-3)."""

    name = "kl"

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return -Σ p log q, which is the KL plus a constant, and its gradient."""
        return soft_cross_entropy_rows(logits, targets)


def _weighted_steps(
    weights: list[float], batch: DraftBatch, drafter: DraftModel, of_step: Callable[[int, Tensor], Tensor]
) -> LossOutput:
    if drafter.max_steps is not None and drafter.max_steps < len(weights):
        raise ConfigError(f"ttt_steps is {len(weights)}, but this drafter has {drafter.max_steps} steps: lower it.")
    terms = [of_step(step, hidden) for step, hidden in unroll(drafter, batch, len(weights))]
    loss = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()
    return LossOutput(loss, {f"loss_step_{i}": term.detach() for i, term in enumerate(terms)})


def mean_weights(keep: Tensor) -> Tensor:
    """Return row weights that turn a weighted sum into the mean over the kept rows."""
    return keep / keep.sum().clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32, or float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
