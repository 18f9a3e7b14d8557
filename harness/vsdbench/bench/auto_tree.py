"""``tree: auto``: the tree with the best predicted speedup for this drafter, target and machine.

A larger tree keeps more tokens a step and makes every step dearer; where the best trade lies depends on the drafter and
on the machine, so it is measured, on prompts that are not in the suite. Two measurements, both with the engine itself:

* *Acceptance.* Plain decoding of some answers, with a wide tree proposed at every position and none sent. What any
  smaller dynamic tree would have kept is then read off: it holds the most probable of the same nodes. Under the rule
  ``coupled`` the trees are of that kind.
* *Cost.* A few steps with each of a grid of shapes give the milliseconds of drafting (by depth and children) and of
  verifying (by nodes), and of a plain step.

Their ratio, tokens a step x plain step / (drafting + verifying + the rest), ranks all shapes. The best of so many
noisy numbers is too good to be true, so it is no prediction: a few finalists decode the same prompts beside plain
decoding, answer by answer in turn, and the fastest of them is taken with the speedup that it had there.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import TokenTree, TreeShape
from vsdbench.decoding.tree import empty_tree

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vsdbench.decoding.interfaces import Drafter, Generation, TargetState
    from vsdbench.models.target import Target

ANSWER_TOKENS = 48
COST_TOKENS = 24
TOP_KS = (1, 2, 4, 8)
"""Children whose drafting is timed; what is between them costs what is between theirs."""
_CHILDREN = (1, 2, 3, 4, 6, 8)
_WIDER = 3
_ROUNDS = 2
_PLAIN_EVERY = 4
_FINALISTS = 3
BUDGETS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Milliseconds, each the median over steps.

    Attributes:
        plain: A step of plain decoding.
        draft: By ``(depth, top_k)`` of a dynamic tree.
        verify: By number of nodes.
        other: Of a step, neither drafting nor the target's forward.
    """

    plain: float
    draft: dict[tuple[int, int], float]
    verify: dict[int, float]
    other: float

    def step(self, shape: TreeShape) -> float:
        """Return the milliseconds of a step with this shape, between what was measured with fewer and with more."""
        sizes, children = sorted(self.verify), sorted(top_k for depth, top_k in self.draft if depth == shape.depth)
        forward = float(np.interp(shape.budget, sizes, [self.verify[size] for size in sizes]))
        drafting = np.interp(shape.top_k, children, [self.draft[shape.depth, top_k] for top_k in children])
        return float(drafting) + forward + self.other


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A shape and what is predicted of it.

    Attributes:
        shape: The shape.
        tau: Tokens a step.
        speedup: Over plain decoding by the same engine.
        step_ms: Milliseconds of a step.
    """

    shape: TreeShape
    tau: float
    speedup: float
    step_ms: float

    def sentence(self) -> str:
        """Return it in words."""
        shape = self.shape
        size = f"{shape.budget} nodes, depth {shape.depth}, {shape.top_k} children"
        return f"the best tree is predicted to be {size}: tau {self.tau:.2f}, speedup {self.speedup:.2f}"

    def describe(self) -> dict[str, Any]:
        """Return it as plain JSON data, for the manifest."""
        return {
            "tree": asdict(self.shape),
            "predicted_tau": self.tau,
            "predicted_speedup": self.speedup,
            "predicted_step_ms": self.step_ms,
        }


class Proposal:
    """A wide tree of N nodes, from which the smaller dynamic trees of the same drafter can be read.

    Args:
        tree: As proposed.
    """

    def __init__(self, tree: TokenTree) -> None:
        logs = tree.log_probs.double().cpu().numpy()
        self._tokens: list[int] = tree.tokens.tolist()
        self._parents = tree.parents
        self._scores = np.zeros(len(tree))  # log-probability of the path
        self._ranks = np.zeros(len(tree), dtype=np.int64)  # among siblings
        children: Counter[int] = Counter()
        for node, parent in enumerate(tree.parents):
            self._scores[node] = logs[node] + (self._scores[parent] if parent >= 0 else 0.0)
            self._ranks[node] = children[parent]
            children[parent] += 1
        self._levels = [
            np.flatnonzero(np.equal(tree.depths, depth)) for depth in range(1, max(tree.depths, default=0) + 1)
        ]
        self._places: dict[tuple[int, int], NDArray[np.int64]] = {}

    def places(self, depth: int, top_k: int) -> NDArray[np.int64]:
        """Return ``[N]``: with which budget each node enters the dynamic tree of this depth and top-k, less one.

        N for nodes that its growth does not reach: it expands the ``top_k`` most probable nodes of every level.
        """
        if (depth, top_k) not in self._places:
            expanded, reached = {-1}, list[int]()
            for level in self._levels[:depth]:
                grown = [n for n in level.tolist() if self._parents[n] in expanded and self._ranks[n] < top_k]
                reached += grown
                expanded = set(sorted(grown, key=lambda n: -self._scores[n])[:top_k])
            order = sorted(reached, key=lambda n: -self._scores[n])
            places = np.full(len(self._tokens), len(self._tokens))
            places[order] = np.arange(len(order))
            self._places[depth, top_k] = places
        return self._places[depth, top_k]

    def kept(self, shape: TreeShape, following: Sequence[int]) -> int:
        """Return how many of the ``following`` tokens the dynamic tree of this shape holds, from the root down."""
        places = self.places(shape.depth, shape.top_k)
        at, length = -1, 0
        for token in following[: shape.depth]:
            children = (n for n, parent in enumerate(self._parents) if parent == at and self._tokens[n] == token)
            at = next(children, -2)
            if at == -2 or places[at] >= shape.budget:
                break
            length += 1
        return length


class Watching:
    """Lets a drafter propose a wide tree at every position, keeps it, and sends nothing: decoding stays plain."""

    def __init__(self, drafter: Drafter, shape: TreeShape) -> None:
        self.name = drafter.name
        self.proposals: list[Proposal] = []
        self._drafter, self._shape = drafter, shape

    def begin(self, state: TargetState, max_length: int) -> None:
        """Begin an answer."""
        self.proposals = []
        self._drafter.begin(state, max_length)

    def propose(
        self, state: TargetState, shape: TreeShape, *, temperature: float, generator: torch.Generator
    ) -> TokenTree:
        """Return the empty tree, and keep what the drafter would have sent."""
        del shape
        tree = self._drafter.propose(state, self._shape, temperature=temperature, generator=generator)
        self.proposals.append(Proposal(tree))
        return empty_tree(state.next_logits.device)

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Tell the drafter of the one token that was decoded."""
        self._drafter.commit(state, num_accepted, features)


