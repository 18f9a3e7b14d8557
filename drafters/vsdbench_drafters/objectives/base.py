"""What an objective sees and returns: a packed batch, the target's view of it, the drafter being trained.

A batch is packed: the N tokens of all its sequences stand in one flat row, so that no padding is ever multiplied.
*Slot* t of a sequence pairs the target's feature of token t with the embedding of token t + 1; with its own first
output it predicts token t + 2. Training-time test (EAGLE-3, arXiv 2503.01840) then feeds the output back: at step i
the same slot sees token t + 1 + i and predicts token t + 2 + i. Only slots whose first prediction is a response token
are *rows* of the loss.

Shape legend: N packed tokens, R rows, H drafter width, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vsdbench.models.device import send, send_numbers

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import Drafter
    from vsdbench_drafters.objectives.paths import BranchingTarget

TINY = 1e-20
"""Floor of probabilities inside a logarithm: far below what a float32 softmax gives a token that matters."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where one sequence lies in the packed batch.

    Attributes:
        start: First token in the flat row.
        length: Number of tokens, prompt included.
        first_slot: First slot (relative to ``start``) that is a row of the loss.
        first_row: Index of that row among the R rows of the batch.
    """

    start: int
    length: int
    first_slot: int
    first_row: int

    @property
    def num_rows(self) -> int:
        """Rows of this sequence: slots ``first_slot`` … ``length - 3``, each with a token t + 2 to predict."""
        return self.length - 2 - self.first_slot


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """Which tokens of packed sequences stand for pieces of images, and what the target sees there.

    Attributes:
        mask: ``[N]`` bool.
        embeddings: ``[M, H_target]`` what enters the target's first layer at those M tokens, in order.
    """

    mask: Tensor
    embeddings: Tensor


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """A packed batch.

    Attributes:
        tokens: ``[N]`` int64.
        features: ``[N, 4H_target]`` features of the target, slot by slot (see ``interfaces.TargetOutput``).
        spans: The sequences, in packed order.
        slots: ``[R]`` int64, flat slot index of every row.
        ends: ``[R]`` int64, flat index just behind the last token of the row's sequence.
        seed: For whatever an objective draws; the loop gives each batch of a training its own.
        image_mask: ``[N]`` bool, tokens that stand for a piece of an image; None: there is no image in the batch.
        image_embeddings: ``[M, H_target]`` what enters the target's first layer at those tokens, in order.
    """

    tokens: Tensor
    features: Tensor
    spans: tuple[Span, ...]
    slots: Tensor
    ends: Tensor
    seed: int = 0
    image_mask: Tensor | None = None
    image_embeddings: Tensor | None = None

    @classmethod
    def pack(
        cls,
        sequences: Sequence[Sequence[int]],
        prompt_lens: Sequence[int],
        features: Tensor,
        *,
        seed: int = 0,
        images: ImageTokens | None = None,
    ) -> DraftBatch:
        """Return the batch of these sequences; ``features`` are ``[N, 4H]`` in the same order.

        A sequence without a response token to predict contributes no row, and neither does a slot that is followed by
        a piece of an image. ``images`` are those of all sequences, None where there are none.
        """
        spans, slots, ends, start, row = [], [], [], 0, 0
        shown = None if images is None else images.mask.cpu()
        for sequence, prompt_len in zip(sequences, prompt_lens, strict=True):
            # Slot t predicts token t + 2, so the first response token (index prompt_len) belongs to prompt_len - 2.
            first = prompt_len - 2
            if shown is not None:
                first = max([first, *shown[start : start + len(sequence)].nonzero()[-1:, 0].tolist()])
            first_slot = min(max(first, 0), max(len(sequence) - 2, 0))
            span = Span(start, len(sequence), first_slot, row)
            if span.num_rows > 0:
                spans.append(span)
                slots.append(torch.arange(start + first_slot, start + len(sequence) - 2))
                ends.append(torch.full((span.num_rows,), start + len(sequence)))
                row += span.num_rows
            start += len(sequence)
        device = features.device
        empty = torch.empty(0, dtype=torch.int64)
        return cls(
            send_numbers([token for sequence in sequences for token in sequence], device),
            features,
            tuple(spans),
            send(torch.cat([empty, *slots]), device),
            send(torch.cat([empty, *ends]), device),
            seed,
            None if images is None else images.mask.to(device),
            None if images is None else images.embeddings.to(device),
        )

    @property
    def shows_image(self) -> Tensor | None:
        """``[N]`` bool: slots that are followed by a piece of an image; None: there is no image in the batch."""
        return None if self.image_mask is None else torch.roll(self.image_mask, -1)

    @property
    def num_rows(self) -> int:
        """R: response tokens that the first step predicts."""
        return len(self.slots)

    def inputs(self, step: int) -> Tensor:
        """Return ``[R]`` int64: the token that a row sees at a step (t + 1 + step; the last one beyond the end)."""
        return self.tokens[torch.minimum(self.slots + 1 + step, self.ends - 1)]

    def labels(self, step: int) -> Tensor:
        """Return ``[R]`` int64: the token that a row predicts at a step (t + 2 + step)."""
        return self.tokens[torch.minimum(self.slots + 2 + step, self.ends - 1)]

    def mask(self, step: int) -> Tensor:
        """Return ``[R]`` bool: rows whose prediction at a step still lies inside the sequence."""
        return self.slots + 2 + step < self.ends

    def paired(self, step: int) -> Tensor:
        """Return ``mask(step)`` of the first R - step rows, 0 at least: those r that have a row r + step.

        Row r at a step is held against what the target says at row r + step (see ``TargetView``). What lies behind
        these rows is False in ``mask``.
        """
        return self.mask(step)[: max(self.num_rows - step, 0)]


@dataclass(slots=True)
class TargetView:
    """The target's distributions at the rows of a batch, over the draft vocabulary, computed once when first asked for.

    Step i of row r predicts the token that row r + i predicts first, so one ``[R, Vd]`` tensor serves all steps: step i
    reads it from row i on, and ``DraftBatch.mask`` says which rows stay inside their sequence.

    Attributes:
        hidden: ``[R, H_target]``, the target's last normed hidden states at position t + 1 of every row.
        head: ``[Vd, H_target]``, the rows of the target's LM head that the draft vocabulary keeps.
        target_to_draft: ``[V]`` int64, the draft id of every target id, -1 where there is none.
        full_head: ``[V, H_target]``, the whole LM head.
        target: The target itself, for objectives that ask it about drafted tokens; None where nothing may.
    """

    hidden: Tensor
    head: Tensor
    target_to_draft: Tensor
    full_head: Tensor
    target: BranchingTarget | None = None
    _probs: Tensor | None = field(default=None, repr=False)

    def probs(self) -> Tensor:
        """Return ``[R, Vd]`` float32 probabilities, renormalised over the draft vocabulary."""
        if self._probs is None:
            with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
                logits = self.hidden.to(self.head.dtype) @ self.head.T
                wide = logits if logits.dtype == torch.float64 else logits.float()
                self._probs = torch.softmax(wide, dim=-1)
        return self._probs


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A scalar loss with its graph, and detached numbers for the log."""

    loss: Tensor
    metrics: dict[str, Tensor]


