"""``tree: auto``: the tree with the best predicted speedup for this drafter, target and machine.

A larger tree keeps more tokens a step and makes every step dearer; where the best trade lies depends on the drafter and
on the machine, so it is measured, on prompts that are not in the suite. Two measurements, both with the engine itself:

* *Acceptance.* Plain decoding of some answers, with a wide tree proposed at every position and none sent. What any
  smaller dynamic tree would have drafted, sent and kept is then read off: it holds the most probable of the same nodes.
  Under the rule ``coupled`` the trees are of that kind.
* *Cost.* A few steps each give the milliseconds of drafting (by levels and children), of verifying (by nodes), and of a
  plain step.

Their ratio, tokens x plain step / (drafting + verifying + the rest of all steps), ranks all shapes: those that send as
much at every step, and on a host those that send what the drafter is sure of. The best of so many
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

from vsdbench.bench.watching import Answer, Watching
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import TreeShape, without_thresholds
from vsdbench.models.device import apart

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import Drafter, Generation
    from vsdbench.models.target import Target

ANSWER_TOKENS = 48
COST_TOKENS = 12
TOP_KS = (1, 2, 4, 8)
"""Children whose drafting is timed; what is between them costs what is between theirs."""
_CHILDREN = (1, 2, 3, 4, 6, 8)
_MOST_NODES, _MOST_CHILDREN = (4, 5, 6, 8, 12, 16, 24), (2, 3, 4, 6)
_NODE_PROBS, _LEVEL_PROBS = (0.0, 0.03, 0.06, 0.1), (0.35, 0.5, 0.65, 0.8)
"""Of trees that adapt."""
_WIDER = 3
_ROUNDS = 2
_FINALISTS = 3
BUDGETS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Milliseconds, each the median over steps.

    Attributes:
        plain: A step of plain decoding.
        draft: By ``(levels, top_k)`` that a tree grew with.
        verify: By number of nodes; 0 is there.
        other: Of a step, neither drafting nor the target's forward.
    """

    plain: float
    draft: dict[tuple[int, int], float]
    verify: dict[int, float]
    other: float

    def step(self, levels: int, num_nodes: int, top_k: int) -> float:
        """Return the milliseconds of a step with so much, between what was measured with less and with more."""
        sizes, children = sorted(self.verify), sorted(width for depth, width in self.draft if depth == levels)
        forward = float(np.interp(num_nodes, sizes, [self.verify[size] for size in sizes]))
        drafting = np.interp(top_k, children, [self.draft[levels, width] for width in children])
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
        if shape.adapts:
            size = f"at most {size}, of nodes from {shape.min_node_prob:g} and levels from {shape.min_level_prob:g} on"
        return f"the best tree is predicted to be {size}: tau {self.tau:.2f}, speedup {self.speedup:.2f}"

    def describe(self) -> dict[str, Any]:
        """Return it as plain JSON data, for the manifest."""
        return {
            "tree": without_thresholds(asdict(self.shape)),
            "predicted_tau": self.tau,
            "predicted_speedup": self.speedup,
            "predicted_step_ms": self.step_ms,
        }


def candidates(limit: TreeShape, *, adapting: bool = True) -> list[TreeShape]:
    """Return the shapes up to ``limit``, and of its kind, that are considered.

    Args:
        limit: Largest budget, depth and top-k.
        adapting: Whether to consider those that send what the drafter is sure of.
    """
    shapes = [
        replace(limit, budget=budget, depth=depth, top_k=top_k)
        for top_k in _CHILDREN
        for depth in range(1, limit.depth + 1)
        for budget in BUDGETS
        if top_k <= limit.top_k and depth <= budget <= min(limit.budget, top_k + (depth - 1) * top_k**2)
    ]
    if adapting and limit.depth > 1:
        shapes += [
            TreeShape(
                kind=limit.kind,
                budget=budget,
                depth=min(budget, limit.depth),
                top_k=top_k,
                min_node_prob=node,
                min_level_prob=level,
            )
            for budget in _MOST_NODES
            for top_k in _MOST_CHILDREN
            if top_k <= limit.top_k and budget <= limit.budget
            for node in _NODE_PROBS
            for level in _LEVEL_PROBS
        ]
    return shapes