@dataclass(frozen=True, slots=True)
class Answer:
    """A plainly decoded answer: its tokens, and the wide tree proposed after each but the last."""

    tokens: list[int]
    proposals: list[Proposal]

    def walk(self, shape: TreeShape) -> tuple[int, int]:
        """Return the tokens emitted and the steps taken, had it been decoded with this shape."""
        at, steps = 0, 0
        while at < len(self.proposals):
            at += 1 + self.proposals[at].kept(shape, self.tokens[at + 1 :])
            steps += 1
        return len(self.tokens) - 1, steps


def candidates(limit: TreeShape) -> list[TreeShape]:
    """Return the shapes up to ``limit``, and of its kind, that are considered."""
    return [
        TreeShape(kind=limit.kind, budget=budget, depth=depth, top_k=top_k)
        for top_k in _CHILDREN
        for depth in range(1, limit.depth + 1)
        for budget in BUDGETS
        if top_k <= limit.top_k and depth <= budget <= min(limit.budget, top_k + (depth - 1) * top_k**2)
    ]


def num_decodes(limit: TreeShape, num_prompts: int, num_modes: int) -> int:
    """Return how many answers ``choose_trees`` decodes, where there are as many finalists as it wants."""
    turns = _ROUNDS * len(_cells(limit))
    return 1 + turns + math.ceil(turns / _PLAIN_EVERY) + num_modes * num_prompts * (2 + _FINALISTS)


def _cells(limit: TreeShape) -> list[tuple[int, int]]:
    """Return the depths and top-ks whose drafting is timed."""
    return [(depth, top_k) for top_k in TOP_KS if top_k <= limit.top_k for depth in range(1, limit.depth + 1)]


def _nobody() -> None:
    """Tell nobody that an answer is done."""


def rank(answers: Sequence[Answer], costs: Costs, shapes: Sequence[TreeShape]) -> list[Choice]:
    """Return the shapes with what is predicted of them, the best first; of equals the smaller tree."""
    choices = []
    for shape in shapes:
        walked = [answer.walk(shape) for answer in answers]
        emitted, steps = (sum(counts) for counts in zip(*walked, strict=True))
        tau, step_ms = emitted / max(1, steps), costs.step(shape)
        choices.append(Choice(shape=shape, tau=tau, speedup=tau * costs.plain / step_ms, step_ms=step_ms))
    return sorted(choices, key=lambda choice: (-choice.speedup, choice.shape.budget))


