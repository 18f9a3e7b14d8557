"""From logits to tokens: the one place where temperature, top-k, top-p and random numbers are turned into choices.

Plain decoding and every verification rule use these functions, so that "the target's distribution" means one thing.
Shape legend: V target vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench.models.device import send

_MASK64 = (1 << 64) - 1


class NotNumbersError(ConfigError, ValueError):
    """What the target computed are no numbers: its dtype has no room for them."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}: the target's logits are not numbers, use --dtype bf16 or fp32.")


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
    return target_scores(logits, params).softmax(dim=-1)


def target_scores(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the logarithms of ``target_probs``, but for a constant: -inf where top-k or top-p leave a token out.

    Arguments, dtype and errors are those of ``target_probs``.
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
    return scores


def keyed_noise(seed: int, position: int, size: int) -> NDArray[np.float64]:
    """Return ``[size]`` Gumbel noise that depends on ``seed`` and ``position`` alone.

    The two are the whole seed of the generator (SFC64), so the noise of a position is the same whatever was drawn
    before, and no global state is read or changed. It is minus the logarithm of exponential numbers.

    Args:
        seed: Any integer; only its low 64 bits count.
        position: Index of the token in the whole sequence.
        size: How many.

    >>> keyed_noise(0, 1, 3).tolist() == keyed_noise(0, 1, 3).tolist() != keyed_noise(1, 0, 3).tolist()
    True
    """
    key = np.random.SeedSequence((seed & _MASK64, position))
    noise = np.random.Generator(np.random.SFC64(key)).standard_exponential(size)
    np.maximum(noise, np.finfo(np.float64).tiny, out=noise)
    return np.negative(np.log(noise, out=noise), out=noise)


def inverse_cdf(probs: Tensor, uniform: float) -> int:
    """Return the token at which the running sum of ``probs``, in vocabulary order, passes ``uniform`` of the total.

    Args:
        probs: ``[V]`` non-negative, not necessarily normalised, on any device. A row on an accelerator is copied to
            the host first: the parallel scan there may sum in a different order from one call to the next.
        uniform: In [0, 1).

    Returns:
        A token whose probability is above 0, whatever the rounding.

    Raises:
        NotNumbersError: The probabilities have no positive, finite sum.
    """
    cumulative = probs.to("cpu", torch.float64).cumsum(dim=0)
    total = float(cumulative[-1])
    if not (math.isfinite(total) and total > 0):
        raise NotNumbersError(f"The probabilities of the next token sum to {total}")
    # The first token whose sum is *above* the threshold has raised it, so its probability is not 0; the threshold is
    # kept below the total because `uniform * total` may round up to it.
    threshold = min(uniform * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative, threshold, right=True))


def coupled_token(scores: Tensor, seed: int, position: int) -> int:
    """Return the token that ``seed`` selects at ``position`` of the sequence: the Gumbel-max draw.

    The argmax of scores and noise is token v with the probability that a softmax of the scores gives it. The choice
    depends on differences of scores, as the argmax does: rounding moves it only where two tokens are as good as tied,
    never through what it does to the sum over all others.

    Args:
        scores: ``[V]``, see ``target_scores``, on any device.
        seed: See ``keyed_noise``.
        position: See ``keyed_noise``.

    Raises:
        NotNumbersError: The scores are not numbers, or all are -inf.
    """
    return noisiest(scores, keyed_noise(seed, position, len(scores)))


def noisiest(scores: Tensor, noise: NDArray[np.float64]) -> int:
    """Return ``coupled_token`` of noise that is known."""
    return _largest(scores.cpu().numpy() + noise)


def greedy_token(logits: Tensor) -> int:
    """Return the token with the largest logit, the first of equals.

    Args:
        logits: ``[V]``, any floating dtype, on the host; compared in float32, as in transformers.

    Raises:
        NotNumbersError: They are not numbers.

    >>> greedy_token(torch.tensor([1.0, 3.0, 3.0]))
    1
    """
    return _largest(logits.float().numpy())


def _largest(values: NDArray[np.floating]) -> int:
    """Return where the first of the largest is; numpy takes a tenth of torch's time for 50,000."""
    token = int(values.argmax())
    return best(token, float(values[token]))


def best(token: int, logit: float) -> int:
    """Return the token that has the largest logit.

    Raises:
        NotNumbersError: It is none: the logits are not numbers.
    """
    if not math.isfinite(logit):
        raise NotNumbersError(f"The largest logit of a next token is {logit}")
    return token


class KeyedNoise:
    """``keyed_noise`` on a device, kept from step to step: what a step looks ahead to, the next one needs.

    Attributes:
        seed: See ``keyed_noise``.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._held: dict[int, Tensor] = {}

    def ahead(self, first: int, count: int, size: int, device: torch.device) -> Tensor:
        """Return ``[count, size]`` float64, the noise of ``count`` positions from ``first`` on."""
        return torch.stack([self.at(position, size, device) for position in range(first, first + count)])

    def at(self, position: int, size: int, device: torch.device) -> Tensor:
        """Return ``[size]`` float64, the noise of one position."""
        if position not in self._held:
            self._held[position] = send(torch.from_numpy(keyed_noise(self.seed, position, size)), device)
        return self._held[position]

    def forget(self, before: int) -> None:
        """Drop what is held of positions that have been passed."""
        self._held = {position: noise for position, noise in self._held.items() if position >= before}
