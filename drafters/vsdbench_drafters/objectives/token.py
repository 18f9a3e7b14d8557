"""Token-level objectives: cross-entropy on the target's own tokens, and forward KL to the target's distribution.

``fused`` computes them from hidden states and the LM head without keeping a ``[rows, vocabulary]`` float32 tensor per
step alive; the tests hold it against plain functions of logits.
``fused_steps`` does all steps of a training-time test that have one head at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, LossOutput, TargetView, unroll

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_PRODUCT_ELEMENTS = 1 << 22  # logits that one product makes
_CHUNK_ELEMENTS = 1 << 18  # of them, those that are float32 at a time: 1 MiB stays in the cache of a CPU core
_GPU_ELEMENTS = 1 << 25  # the same of a GPU, which has no such cache and waits for the host between two chunks


def elements_at_once(device: torch.device) -> int:
    """Return how many float32 numbers of a ``[rows, Vd]`` matrix are worked on together.

    >>> elements_at_once(torch.device("cpu")) < elements_at_once(torch.device("cuda"))
    True
    """
    return _CHUNK_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS


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
    """Return Σ_r w_r loss_r of the logits ``hidden @ head.T``, their gradient computed in the same pass.

    Losses whose gradient is known in closed form need one sweep over each chunk of logits instead of four, and keep
    only the gradient, in ``hidden``'s dtype.

    Args:
        hidden: ``[R, H]``.
        head: ``[Vd, H]``, any floating dtype; multiplied in ``hidden``'s dtype.
        targets: ``[R, ...]``, what ``row_losses`` compares the logits with, row by row.
        row_weights: ``[R]``; 0 masks a row.
        row_losses: The loss.
    """
    return fused_steps([hidden], head, [targets], [row_weights], row_losses)[0]


def fused_steps(
    hidden: Sequence[Tensor],
    head: Tensor,
    targets: Sequence[Tensor],
    row_weights: Sequence[Tensor],
    row_losses: RowLosses,
) -> Tensor:
    """Return ``[steps]``, what ``fused`` returns of each step; the head is read and learns once for all of them.

    Args:
        hidden: Of every step, ``[R_i, H]``.
        head: ``[Vd, H]``.
        targets: Of every step.
        row_weights: Of every step.
        row_losses: The loss.
    """
    losses: Tensor = _Fused.apply(head, tuple(targets), tuple(row_weights), row_losses, *hidden)  # type: ignore[no-untyped-call]
    return losses


class _Fused(torch.autograd.Function):
    """LM head, loss and the gradient of logits, chunk by chunk over the rows; two products give the other gradients."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        head: Tensor,
        targets: tuple[Tensor, ...],
        row_weights: tuple[Tensor, ...],
        row_losses: RowLosses,
        *hidden: Tensor,
    ) -> Tensor:
        first, counts = hidden[0], [len(step) for step in hidden]
        with torch.autocast(first.device.type, enabled=False):
            weight = head.to(first.dtype)
            wide = torch.float64 if first.dtype == torch.float64 else torch.float32
            totals = torch.zeros(len(hidden), dtype=wide, device=first.device)
            grad_logits = torch.empty(sum(counts), len(weight), dtype=first.dtype, device=first.device)
            for step, gradient in enumerate(torch.split(grad_logits, counts)):
                totals[step] = _sweep(hidden[step], weight, targets[step], row_weights[step], row_losses, gradient)
        ctx.counts, ctx.head_dtype = counts, head.dtype
        ctx.save_for_backward(weight, grad_logits, *hidden)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        weight, grad_logits, *hidden = ctx.saved_tensors
        grad_head: Tensor | None = None
        grad_hidden: list[Tensor | None] = [None] * len(hidden)
        with torch.autocast(weight.device.type, enabled=False):
            steps = grad_output.unbind()
            if ctx.needs_input_grad[0]:
                scaled = torch.cat([states * scale for states, scale in zip(hidden, steps, strict=True)])
                grad_head = (grad_logits.T @ scaled.to(weight.dtype)).to(ctx.head_dtype)
            if any(ctx.needs_input_grad[4:]):
                parts = torch.split(grad_logits @ weight, ctx.counts)
                grad_hidden = [part * scale.to(part.dtype) for part, scale in zip(parts, steps, strict=True)]
        return grad_head, None, None, None, *grad_hidden


