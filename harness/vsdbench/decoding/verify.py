"""Which draft tokens to keep: four rules, each of which leaves the target's distribution exactly as it was.

``docs/verification.md`` says why. A rule is a pure function of the tree, the target's logits and the random numbers;
rejection and traversal see the numbers only as coins, so that a test can walk both sides of every coin.

Shape legend: N draft tokens, V target vocabulary. Row r of a tree is its root (0) or its node r - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from vsdbench.decoding.interfaces import TokenTree, Verdict, VerifyRule
from vsdbench.decoding.sampling import (
    KeyedNoise,
    SamplingParams,
    best,
    greedy_token,
    inverse_cdf,
    noisiest,
    target_probs,
    target_scores,
)
from vsdbench.decoding.structure import Numbers, deepest, row_depths
from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.models.device import apart

Coin: TypeAlias = Callable[[int, float], bool]
"""``coin(node, probability)`` comes up heads with that probability; a rule asks at most once about each node."""


class Step:
    """One tree with the target's logits over it, rows turned into float64 probabilities on the host when visited.

    Args:
        tree: The tree.
        logits: ``[N + 1, V]``; read where there are no ``probs``.
        params: What makes a distribution of a row of logits.
        probs: ``[N + 1, V]`` these distributions, where all of them are on the host already.
    """

    def __init__(self, tree: TokenTree, logits: Tensor, params: SamplingParams, probs: Tensor | None = None) -> None:
        self.tokens: list[int] = tree.tokens.tolist()
        self.depths = (0, *tree.depths)  # of rows
        self.children: list[list[int]] = [[] for _ in range(len(tree) + 1)]  # nodes under each row, in order
        for node, parent in enumerate(tree.parents):
            self.children[parent + 1].append(node)
        self.tree, self.logits, self.params, self._probs = tree, logits, params, probs

    def target(self, row: int) -> Tensor:
        """Return the target's distribution after ``row``, ``[V]`` float64."""
        probs = target_probs(self.logits[row], self.params) if self._probs is None else self._probs[row]
        return _normalised(probs.to(torch.float64))

    def draft(self, row: int) -> Tensor | None:
        """Return the distribution the children of ``row`` were drawn from, ``[V]`` float64; None if not drawn."""
        if self.tree.draft_probs is None or not self.children[row]:
            return None
        return _normalised(self.tree.draft_probs[row].to(torch.float64))


class Case:
    """A tree that the target has scored and whose path the host is to decide.

    What the host must see is said first, so that one transfer brings that of all sequences of a step. On a device all
    that does not depend on the walk is computed there, for all rows: to wait for one row after the other costs more.
    On the host only visited rows are computed, few of many.

    Args:
        rule: ``greedy`` (temperature 0 only), ``coupled``, ``rejection`` or ``traversal`` (above 0 only).
        tree: The proposal; with no nodes this is one step of plain decoding.
        logits: ``[N + 1, V]``, row 0 the root's, any floating dtype and device.
        params: What makes a distribution of a row of logits.
        noise: That of the sequence; ``coupled`` alone reads it.
        position: Index, in the whole sequence, of the token that follows the root. ``coupled`` draws the token after
            depth d with the number keyed by ``position + d``, which is what plain decoding uses for that token.

    Attributes:
        asked: What the host must be shown to decide.

    Raises:
        ConfigError: The rule is unknown, or is not lossless at this temperature.
        ValueError: The logits do not have N + 1 rows.
    """

    def __init__(
        self,
        rule: VerifyRule,
        tree: TokenTree,
        logits: Tensor,
        *,
        params: SamplingParams,
        noise: KeyedNoise,
        position: int,
    ) -> None:
        _check(rule, tree, logits, params)
        self._rule, self._tree, self._logits, self._params = rule, tree, logits, params
        self._noise, self._position = noise, position
        noise.forget(position)
        self._grown = [numbers for numbers in (tree.parents, tree.depths) if isinstance(numbers, Numbers)]
        self.asked = [tree.tokens, *(numbers.there for numbers in self._grown)]
        if not apart(logits.device):
            return
        if rule == "greedy":
            self.asked += logits.max(dim=-1)
        elif rule == "coupled":
            ahead = noise.ahead(position, deepest(tree.depths) + 1, logits.shape[-1], logits.device)
            own = ahead.index_select(0, row_depths(tree.depths, logits.device))
            self.asked += (target_scores(logits, params).double() + own).max(dim=-1)
        else:
            self.asked.append(target_probs(logits, params))
            self.asked += [] if tree.draft_probs is None else [tree.draft_probs]

    def decide(self, shown: Sequence[Tensor], generator: torch.Generator) -> Verdict:
        """Return the accepted path and the token that follows it.

        Args:
            shown: What was asked for, on the host.
            generator: Where ``rejection`` and ``traversal`` take N + 1 uniform numbers, always that many; the other
                rules do not touch it. On the CPU it costs no wait, and results do not depend on where the logits are.

        Raises:
            NotNumbersError: The target's logits are not numbers.
        """
        tokens, *more = shown
        for numbers in self._grown:
            numbers.tell(more.pop(0).tolist())
        tree = self._tree if tokens is self._tree.tokens else replace(self._tree, tokens=tokens)
        if self._rule in {"greedy", "coupled"}:
            step = Step(tree, self._logits, self._params)
            return follow(step, self._chooser(step, more))
        if more:
            tree = replace(tree, draft_probs=more[1] if len(more) > 1 else None)
        step = Step(tree, self._logits, self._params, *more[:1])
        uniforms = torch.rand(len(tree) + 1, generator=generator, dtype=torch.float64, device=generator.device).tolist()
        walk = rejection if self._rule == "rejection" else traversal
        path, remaining = walk(step, lambda node, probability: uniforms[node] < probability)
        return Verdict(path=path, next_token=inverse_cdf(remaining, uniforms[-1]))

    def _chooser(self, step: Step, rows: Sequence[Tensor]) -> Callable[[int], int]:
        """Return what says the target's own token after a row: from what the device found, or row by row here."""
        if rows:
            values, tokens = (found.tolist() for found in rows)
            return lambda row: best(tokens[row], values[row])
        if self._rule == "greedy":
            return lambda row: greedy_token(self._logits[row])
        vocab_size = self._logits.shape[-1]

        def draw(row: int) -> int:
            uniforms = self._noise.uniforms(self._position + step.depths[row], vocab_size)
            return noisiest(target_scores(self._logits[row], self._params), uniforms)

        return draw


