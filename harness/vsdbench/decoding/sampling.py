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
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SLACK = 1.001
"""More than the rounding of an exponential in float32."""


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
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.temperature != 1:
        scores = scores / params.temperature
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        smallest_kept = scores.topk(params.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < smallest_kept, -math.inf)
    if params.top_p is not None and params.top_p < 1:
        ascending, order = scores.sort(dim=-1, stable=True)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64) <= 1 - params.top_p
        dropped[..., -1] = False
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return scores


class Uniforms:
    """One number in (0, 1) for every token, which depend on ``seed`` and ``position`` alone.

    The two are the whole seed of the generator (SFC64), so the numbers of a position are the same whatever was drawn
    before, and no global state is read or changed. The generator gives the first 32 bits of each; the 53 behind them
    are a hash of token and key, since few draws look at them (``noisiest``).

    Args:
        seed: Any integer; only its low 64 bits count.
        position: Index of the token in the whole sequence.
        size: How many.

    Attributes:
        high: ``[size]`` uint32, the first bits.

    >>> Uniforms(0, 1, 3).at().tolist() == Uniforms(0, 1, 3).at().tolist() != Uniforms(1, 0, 3).at().tolist()
    True
    """

    def __init__(self, seed: int, position: int, size: int) -> None:
        bits = np.random.SFC64(np.random.SeedSequence((seed & _MASK64, position)))
        self._key = np.uint64(bits.random_raw())
        self.high: NDArray[np.uint32] = bits.random_raw((size + 1) // 2).view(np.uint32)[:size]

    def at(self, tokens: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return the float64 numbers of some tokens; None: of all."""
        places = np.arange(len(self.high), dtype=np.uint64) if tokens is None else tokens.astype(np.uint64)
        high = self.high if tokens is None else self.high[tokens]
        low = (_mixed(places * _GOLDEN + self._key) >> np.uint64(11)).astype(np.float64)
        return np.minimum((high + (low + 0.5) * 2.0**-53) * 2.0**-32, 1 - 2.0**-53)

    def noise(self, tokens: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return Gumbel noise of some tokens, large where numbers are small; None: of all."""
        return -np.log(-np.log1p(-self.at(tokens)))

    def rough_noise(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``noise`` of some tokens from the first bits alone, good enough to guess by and cheap."""
        about = (self.high[tokens].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
        noise: NDArray[np.float32] = -np.log(-np.log1p(-np.minimum(about, np.float32(1 - 2.0**-24))))
        return noise


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers whose every bit depends on every bit of the given ones: the finaliser of SplitMix64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keyed_noise(seed: int, position: int, size: int) -> NDArray[np.float64]:
    """Return the ``[size]`` Gumbel noise of ``Uniforms``, whose arguments it has."""
    return Uniforms(seed, position, size).noise()


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
    return noisiest(scores, Uniforms(seed, position, len(scores)))


def noisiest(scores: Tensor, uniforms: Uniforms) -> int:
    """Return ``coupled_token`` of numbers that are known.

    A draw must not cost what a step of the target does, so logarithms are taken of few: noise is below -log u, so token
    v cannot beat a sum B that another one has if u > exp(score - B), and the first bits of u say so of nearly all.
    """
    values = scores.cpu().numpy()
    top = _largest(values)
    at_least = float(values[top]) + float(uniforms.noise(np.array([top]))[0])
    limits = np.subtract(values, at_least, dtype=values.dtype)
    np.multiply(np.exp(limits, out=limits), _SLACK * 2.0**32, out=limits)
    may_win = np.flatnonzero(uniforms.high.astype(limits.dtype) <= limits)
    return int(may_win[_largest(values[may_win] + uniforms.noise(may_win))])


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
    """The numbers of a sequence, kept from step to step: what a step looks ahead to, the next one needs.

    Attributes:
        seed: See ``Uniforms``.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._uniforms: dict[int, Uniforms] = {}
        self._noise: dict[int, Tensor] = {}

    def uniforms(self, position: int, size: int) -> Uniforms:
        """Return the numbers of one position."""
        if position not in self._uniforms:
            self._uniforms[position] = Uniforms(self.seed, position, size)
        return self._uniforms[position]

    def at(self, position: int, size: int, ids: Tensor) -> Tensor:
        """Return ``[n]`` float32, roughly the noise of the tokens ``ids`` ``[n]`` at one position, where they are."""
        if ids.device.type == "cpu":
            return torch.from_numpy(self.uniforms(position, size).rough_noise(ids.numpy()))
        return self.everywhere(position, size, ids.device).index_select(0, ids).float()

    def everywhere(self, position: int, size: int, device: torch.device) -> Tensor:
        """Return ``[size]`` float64, the noise of one position on a device."""
        if position not in self._noise:
            self._noise[position] = send(torch.from_numpy(self.uniforms(position, size).noise()), device)
        return self._noise[position]

    def ahead(self, first: int, count: int, size: int, device: torch.device) -> Tensor:
        """Return ``[count, size]`` float64, the noise of ``count`` positions from ``first`` on."""
        return torch.stack([self.everywhere(position, size, device) for position in range(first, first + count)])

    def forget(self, before: int) -> None:
        """Drop what is held of positions that have been passed."""
        for held in (self._uniforms, self._noise):
            for position in [position for position in held if position < before]:
                del held[position]
