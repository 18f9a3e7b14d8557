"""Automatic trees: what is read off a wide tree is what the smaller one keeps, and the best prediction is taken."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.decoding.test_tree import TableScorer
from tests.decoding.tiny import KnowingDrafter, make_prompt, make_target, plain, settings, tree_of
from tests.drafters.test_eagle3_decoding import make_drafter_model

from vsdbench.bench import auto_tree, methods
from vsdbench.bench.auto_tree import Choice, Costs, Trials, candidates, choose_trees, finalists, num_decodes, rank
from vsdbench.bench.calibration import NUM_PROMPTS, PROMPTS, calibration_prompts
from vsdbench.bench.watching import Answer, Proposal
from vsdbench.decoding.engine import decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.tree import grow
from vsdbench.suites.prompts import Prompt
from vsdbench.suites.schema import DrafterEntry, Generation, Mode, TreeConfig
from vsdbench_drafters.training.recipe import EvaluationConfig

LIMIT = TreeShape(budget=16, depth=4, top_k=4)


def make_drafter(target):
    return make_drafter_model(target).drafter(target.dtype)


def grown(seed, shape):
    scorer = TableScorer(seed, sharpness=2.0)
    return grow(scorer, shape, state=None, temperature=0.0, generator=torch.Generator()), 1 + len(scorer.calls)


def held(tree, following):
    """How many of the tokens a tree holds, by walking it."""
    at, length = -1, 0
    tokens = tree.tokens.tolist()
    for token in following:
        found = [n for n in range(len(tree)) if tree.parents[n] == at and tokens[n] == token]
        if not found:
            break
        at, length = found[0], length + 1
    return length


def test_smaller_trees_are_read_off_a_wide_one():
    checked = differing = 0
    shapes = candidates(LIMIT)
    assert sum(shape.adapts for shape in shapes) > 50
    for seed in range(12):
        wide = Proposal(grown(seed, TreeShape(budget=400, depth=4, top_k=4))[0])
        for shape in shapes:
            tree, levels = grown(seed, shape)
            for follow in range(8):
                generator = torch.Generator().manual_seed(follow)
                following = (2 * torch.randint(0, 6, (5,), generator=generator) + 1).tolist()
                same = wide.take(shape, following) == (levels, len(tree), held(tree, following))
                if shape.top_k == 4:
                    assert same
                checked, differing = checked + 1, differing + (not same)
    assert differing < 0.01 * checked  # fewer children than the wide tree's: its levels may have expanded others


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_walk_takes_the_steps_that_decoding_takes(temperature):
    target = make_target()
    drafter = make_drafter(target)
    prompts = [make_prompt(9, seed) for seed in range(3)]
    chosen = settings(30, temperature=temperature)
    answers = Trials(target=target, drafter=drafter, prompts=prompts).watch(chosen, LIMIT)
    total = 0
    shapes = [TreeShape(budget=budget, depth=min(budget, 4), top_k=4) for budget in (1, 4, 9, 16)]
    shapes.append(replace(shapes[-1], min_node_prob=0.02, min_level_prob=0.1))
    for shape in shapes:
        for prompt, answer in zip(prompts, answers, strict=True):
            generation = decode(target, drafter, prompt, settings(48, temperature=temperature, shape=shape))
            assert generation.token_ids == answer.tokens
            steps = [(step.num_nodes, step.num_accepted) for step in generation.steps]
            walked = [(step.num_nodes, step.num_kept) for step in answer.walk(shape)]
            assert walked[:-1] == steps[:-1]  # the last may have kept more than the answer has room for
            total += len(steps)
    assert total < 5 * 3 * 47  # something was kept


def test_on_a_device_that_must_be_waited_for_no_tree_adapts():
    assert any(shape.adapts for shape in candidates(LIMIT))
    assert not any(shape.adapts for shape in candidates(LIMIT, adapting=False))
    assert not any(shape.adapts for shape in candidates(replace(LIMIT, depth=1)))
    assert all(shape.depth <= shape.budget <= 16 and shape.top_k <= 4 for shape in candidates(LIMIT))


def test_the_best_prediction_comes_first_and_follows_the_costs():
    chain = Proposal(tree_of([1, 2, 3], [-1, 0, 1]))
    answers = [Answer([0, 1, 2, 3, 9, 9], [chain] + [Proposal(tree_of([5, 5, 5], [-1, 0, 1]))] * 4)]
    shapes = [TreeShape(budget=n, depth=n, top_k=1) for n in (1, 2, 3)]
    draft = {(1, 1): 1.0, (2, 1): 2.0, (3, 1): 3.0}
    costs = Costs(plain=10.0, draft=draft, verify={0: 9.0, 1: 9.0, 3: 9.0}, other=0.0)
    choices = rank(answers, costs, shapes)
    assert [choice.shape.budget for choice in choices] == [3, 2, 1]
    assert choices[0].tau == 5 / 2
    assert choices[0].speedup == pytest.approx(5 / 2 * 10 / 12)
    dear = Costs(plain=10.0, draft=draft, verify={0: 9.0, 1: 9.0, 3: 40.0}, other=0.0)
    assert dear.step(2, 2, 1) == pytest.approx(2.0 + 24.5)
    assert rank(answers, dear, shapes)[0].shape.budget == 1


def test_costs_cover_every_candidate_and_rise_with_the_nodes():
    target = make_target()
    costs = Trials(target=target, drafter=make_drafter(target), prompts=[make_prompt(9)]).costs(settings(8), LIMIT)
    assert list(costs.verify.values()) == sorted(costs.verify.values())
    assert 0 in costs.verify
    for shape in candidates(LIMIT):
        for nodes in range(shape.budget + 1):
            assert costs.step(shape.depth, nodes, shape.top_k) > 0
        assert shape.depth <= shape.budget <= LIMIT.budget


def test_a_tree_that_is_a_whole_answer_has_costs_too():
    target, prompt = make_target(), make_prompt(9)
    answer = plain(target, prompt, settings(auto_tree.COST_TOKENS))
    deep = TreeShape(budget=auto_tree.COST_TOKENS, depth=auto_tree.COST_TOKENS, top_k=1)
    trials = Trials(target=target, drafter=KnowingDrafter(answer, len(prompt)), prompts=[prompt])
    costs = trials.costs(settings(8), deep)
    assert {depth for depth, _ in costs.draft} == set(range(1, auto_tree.COST_TOKENS + 1))


def test_finalists_are_the_best_of_different_sizes():
    shapes = [TreeShape(budget=n, depth=d, top_k=2) for n, d in ((4, 3), (4, 2), (6, 3), (2, 2), (8, 3))]
    choices = [Choice(shape=shape, tau=1.0, speedup=1.0, step_ms=1.0) for shape in shapes]
    assert finalists(choices, 3) == [shapes[0], shapes[2], shapes[3]]
    adapting = [replace(choice, shape=replace(choice.shape, min_level_prob=0.5)) for choice in choices[2:]]
    assert finalists([*adapting, *choices], 3) == [adapting[0].shape, adapting[1].shape, shapes[0]]
    assert finalists([*adapting[:2], *choices], 3) == [adapting[0].shape, adapting[1].shape, shapes[0]]


def test_the_play_off_decodes_every_prompt_with_everyone_and_takes_the_fastest(monkeypatch):
    target = make_target()
    drafter = make_drafter(target)
    prompts = [make_prompt(9, seed) for seed in range(6)]
    shapes = [TreeShape(budget=budget, depth=3, top_k=2) for budget in (4, 8)]
    pace = {0: 0.010, 4: 0.008, 8: 0.004}  # seconds a token
    order = []

    def timed(target, drafter, prompt, settings):
        generation = decode(target, drafter, prompt, settings)
        size = 0 if drafter.name == "autoregressive" else settings.shape.budget
        order.append((prompts.index(prompt), size))
        slower = 1.5 if prompts.index(prompt) == 2 else 1.0  # a busy moment, which all of a prompt share
        return replace(generation, decode_s=slower * pace.get(size, 0.02) * (len(generation.token_ids) - 1))

    monkeypatch.setattr(auto_tree, "decode", timed)
    trials = Trials(target=target, drafter=drafter, prompts=prompts)
    best, second = trials.play_off(settings(8), shapes)
    assert (best.shape, second.shape) == (shapes[1], shapes[0])
    assert best.speedup == pytest.approx(2.5)
    assert second.speedup == pytest.approx(1.25)
    answers = trials.watch(settings(8), LIMIT)
    steps = sum(len(answer.walk(best.shape)) for answer in answers)
    assert best.tau == pytest.approx(sum(len(answer.tokens) - 1 for answer in answers) / steps)
    assert sorted(order[:18]) == sorted((number, size) for number in range(6) for size in (0, 4, 8))
    assert [size for _, size in order[:9]] == [0, 4, 8, 4, 8, 0, 8, 0, 4]


def test_every_mode_gets_a_shape_within_the_limits():
    target = make_target()
    modes = {"greedy": settings(8), "stochastic": settings(8, temperature=1.0)}
    told = []
    chosen = choose_trees(
        target, make_drafter(target), [make_prompt(9)], modes=modes, limit=LIMIT, tick=lambda: told.append(1)
    )
    assert len(told) == num_decodes(LIMIT, 1, 2)
    assert list(chosen) == ["greedy", "stochastic"]
    for name, choice in chosen.items():
        kind = "dynamic" if name == "greedy" else "coupled"
        assert choice.shape in candidates(replace(LIMIT, kind=kind))


def suite_of(tree, spare=(), prompts=()):
    entry = DrafterEntry(name="a", type="known", tree=tree)
    modes = [Mode(name="greedy", temperature=0, rule="greedy")]
    generation = Generation(max_new_tokens=8, chat=False)
    config = SimpleNamespace(
        drafters=[entry],
        seed=0,
        generation=generation,
        modes=modes,
        baselines=["autoregressive"],
        peers=[],
        compile=False,
    )
    return SimpleNamespace(config=config, spare=spare, prompts=prompts)


def made(number, category):
    return [
        Prompt(id=f"{category}{n}", turns=(f"{category} {n}",), category=category, source="s", hash=f"{category}{n}")
        for n in range(number)
    ]


def test_prompts_to_look_at_are_those_that_the_suite_left_out():
    own, spare = made(2, "a") + made(2, "b"), made(40, "a")[2:] + made(20, "b")[2:] + made(20, "c")
    target = SimpleNamespace(max_positions=400, encode_text=lambda text, images: [len(text), *text.encode()])
    assert calibration_prompts(suite_of(TreeConfig(), spare, own), target) == []
    looked_at = calibration_prompts(suite_of(TreeConfig(kind="auto"), spare, own), target)
    texts = [bytes(ids[1:]).decode() for ids in looked_at]
    assert len(set(texts)) == NUM_PROMPTS
    assert set(texts) < {prompt.turns[0] for prompt in spare}
    assert [sum(text.startswith(of) for text in texts) for of in "abc"] == [8, 8, 0]  # the suite's own proportions
    ours = calibration_prompts(suite_of(TreeConfig(kind="auto"), spare[:3], own), target)
    assert [bytes(ids[1:]).decode() for ids in ours] == list(PROMPTS)


def test_auto_is_a_word_or_a_kind_with_wide_limits():
    word, kind = DrafterEntry(name="a", type="b", tree="auto").tree, TreeConfig(kind="auto", budget=12)
    assert (word.kind, word.budget, word.depth, word.top_k) == ("auto", 32, 6, 8)
    assert kind.shape() == TreeShape(kind="dynamic", budget=12, depth=6, top_k=8)


def test_a_chosen_tree_is_noted_and_kept_when_a_run_goes_on(monkeypatch):
    target = make_target()
    monkeypatch.setattr(methods.registry, "load", lambda *_: lambda target, **_: make_drafter(target))
    shape = TreeShape(budget=3, depth=2, top_k=2)
    asked = []

    def choose(_target, _drafter, prompts, *, modes, limit, tick):
        asked.append((prompts, list(modes), limit.budget))
        return {name: Choice(shape=shape, tau=1.5, speedup=1.2, step_ms=3.0) for name in modes}

    monkeypatch.setattr(methods, "choose_trees", choose)
    config = suite_of(TreeConfig(kind="auto")).config
    method = methods.build_methods(config, target, calibration=[[1, 2]])[1]
    assert asked == [([[1, 2]], ["greedy"], 32)]
    assert method.shape_in("greedy") == shape
    assert method.trees["greedy"]["predicted_speedup"] == 1.2
    again = methods.build_methods(config, target, calibration=[], chosen={"a": method.trees})[1]
    assert again.shape_in("greedy") == shape
    assert len(asked) == 1


def test_checkpoints_are_judged_with_one_tree():
    with pytest.raises(ValueError, match="one and the same tree"):
        EvaluationConfig(tree={"kind": "auto"})