class DraftContext(Protocol):
    """What a drafter remembers of a batch between two steps.

    Attributes:
        hidden: ``[R, H]`` outputs of the last step.
    """

    hidden: Tensor

    def select(self, rows: Tensor) -> DraftContext:
        """Return a context of these rows, ``[n]`` int64, which goes on independently."""


class DraftModel(nn.Module):
    """Base of the trainable drafters: what objectives, the training loop and held-out scores use of one.

    A subclass has parameters, ``start`` and ``advance``, and a public checkpoint format. Logits of a step are
    ``norm(output) @ head(step).T``, over the draft vocabulary.

    Args:
        draft_ids: ``[Vd]`` int64, the target ids of the draft vocabulary in increasing order.
        vocab_size: V.
    """

    one_head: ClassVar[bool] = True
    """Every step has the same LM head, so outputs of several steps can be scored together."""
    predicts_features: ClassVar[bool] = False
    """Outputs are predictions of the target's last normed hidden state, a token ahead."""
    max_steps: int | None = None
    """Steps that it can be unrolled; None: any number."""
    norm: nn.Module
    """Makes outputs ready for the head: the final norm, or ``nn.Identity`` where there is none."""

    def __init__(self, draft_ids: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.d2t: Tensor
        self.t2d: Tensor
        self.register_buffer("d2t", draft_ids - torch.arange(len(draft_ids), device=draft_ids.device))
        member = torch.zeros(vocab_size, dtype=torch.bool, device=draft_ids.device)
        member[draft_ids] = True
        self.register_buffer("t2d", member)

    @property
    def draft_ids(self) -> Tensor:
        """``[Vd]`` int64: the target id of every draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def target_to_draft(self) -> Tensor:
        """``[V]`` int64: the draft id of every target id, -1 outside the draft vocabulary."""
        table = torch.full((len(self.t2d),), -1, dtype=torch.int64, device=self.d2t.device)
        table[self.draft_ids] = torch.arange(len(self.d2t), device=self.d2t.device)
        return table

    def start(self, batch: DraftBatch) -> DraftContext:
        """Return the context of a batch's rows before any step."""
        raise NotImplementedError

    def advance(self, context: Any, tokens: Tensor) -> Tensor:  # noqa: ANN401 - the drafter's own context
        """Run one step with ``[R]`` input tokens; return ``[R, H]`` outputs, which ``norm`` readies for the head."""
        raise NotImplementedError

    def head(self, step: int = 0) -> Tensor:
        """Return ``[Vd, H]``, the LM head of a step."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the checkpoint."""
        raise NotImplementedError

    def drafter(self, dtype: torch.dtype) -> Drafter:
        """Return the decode-time drafter, with a copy of the weights as they are now."""
        raise NotImplementedError


class Objective(Protocol):
    """A training objective. It never touches optimisers, data order or checkpoints.

    It may have more: ``architectures`` that it can train, by name (None: any); ``begin(drafter)``, told before training
    what is trained; ``m_steps``, how many optimiser steps in a row it is given the same batches for (with the same
    seeds), 1 if it does not say; ``row_losses``, which ``training.compiled`` compiles.
    """

    name: str

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the mean loss of a batch."""


def unroll(
    drafter: DraftModel, batch: DraftBatch, num_steps: int, context: DraftContext | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(step, hidden [R, H])``, the normed outputs of the training-time test along the data's own tokens.

    A drafter that has no more than so many steps is unrolled to its last one. A caller that wants to branch off passes
    the context that ``drafter.start`` gave it.
    """
    context = context or drafter.start(batch)
    for step in range(num_steps if drafter.max_steps is None else min(num_steps, drafter.max_steps)):
        yield step, drafter.norm(drafter.advance(context, batch.inputs(step)))
