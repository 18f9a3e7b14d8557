"""Is an output the baseline's own? Token for token, and where it is not: was it a near-tie that rounding decides?

A forward over several tokens adds the same numbers in another order than a forward over one, so two correct decoders
may part where two choices are as good as equal. Each first divergence is replayed by a prefill of the common prefix.
Greedy: the gap is the reference token's logit minus the emitted one's. A keyed draw is an argmax too, of logits with a
noise that the seed fixes, so its gap is the same in noisy logits, brought to temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from vsdbench.decoding.sampling import SamplingParams, keyed_noise, target_scores
from vsdbench.models.image_prompt import followed_by
from vsdbench.store.records import Divergence

if TYPE_CHECKING:
    from vsdbench.decoding.engine import DecodeSettings
    from vsdbench.models.target import Target

Verdict = Literal["equal", "near_tie", "violation", "unchecked", "reference"]

LOGIT_ULPS = 4
"""Rounding steps of the dtype, at the size of the logit, within which two logits count as tied (16 in bf16: 0.5)."""
FLOAT32_ULPS = 256
"""The same in float32 and wider, where one rounding step is tiny beside what thirty layers accumulate."""


def is_comparable(settings: DecodeSettings) -> bool:
    """Whether the output is a function of the target and the seed alone, so that it must equal the baseline's."""
    return settings.rule in {"greedy", "coupled"}


def compare(
    target: Target,
    prompt: Sequence[int],
    reference: Sequence[int],
    output: Sequence[int],
    settings: DecodeSettings,
) -> tuple[Verdict, Divergence | None]:
    """Return whether ``output`` is lossless against ``reference``, and the first divergence if they differ.

    Args:
        target: Replays the common prefix.
        prompt: Prompt token ids.
        reference: Output of the same-engine baseline under the same settings.
        output: Output to judge.
        settings: Temperature and seed of both.
    """
    if not is_comparable(settings):
        return "unchecked", None
    if list(output) == list(reference):
        return "equal", None
    shared = min(len(output), len(reference))
    index = next((i for i in range(shared) if output[i] != reference[i]), shared)
    expected = reference[index] if index < len(reference) else None
    token = output[index] if index < len(output) else None
    if expected is None or token is None:  # one output is a prefix of the other: an end was missed
        divergence = Divergence(index=index, gap=None, kind="violation", reference_token=expected, token=token)
        return "violation", divergence
    prefix = followed_by(prompt, reference[:index])
    logits = target.prefill(prefix, len(prefix)).next_logits
    size = float(logits.abs().max())
    if settings.sampling.temperature > 0:
        logits = noisy_logits(logits, settings.sampling, settings.seed, len(prefix))
    gap = float(logits[expected] - logits[token])
    tolerance = logit_tolerance(size, target.dtype)
    kind: Literal["near_tie", "violation"] = "near_tie" if abs(gap) <= tolerance else "violation"
    return kind, Divergence(index=index, gap=gap, kind=kind, reference_token=expected, token=token)


def logit_tolerance(size: float, dtype: torch.dtype) -> float:
    """Return the gap below which two logits of this size are a tie in this dtype.

    >>> logit_tolerance(16.0, torch.bfloat16)
    0.5
    """
    ulps = FLOAT32_ULPS if dtype in {torch.float32, torch.float64} else LOGIT_ULPS
    return ulps * torch.finfo(dtype).eps * max(1.0, size)


def noisy_logits(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> torch.Tensor:
    """Return ``[V]`` float64 logits whose argmax is the keyed draw of this position.

    A token that top-k or top-p leaves out lies as far below the largest as it is from being let in, at least.

    Args:
        logits: ``[V]``.
        params: Temperature above 0 and truncation.
        seed: Of the draw.
        position: Of the token in the whole sequence.
    """
    plain = logits.double().cpu()
    noise = params.temperature * torch.from_numpy(keyed_noise(seed, position, len(plain)))
    kept = target_scores(logits, params).cpu() > -torch.inf
    noisy = plain + noise
    best = noisy[kept].max()
    outside = best - (plain[kept].min() - plain)
    return torch.where(kept, noisy, torch.minimum(noisy, outside))
