"""What a drafter is worth on prompts it was not trained on: agreement with the target, and real decoding.

``tau_chain`` costs one training-time test and no decoding: the expected tokens of a verification step when chains of
four are drafted greedily along the held-out answers. ``tau`` is what the decoder itself does with the drafter as it is
now, tree and all; selection goes by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.decoding.engine import DecodeSettings, decode
from vsdbench.decoding.sampling import SamplingParams
from vsdbench.errors import ConfigError
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, TargetView, unroll
from vsdbench_drafters.objectives.misalignment import Misalignment, misalignment
from vsdbench_drafters.training.feature_choice import heldout_source
from vsdbench_drafters.training.features import BatchMaker, plan_batches, response_rows, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from vsdbench.decoding.interfaces import Drafter
    from vsdbench.models.target import Target
    from vsdbench_drafters.training.features import Sequenced
    from vsdbench_drafters.training.recipe import RecipeConfig
    from vsdbench_drafters.training.shards import TrainingData

NUM_STEPS = 4
_ANCHORS = 4  # of a held-out answer, for misalignment


class Evaluator(Protocol):
    """Judges a drafter during training."""

    def evaluate(self, drafter: DraftModel, *, autocast: bool) -> dict[str, float]:
        """Return numbers by name; more is better in none but those that a recipe selects by."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """One held-out batch with the target's choices over its whole vocabulary."""

    batch: DraftBatch
    view: TargetView
    choice: Tensor
    """``[R]`` int64: the target's most likely token."""
    covered: Tensor
    """``[R]`` float32: the target's probability mass inside the draft vocabulary."""
    entropy: Tensor
    """``[R]`` float32: of the target's distribution over the draft vocabulary, in nats."""


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
        entropy = torch.special.entr(view.probs()).sum(-1)
        return _Reference(batch, view, torch.cat(choices), torch.cat(covered), entropy)

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
                keep = batch.paired(step)
                rows = len(keep)
                log_q = torch.log_softmax(F.linear(hidden[:rows], drafter.head(step)).float(), dim=-1)
                probs = reference.view.probs()[step:]
                agreed = (drafter.draft_ids[log_q.argmax(-1)] == reference.choice[step:]) & keep
                alive = alive[:rows] & agreed
                overlap = torch.minimum(log_q.exp(), probs * reference.covered[step:, None]).sum(-1)
                divergence = -reference.entropy[step:] - (probs * log_q).sum(-1)
                values = torch.stack([alive.float(), agreed.float(), overlap * keep, divergence * keep])
                sums[step] += values.double().sum(-1).cpu()
                counts[step] += float(keep.sum())


class DecodedHeldOut:
    """Held-out numbers with ``tau``: held-out prompts decoded with the drafter as it is (protocol ``Evaluator``).

    Args:
        scores: The numbers that need no decoding; None: none.
        target: The target.
        prompts: Prompt token ids.
        settings: How they are decoded.
        build: Makes the decode-time drafter of a model.
        batches: Held-out batches with a target to ask, for the numbers of ``objectives.misalignment``; none: without.
    """

    def __init__(
        self,
        scores: HeldOut | None,
        target: Target,
        prompts: Sequence[Sequence[int]],
        settings: DecodeSettings,
        build: Callable[[DraftModel], Drafter],
        *,
        batches: Sequence[tuple[DraftBatch, TargetView]] = (),
    ) -> None:
        self._scores = scores
        self._target = target
        self._prompts = prompts
        self._settings = settings
        self._build = build
        self._batches = batches

    def evaluate(self, drafter: DraftModel, *, autocast: bool) -> dict[str, float]:
        """Return ``HeldOut``'s numbers, ``tau``, and ``kept_at_depth_d``: drafts kept at depth d, a step."""
        found = {} if self._scores is None else self._scores.evaluate(drafter, autocast=autocast)
        decoder = self._build(drafter)
        steps = [
            step for prompt in self._prompts for step in decode(self._target, decoder, prompt, self._settings).steps
        ]
        count = max(1, len(steps))
        found["tau"] = sum(step.num_emitted for step in steps) / count
        for depth in range(1, self._settings.shape.depth + 1):
            found[f"kept_at_depth_{depth}"] = sum(step.num_accepted >= depth for step in steps) / count
        return found | self._misalignment(drafter, autocast=autocast)

    def _misalignment(self, drafter: DraftModel, *, autocast: bool) -> dict[str, float]:
        shape = self._settings.shape
        if not self._batches or shape.kind != "dynamic":
            return {}
        total = Misalignment()
        for batch, view in self._batches:
            with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16, enabled=autocast):
                total += misalignment(
                    batch, drafter, view,
                    per_sequence=_ANCHORS, budget=shape.budget, top_k=shape.top_k, depth=shape.depth,
                )  # fmt: skip
        return total.shares()


def evaluator(
    recipe: RecipeConfig, target: Target, data: TrainingData, model: DraftModel, console: Console
) -> HeldOut | DecodedHeldOut | None:
    """Return what judges the drafter on held-out answers and, where the recipe wants it, by decoding their prompts."""
    head = target.model.get_output_embeddings().weight
    source = heldout_source(recipe, target, data, console)
    maker = BatchMaker(data.heldout, source, head, model)
    rows = response_rows(data.heldout)
    scores = HeldOut(maker, plan_batches(rows, 1024, seed=0, epoch=0)) if sum(rows) else None
    wanted = recipe.evaluation
    if wanted is None:
        return scores
    chosen = [data.heldout[i] for i in range(min(wanted.prompts, len(data.heldout)))]
    prompts = [_prompt(sequence) for sequence in chosen]
    if len(prompts) < wanted.prompts:
        raise ConfigError(
            f"evaluation.prompts is {wanted.prompts}, but the data has {len(prompts)} held-out prompts: raise "
            "data.num_heldout or lower evaluation.prompts."
        )
    settings = DecodeSettings(
        max_new_tokens=wanted.max_new_tokens,
        shape=wanted.tree.shape(),
        rule="coupled" if wanted.temperature else "greedy",
        sampling=SamplingParams(temperature=wanted.temperature),
    )
    batches = []
    if model.one_head:  # the drafters whose paths can be drawn
        asking = BatchMaker(data.heldout, source, head, model, target)
        plan = plan_batches(rows[: wanted.prompts], 1024, seed=0, epoch=0)
        batches = [asking.make(indices, seed=number) for number, indices in enumerate(plan)]
    return DecodedHeldOut(
        scores, target, prompts, settings, lambda drafter: drafter.drafter(target.dtype), batches=batches
    )


def _prompt(sequence: Sequenced) -> Sequence[int]:
    prompt = shown(sequence, sequence.prompt_len)
    return prompt if isinstance(prompt, ImagePrompt) else [int(token) for token in prompt]