def finalists(choices: Sequence[Choice], number: int = _FINALISTS) -> list[TreeShape]:
    """Return the shapes of the best choices, each of another budget than those before it."""
    by_budget: dict[int, TreeShape] = {}
    for choice in choices:
        by_budget.setdefault(choice.shape.budget, choice.shape)
    return list(by_budget.values())[:number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Answers to calibration prompts, by which trees are judged.

    Attributes:
        target: The target.
        drafter: Its drafter.
        prompts: Token ids of each.
        tick: Called after every answer (see ``num_decodes``).
    """

    target: Target
    drafter: Drafter
    prompts: Sequence[Sequence[int]]
    tick: Callable[[], object] = _nobody

    def watch(self, settings: DecodeSettings, limit: TreeShape) -> list[Answer]:
        """Return plainly decoded answers, at every position a tree proposed wide enough for all up to ``limit``."""
        answers = []
        watching = Watching(self.drafter, replace(limit, budget=_WIDER * limit.budget))
        for prompt in self.prompts:
            generation = decode(self.target, watching, prompt, replace(settings, max_new_tokens=ANSWER_TOKENS))
            answers.append(Answer(generation.token_ids, watching.proposals))
            self.tick()
        return answers

    def costs(self, settings: DecodeSettings, limit: TreeShape) -> Costs:
        """Return the costs of steps, from a few steps with each of a grid of shapes, plain ones between them."""
        grid = _cells(limit)
        sizes = [budget for budget in BUDGETS if budget <= limit.budget]
        plain: list[float] = []
        other: list[float] = []
        draft: dict[tuple[int, int], list[float]] = {cell: [] for cell in grid}
        verify: dict[int, list[float]] = {}
        for turn in range(_ROUNDS * len(grid)):
            depth, top_k = grid[turn % len(grid)]
            size = max(depth, sizes[turn % len(sizes)])
            shape = TreeShape(kind="dynamic", budget=size, depth=depth, top_k=top_k)
            short = replace(settings, max_new_tokens=COST_TOKENS, shape=shape, eos_ids=frozenset())
            prompt = self.prompts[turn % len(self.prompts)]
            steps = decode(self.target, self.drafter, prompt, short).steps
            for step in steps[1:] or steps:  # a deep tree may be all of so short an answer
                draft[depth, top_k].append(step.draft_ms)
                verify.setdefault(step.num_nodes, []).append(step.verify_ms)
                other.append(step.other_ms)
            self.tick()
            if turn % _PLAIN_EVERY == 0:
                steps = decode(self.target, Autoregressive(), prompt, short).steps[1:]
                self.tick()
                plain += [step.draft_ms + step.verify_ms + step.other_ms for step in steps]
                verify.setdefault(0, []).extend(step.verify_ms for step in steps)
        medians = {size: statistics.median(times) for size, times in sorted(verify.items()) if len(times) >= 3}
        rising = np.maximum.accumulate(list(medians.values()))  # more nodes are never cheaper: what says so is noise
        return Costs(
            plain=statistics.median(plain),
            draft={cell: statistics.median(times) for cell, times in draft.items()},
            verify=dict(zip(medians, rising.tolist(), strict=True)),
            other=statistics.median(other),
        )

    def play_off(self, settings: DecodeSettings, shapes: Sequence[TreeShape]) -> list[Choice]:
        """Return what was measured of some shapes, the fastest first.

        Every prompt is decoded plainly and with every shape, the first of them in turn another. As in a report, a
        speedup is the geometric mean over prompts of the ratio of seconds a token.
        """
        contestants = [None, *shapes]
        answers: dict[TreeShape | None, list[Generation]] = {shape: [] for shape in contestants}
        for number, prompt in enumerate(self.prompts):
            first = number % len(contestants)
            for shape in (*contestants[first:], *contestants[:first]):
                short = replace(settings, max_new_tokens=ANSWER_TOKENS, shape=shape or shapes[0])
                answers[shape].append(decode(self.target, self.drafter if shape else Autoregressive(), prompt, short))
                self.tick()
        plain = answers[None]
        choices = []
        for shape in shapes:
            own = answers[shape]
            logs = [
                math.log(a.s_per_token / b.s_per_token) for a, b in zip(plain, own, strict=True) if a.steps and b.steps
            ]
            steps = sum(len(answer.steps) for answer in own)
            emitted = sum(len(answer.token_ids) - 1 for answer in own)
            choices.append(
                Choice(
                    shape=shape,
                    tau=emitted / max(1, steps),
                    speedup=math.exp(statistics.fmean(logs)) if logs else 1.0,
                    step_ms=1e3 * sum(answer.decode_s for answer in own) / max(1, steps),
                )
            )
        return sorted(choices, key=lambda choice: (-choice.speedup, choice.shape.budget))


def choose_trees(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    modes: Mapping[str, DecodeSettings],
    limit: TreeShape,
    tick: Callable[[], object] = _nobody,
) -> dict[str, Choice]:
    """Return the shape that is the fastest on the prompts for every mode; costs are measured once.

    Args:
        target: The target.
        drafter: Its drafter.
        prompts: Token ids of calibration prompts.
        modes: Rule, sampling and seed of the decoding to come, by the mode's name.
        limit: Largest budget, depth and top-k that are considered.
        tick: Called after every answer (see ``num_decodes``).
    """
    first = next(iter(modes.values()))
    decode(target, drafter, prompts[0], replace(first, max_new_tokens=COST_TOKENS, shape=limit))  # warm-up
    tick()
    trials = Trials(target=target, drafter=drafter, prompts=prompts, tick=tick)
    costs = trials.costs(first, limit)
    chosen = {}
    for name, settings in modes.items():
        widest = replace(limit, kind="coupled") if settings.rule == "coupled" else limit
        ranked = rank(trials.watch(settings, widest), costs, candidates(widest))
        chosen[name] = trials.play_off(settings, finalists(ranked))[0]
    return chosen
