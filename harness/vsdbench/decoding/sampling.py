"""From logits to tokens: the one place where temperature, top-k, top-p and random numbers are turned into choices.

Plain decoding and every verification rule use these functions, so that "the target's distribution" means one thing.
Shape legend: V target vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen from the target's logits.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the ``top_k`` largest logits (ties with the last one are kept); None keeps all.
        top_p: Keep the smallest set of most probable tokens that holds at least this probability; None keeps all.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number of at least 0.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None to keep every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1], or None to keep every token.")


def target_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution that ``params`` make of ``logits``: temperature, then top-k, then top-p.

    Order and semantics are those of the logits processors of Hugging Face transformers.

    Args:
        logits: ``[..., V]``, any floating dtype.
        params: ``temperature`` must be above 0: greedy decoding takes the argmax and has no use for probabilities.

    Returns:
        ``[..., V]`` probabilities, float64 for float64 logits and float32 for anything narrower.

    Raises:
        ValueError: If the temperature is 0.
    """
    if params.temperature == 0:
        raise ValueError("temperature is 0; greedy decoding has no distribution to sample from, take the argmax.")
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / params.temperature
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        smallest_kept = scores.topk(params.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < smallest_kept, -math.inf)
    if params.top_p is not None and params.top_p < 1:
        ascending, order = scores.sort(dim=-1, stable=True)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64) <= 1 - params.top_p
        dropped[..., -1] = False
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return scores.softmax(dim=-1)


def keyed_uniform(seed: int, position: int) -> float:
    """Return a uniform number in [0, 1) that depends on ``seed`` and ``position`` alone.

    A counter-based generator (two rounds of the SplitMix64 finaliser, 53 bits kept): the number for a position is the
    same whatever was drawn before it, and no global state is read or changed.

    Args:
        seed: Any integer; only its low 64 bits count.
        position: Index of the token in the whole sequence.

    >>> keyed_uniform(0, 1) == keyed_uniform(0, 1), keyed_uniform(0, 1) == keyed_uniform(1, 0)
    (True, False)
    """
    stream = _mix64((seed + _GOLDEN) & _MASK64)
    return (_mix64((stream + (position + 1) * _GOLDEN) & _MASK64) >> 11) * 2.0**-53


def inverse_cdf(probs: Tensor, uniform: float) -> int:
    """Return the token at which the running sum of ``probs``, in vocabulary order, passes ``uniform`` of the total.

    Args:
        probs: ``[V]`` non-negative, not necessarily normalised, on any device. A row on an accelerator is copied to
            the host first: the parallel scan there may sum in a different order from one call to the next.
        uniform: In [0, 1).

    Returns:
        A token whose probability is above 0, whatever the rounding.

    Raises:
        ValueError: If the probabilities have no positive, finite sum.
    """
    cumulative = probs.to("cpu", torch.float64).cumsum(dim=0)
    total = float(cumulative[-1])
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"the probabilities sum to {total}; no token can be drawn from them.")
    # The first token whose sum is *above* the threshold has raised it, so its probability is not 0; the threshold is
    # kept below the total because `uniform * total` may round up to it.
    threshold = min(uniform * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative, threshold, right=True))


def coupled_token(probs: Tensor, seed: int, position: int) -> int:
    """Return the token that ``seed`` selects from ``probs`` (``[V]``) at ``position`` of the sequence."""
    return inverse_cdf(probs, keyed_uniform(seed, position))


def draw(probs: Tensor, generator: torch.Generator) -> int:
    """Return a token drawn from ``probs`` (``[V]``, need not be normalised); one number is taken from ``generator``."""
    uniform = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return inverse_cdf(probs, float(uniform))


def _mix64(value: int) -> int:
    """Return the SplitMix64 finaliser of a 64-bit integer (Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