def _sweep(  # noqa: PLR0917 - one step of what ``fused_steps`` has
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, row_losses: RowLosses, gradient: Tensor
) -> Tensor:
    """Return one step's weighted sum of losses; fill ``gradient`` ``[R, Vd]`` with its gradient by the logits."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=hidden.device)
    at_once = elements_at_once(hidden.device)
    chunk = max(1, at_once // len(weight))
    product = chunk * max(1, _PRODUCT_ELEMENTS // at_once)
    for start in range(0, len(hidden), product):
        logits = hidden[start : start + product] @ weight.T
        for offset in range(0, len(logits), chunk):
            some = logits[offset : offset + chunk]
            rows = slice(start + offset, start + offset + len(some))
            loss, slope = row_losses(some.to(wide), targets[rows])
            total += (loss * row_weights[rows]).sum()
            gradient[rows] = slope.mul_(row_weights[rows, None])
    return total


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
    probs = torch.softmax(logits, dim=-1)
    normaliser = logits.amax(-1) - probs.amax(-1).log()  # one exponential an element, softmax's own
    return normaliser - expected, probs.sub_(targets)


class CrossEntropy:
    """Entry point ``ce``: -log q of the target's own tokens, over ``ttt_steps`` weighted ``step_weight**i``."""

    name = "ce"

    def __init__(self, *, ttt_steps: int = 4, step_weight: float = 0.8) -> None:
        self.weights = step_weights(ttt_steps, step_weight)

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the weighted mean over the steps; tokens outside the draft vocabulary are masked."""
        check_steps(self.weights, drafter)
        steps = list(unroll(drafter, batch, len(self.weights)))
        labels = [target_view.target_to_draft[batch.labels(step)] for step, _ in steps]
        keep = [(batch.mask(step) & (labels[step] >= 0)).float() for step, _ in steps]
        return weighted(
            self.weights,
            step_terms(
                drafter,
                [hidden for _, hidden in steps],
                [label.clamp(min=0) for label in labels],
                [mean_weights(rows) for rows in keep],
                cross_entropy_rows,
            ),
        )


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
        check_steps(self.weights, drafter)
        hidden = [states for _, states in unroll(drafter, batch, len(self.weights))]
        return weighted(self.weights, self.step_losses(hidden, batch, drafter, target_view.probs()))

    def step_losses(self, hidden: list[Tensor], batch: DraftBatch, drafter: DraftModel, probs: Tensor) -> list[Tensor]:
        """Return the mean over the kept rows of every step.

        Args:
            hidden: ``[R, H]`` the drafter's normed outputs of the steps, from the first one on.
            batch: The batch.
            drafter: Whose LM head is applied.
            probs: ``[R, Vd]`` of the target; row r at step i is held against its row r + i.
        """
        keep = [batch.paired(step) for step in range(len(hidden))]
        return step_terms(
            drafter,
            [states[: len(rows)] for states, rows in zip(hidden, keep, strict=True)],
            [probs[step:] for step in range(len(hidden))],
            [mean_weights(rows.float()) for rows in keep],
            self.row_losses,
        )


class ForwardKL(DistributionObjective):
    """Entry point ``kl``: soft cross-entropy to the target's distribution, over ``ttt_steps`` (EAGLE-3)."""

    name = "kl"

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return -Σ p log q, which is the KL plus a constant, and its gradient."""
        return soft_cross_entropy_rows(logits, targets)


def step_terms(
    drafter: DraftModel,
    hidden: list[Tensor],
    targets: list[Tensor],
    row_weights: list[Tensor],
    row_losses: RowLosses,
) -> list[Tensor]:
    """Return the loss of every step; see ``fused_steps``."""
    if drafter.one_head:
        return list(fused_steps(hidden, drafter.head(), targets, row_weights, row_losses).unbind())
    parts = enumerate(zip(hidden, targets, row_weights, strict=True))
    return [fused(states, drafter.head(step), target, rows, row_losses) for step, (states, target, rows) in parts]


def check_steps(weights: list[float], drafter: DraftModel) -> None:
    """Refuse more steps than a drafter has.

    Raises:
        ConfigError: It has fewer.
    """
    if drafter.max_steps is not None and drafter.max_steps < len(weights):
        raise ConfigError(f"ttt_steps is {len(weights)}, but this drafter has {drafter.max_steps} steps: lower it.")


def weighted(weights: list[float], terms: list[Tensor]) -> LossOutput:
    """Return the weighted sum of the steps' losses."""
    loss = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()
    return LossOutput(loss, {f"loss_step_{i}": term.detach() for i, term in enumerate(terms)})


def mean_weights(keep: Tensor) -> Tensor:
    """Return row weights that turn a weighted sum into the mean over the kept rows."""
    return keep / keep.sum().clamp(min=1)