def num_decodes(limit: TreeShape, num_prompts: int, num_modes: int) -> int:
    """Return how many answers ``choose_trees`` decodes, where there are as many finalists as it wants."""
    costs = _ROUNDS * (len(_cells(limit)) + len(_sizes(limit)))
    return 1 + num_modes * (costs + num_prompts * (2 + _FINALISTS))


def _cells(limit: TreeShape) -> list[tuple[int, int]]:
    """Return the depths and top-ks whose drafting is timed."""
    return [(depth, top_k) for top_k in TOP_KS if top_k <= limit.top_k for depth in range(1, limit.depth + 1)]


def _sizes(limit: TreeShape) -> list[int]:
    """Return the numbers of nodes whose verification is timed."""
    return [budget for budget in BUDGETS if budget <= limit.budget]


def _nobody() -> None:
    """Tell nobody that an answer is done."""


def rank(answers: Sequence[Answer], costs: Costs, shapes: Sequence[TreeShape]) -> list[Choice]:
    """Return the shapes with what is predicted of them, the best first; of equals the smaller tree."""
    choices = []
    emitted = sum(len(answer.tokens) - 1 for answer in answers)
    for shape in shapes:
        steps = [step for answer in answers for step in answer.walk(shape)]
        each = Counter((step.levels, step.num_nodes) for step in steps)
        spent = sum(costs.step(*kind, shape.top_k) * count for kind, count in each.items())
        tau, step_ms = emitted / max(1, len(steps)), spent / max(1, len(steps))
        speedup = emitted * costs.plain / spent if steps else 1.0
        choices.append(Choice(shape=shape, tau=tau, speedup=speedup, step_ms=step_ms))
    return sorted(choices, key=lambda choice: (-choice.speedup, choice.shape.budget))


def finalists(choices: Sequence[Choice], number: int = _FINALISTS) -> list[TreeShape]:
    """Return the shapes of the best choices, each of another budget than those before it.

    The best of those that do not adapt is always among them: what tells the two kinds apart is worth seeing.
    """
    by_budget: dict[int, TreeShape] = {}
    for choice in choices:
        by_budget.setdefault(choice.shape.budget, choice.shape)
    chosen = list(by_budget.values())[:number]
    steady = next((choice.shape for choice in choices if not choice.shape.adapts), None)
    if steady is not None and all(shape.adapts for shape in chosen):
        chosen[-1] = steady
    return chosen


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
        """Return the costs of steps, from a few steps that only draft and a few that also verify, in turns."""
        cells, sizes = _cells(limit), _sizes(limit)
        plain: list[float] = []
        other: list[float] = []
        draft: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
        verify: dict[int, list[float]] = {}
        short = replace(settings, max_new_tokens=COST_TOKENS, eos_ids=frozenset())
        most = len(cells) + len(sizes)
        for turn in range(_ROUNDS * most):
            prompt, place = self.prompts[turn % len(self.prompts)], turn % most
            if place < len(cells):
                depth, top_k = cells[place]
                all_levels = replace(limit, budget=_WIDER * limit.budget, depth=depth, top_k=top_k)
                watching = Watching(self.drafter, all_levels, keep=False)
                steps = decode(self.target, watching, prompt, short).steps[1:]
                draft[depth, top_k] += [step.draft_ms for step in steps]
                plain += [step.verify_ms + step.other_ms for step in steps]
            else:
                size = sizes[place - len(cells)]
                shape = replace(limit, budget=size, depth=min(size, limit.depth))
                steps = decode(self.target, self.drafter, prompt, replace(short, shape=shape)).steps
                steps = steps[1:] or steps  # a deep tree may be all of so short an answer
                other += [step.other_ms for step in steps]
            for step in steps:
                verify.setdefault(step.num_nodes, []).append(step.verify_ms)
            self.tick()
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
    """Return the shape that is the fastest on the prompts for every mode.

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
    chosen = {}
    for name, settings in modes.items():
        widest = replace(limit, kind="coupled") if settings.rule == "coupled" else limit
        costs = trials.costs(settings, widest)
        shapes = candidates(widest, adapting=not apart(target.device))
        chosen[name] = trials.play_off(settings, finalists(rank(trials.watch(settings, widest), costs, shapes)))[0]
    return chosen