def _check(rule: VerifyRule, tree: TokenTree, logits: Tensor, params: SamplingParams) -> None:
    if rule not in {"greedy", "coupled", "rejection", "traversal"}:
        known = did_you_mean(rule, ["greedy", "coupled", "rejection", "traversal"])
        raise ConfigError(f"verification rule {rule!r} does not exist.{known}")
    if (rule == "greedy") != (params.temperature == 0):
        usable = "'coupled', 'rejection' or 'traversal'" if rule == "greedy" else "'greedy'"
        raise ConfigError(f"rule {rule!r} is not lossless at temperature {params.temperature}; use {usable}.")
    if logits.shape[0] != len(tree) + 1:
        raise ValueError(f"logits have {logits.shape[0]} rows for a tree of {len(tree)} nodes; it takes one more.")


def follow(step: Step, choose: Callable[[int], int]) -> Verdict:
    """Return the path of the target's own choices through the tree, and the first choice that is not in it.

    Args:
        step: The tree.
        choose: The target's token after a row, as plain decoding would choose it: the argmax (rule ``greedy``) or the
            keyed draw (rule ``coupled``). It never looks at the tree.
    """
    path: list[int] = []
    while True:
        row = path[-1] + 1 if path else 0
        token = choose(row)
        node = next((child for child in step.children[row] if step.tokens[child] == token), None)
        if node is None:
            return Verdict(path=path, next_token=token)
        path.append(node)


def rejection(step: Step, coin: Coin) -> tuple[list[int], Tensor]:
    """Return the accepted path and the ``[V]`` float64 distribution of the next token, by recursive rejection.

    From the root down, the children of the last accepted row are tried in order; each refusal leaves the residual
    distribution for the next (SpecInfer, arXiv 2305.09781; without replacement as in arXiv 2402.14160).
    """
    path: list[int] = []
    row = 0
    while True:
        target, draft = step.target(row), step.draft(row)
        for child in step.children[row]:
            token = step.tokens[child]
            if coin(child, acceptance(target, draft, token)):
                path.append(child)
                row = child + 1
                break
            target, draft, _ = refuse(target, draft, token)
        else:
            return path, target


def traversal(step: Step, coin: Coin) -> tuple[list[int], Tensor]:
    """Return the accepted path and the ``[V]`` float64 distribution of the next token, by traversal verification.

    From the leaves up (arXiv 2505.12398): ``weight``, the paper's p_acc, is what is left of the probability with which
    the path to a row may be accepted; it is staked on the children first, and only then on ending at the row itself.
    For a chain this is block verification (arXiv 2403.10444).
    """

    def visit(row: int, weight: float) -> tuple[list[int], Tensor] | None:
        if weight == 0:
            return None
        target, draft = step.target(row), step.draft(row)
        for child in step.children[row]:
            token = step.tokens[child]
            accepted = visit(child + 1, acceptance(target, draft, token, weight))
            if accepted is not None:
                return [child, *accepted[0]], accepted[1]
            target, draft, weight = refuse(target, draft, token, weight)
        return ([], target) if row == 0 or coin(row - 1, weight) else None

    accepted = visit(0, 1.0)
    if accepted is None:  # pragma: no cover - the root has weight 1 and takes no coin
        raise AssertionError("the root was refused.")
    return accepted


def acceptance(target: Tensor, draft: Tensor | None, token: int, weight: float = 1.0) -> float:
    """Return min(1, weight · p(token) / q(token)); q is a point mass where ``token`` was not drawn from ``draft``."""
    drawn_with = 1.0 if draft is None else float(draft[token]) or 1.0
    return min(1.0, weight * float(target[token]) / drawn_with)


def refuse(
    target: Tensor, draft: Tensor | None, token: int, weight: float = 1.0
) -> tuple[Tensor, Tensor | None, float]:
    """Return target, draft and weight after the child ``token`` was refused: what is still owed, given the refusal.

    The child took min(q, weight · p) of the owed measure weight · p, so (weight · p - q)+ is left, and a refusal had
    the probability 1 - Σ min(q, weight · p) = 1 - weight + Σ (weight · p - q)+. The next child comes from q without
    ``token``. A child with q = 0 (deterministic, a duplicate, or more children than q has tokens) is a point mass.
    """
    if draft is None or float(draft[token]) == 0:
        owed = weight * target
        owed[token] = 0.0
    else:
        owed = (weight * target - draft).clamp_(min=0.0)
        draft = draft.clone()
        draft[token] = 0.0
        draft = _normalised(draft)
    mass = float(owed.sum())
    if mass <= 0:  # nothing is owed; with weight 1 no refusal is possible, and only rounding can lead here
        return target, draft, float(weight == 1)
    return owed / mass, draft, mass / (mass + (1 - weight))


def _normalised(probs: Tensor) -> Tensor:
    """Return ``probs`` divided by their sum (unchanged if all are 0), never the same storage."""
    total = float(probs.sum())
    return probs / (total or 1.0)
