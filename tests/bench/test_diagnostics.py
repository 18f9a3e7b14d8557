"""Counts of hand-made trees are the ones on paper, add up, and agree with what the engine measured."""

import json
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.decoding.tiny import SHAPES, AdversarialDrafter, make_prompt, make_target, plain, settings, verify

from vsdbench.bench.diagnostics import diagnose, misalignment, nodes_for, path_ranks, total
from vsdbench.decoding.engine import Autoregressive, decode
from vsdbench.decoding.interfaces import Drafted, Generation, StepRecord, TokenTree, TreeShape
from vsdbench.decoding.sampling import SamplingParams
from vsdbench.decoding.tree import grow
from vsdbench.store.records import Diagnostics
from vsdbench_drafters.architectures.ngram import NgramDrafter

#   root ┬ 0 (.55) ┬ 2 (.65)  path .36
#        │         └ 3 (.15)  path .08
#        └ 1 (.25) ─ 4 (.95)  path .24
PARENTS = [-1, -1, 0, 0, 1]
PROBS = [0.55, 0.25, 0.65, 0.15, 0.95]  # in the middle of bins 5, 2, 6, 1, 9
SHAPE = TreeShape(kind="dynamic", budget=5, depth=3, top_k=2)


def generation(*steps, parents=PARENTS, probs=PROBS, **drafted):
    """An answer of steps ``(path, num_emitted)``, all over the same tree."""
    logs = torch.tensor(probs).log()
    return Generation(
        token_ids=[0] * (1 + sum(emitted for _, emitted in steps)),
        stop_reason="length",
        prefill_s=0.0,
        decode_s=0.0,
        steps=[StepRecord(len(parents), 0, len(path), emitted, 0.0, 0.0, 0.0) for path, emitted in steps],
        drafted=[Drafted(parents, logs, path, **drafted) for path, _ in steps],
    )


def bins(**by_bin):
    return tuple(by_bin.get(f"b{i}", 0) for i in range(10))


def test_the_greedy_path_is_kept():
    found = diagnose(generation(([0, 2], 3)), SHAPE)
    assert (found.num_steps, found.num_pruned, found.num_kept_steps, found.num_greedy_steps) == (1, 1, 1, 1)
    assert (found.greedy_tokens, found.tree_tokens) == (2, 2)
    assert found.kept_by_rank == (1, 1)
    assert found.calibration.count == bins(b1=1, b2=1, b5=1, b6=1)
    assert found.calibration.kept == bins(b5=1, b6=1)
    assert found.calibration.sum_confidence == pytest.approx(bins(b1=0.15, b2=0.25, b5=0.55, b6=0.65), abs=1e-6)
    assert found.calibration.brier_sum == pytest.approx(0.45**2 + 0.25**2 + 0.35**2 + 0.15**2, abs=1e-6)


def test_another_branch_is_kept():
    found = diagnose(generation(([0, 3], 3), ([1, 4], 3), ([], 1)), SHAPE)
    assert (found.num_steps, found.num_kept_steps, found.num_greedy_steps) == (3, 2, 0)
    assert (found.greedy_tokens, found.tree_tokens) == (1, 4)
    assert found.kept_by_rank == (1, 0, 1, 1, 1)  # of nodes 0, 2, 1, 4, 3
    assert found.calibration.count == bins(b1=1, b2=3, b5=3, b6=1, b9=1)
    assert found.calibration.kept == bins(b1=1, b2=1, b5=1, b9=1)
    first = 0.45**2 + 0.25**2 + 0.65**2 + 0.85**2
    second = 0.55**2 + 0.75**2 + 0.05**2
    assert found.calibration.brier_sum == pytest.approx(first + second + 0.55**2 + 0.25**2, abs=1e-6)


def test_a_beginning_of_the_greedy_path_counts_as_greedy():
    found = diagnose(generation(([0], 2)), SHAPE)
    assert (found.num_greedy_steps, found.greedy_tokens, found.tree_tokens) == (1, 1, 1)
    assert found.calibration.count == bins(b1=1, b2=1, b5=1, b6=1)  # the children of 0 were refused


def test_nothing_is_said_of_what_follows_a_kept_token_that_ends_the_answer():
    found = diagnose(generation(([0], 1)), SHAPE)
    assert found.calibration.count == bins(b2=1, b5=1)
    assert found.tree_tokens == sum(found.calibration.kept) == 1


@pytest.mark.parametrize(
    ("shape", "max_depth", "pruned"),
    [
        (TreeShape(kind="dynamic", budget=5, depth=2, top_k=2), None, 0),
        (TreeShape(kind="dynamic", budget=5, depth=4, top_k=2), None, 1),
        (TreeShape(kind="dynamic", budget=5, depth=4, top_k=2), 2, 0),  # no more heads than that
        (TreeShape(kind="dynamic", budget=2, depth=4, top_k=2), None, 0),  # a deeper path has no room
    ],
)
def test_pruned_is_what_is_shorter_than_it_could_be(shape, max_depth, pruned):
    assert diagnose(generation(([], 1)), shape, max_depth=max_depth).num_pruned == pruned


def test_the_first_of_equals_is_the_greedy_one_and_has_the_better_rank():
    parents, probs = [-1, -1, 1, 1], [0.5, 0.5, 0.3, 0.3]
    found = diagnose(generation(([1, 3], 3), parents=parents, probs=probs), SHAPE)
    assert (found.num_greedy_steps, found.greedy_tokens) == (0, 0)
    assert found.kept_by_rank == (0, 1, 0, 1)
    assert path_ranks([-1, 0], [-1.0, 0.0]) == [0, 1]  # a certain child stays behind its parent


def test_impossible_scores_stay_in_the_bins():
    found = diagnose(generation(([0], 2), parents=[-1, -1], probs=[1.5, 0.0]), SHAPE)
    assert found.calibration.count == bins(b0=1, b9=1)
    assert found.calibration.sum_confidence == bins(b9=1.0)
    assert found.calibration.brier_sum == 0


def test_what_means_nothing_is_none():
    drawn = diagnose(generation(([0], 2), drawn=True), SHAPE)
    assert (drawn.num_pruned, drawn.num_greedy_steps, drawn.greedy_tokens, drawn.calibration) == (None,) * 4
    assert (drawn.num_kept_steps, drawn.tree_tokens, drawn.kept_by_rank) == (1, 1, (1,))
    lookup = diagnose(generation(([0], 2), has_probs=False), SHAPE)
    assert (lookup.num_pruned, lookup.calibration) == (None, None)
    assert (lookup.num_greedy_steps, lookup.greedy_tokens) == (1, 1)
    assert diagnose(Generation([1], "eos", 0.0, 0.0), SHAPE) is None
    assert diagnose(Generation([1, 2], "eos", 0.0, 0.0, [StepRecord(1, 1, 0, 1, 0, 0, 0)]), SHAPE) is None


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.data())
def test_a_chain_is_its_greedy_path(probs, data):
    kept = data.draw(st.integers(0, len(probs)))
    answer = generation((list(range(kept)), kept + 1), parents=range(-1, len(probs) - 1), probs=probs)
    found = diagnose(answer, TreeShape(kind="chain", budget=len(probs), depth=len(probs), top_k=1))
    assert found.num_pruned == 0
    assert found.num_greedy_steps == found.num_kept_steps == (kept > 0)
    assert found.greedy_tokens == found.tree_tokens == kept
    assert found.kept_by_rank == (1,) * kept
    assert sum(found.calibration.count) == min(kept + 1, len(probs))


def test_counts_add_up():
    steps = [([0, 2], 3), ([], 1), ([1, 4], 3), ([0], 2), ([0, 3], 2)]
    whole = diagnose(generation(*steps), SHAPE)
    parts = [diagnose(generation(*part), SHAPE) for part in (steps[:1], steps[1:3], steps[3:])]
    added = total(parts)
    assert added.model_dump(exclude={"calibration"}) == whole.model_dump(exclude={"calibration"})
    assert added.calibration.count == whole.calibration.count
    assert added.calibration.sum_confidence == pytest.approx(whole.calibration.sum_confidence, abs=1e-5)
    assert added.calibration.brier_sum == pytest.approx(whole.calibration.brier_sum, abs=1e-5)
    lookup = diagnose(generation(([0], 2), has_probs=False), SHAPE)
    mixed = total([whole, lookup])
    assert (mixed.num_pruned, mixed.calibration) == (None, None)
    assert mixed.greedy_tokens == whole.greedy_tokens + 1
    assert total([]) is None


def test_metrics():
    found = diagnose(generation(([0, 2], 3), ([], 1), ([1, 4], 3), ([0], 2)), SHAPE)
    metrics = misalignment([found, None, float("nan")])
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["greedy_pruned_share"] == 1
    assert metrics["accepted_is_greedy_share"] == pytest.approx(2 / 3)
    assert metrics["greedy_path_length"] == pytest.approx(3 / 4)
    assert metrics["tree_path_length"] == pytest.approx(5 / 4)
    assert metrics["nodes_for_95"] == 4
    assert len(metrics["calibration"]) == 10
    assert metrics["calibration"][5] == {"confidence": pytest.approx(0.55), "accepted": 0.5, "count": 4}
    assert metrics["calibration"][0] == {"confidence": None, "accepted": None, "count": 0}
    assert metrics["brier"] == pytest.approx(found.calibration.brier_sum / sum(found.calibration.count))
    assert misalignment([None]) is None
    nothing = misalignment([diagnose(generation(([], 1)), SHAPE)])
    assert (nothing["nodes_for_95"], nothing["accepted_is_greedy_share"]) == (None, None)


@pytest.mark.parametrize(
    ("kept", "budget"), [([19, 1], 1), ([18, 2], 2), ([0, 0, 1], 3), ([95, 4, 1], 1), ([94, 0, 6], 3)]
)
def test_nodes_for_95(kept, budget):
    assert nodes_for(0.95, kept) == budget


# --- what the docstring claims of calibration -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["coupled", "rejection", "traversal"])
def test_a_drafter_that_equals_the_target_is_calibrated_under_every_rule(rule):
    generator = torch.Generator().manual_seed(5)
    vocab, parents, depths = 5, [-1, -1, -1, 0, 0, 1, 3], [1, 1, 1, 2, 2, 2, 3]
    logits = 1.5 * torch.randn(len(parents) + 1, vocab, generator=generator)
    ranked = logits.sort(descending=True).indices.tolist()
    siblings = [sum(parents[i] == parent for i in range(node)) for node, parent in enumerate(parents)]
    tokens = [ranked[parent + 1][rank] for parent, rank in zip(parents, siblings, strict=True)]
    logs = torch.log_softmax(logits, -1)[[parent + 1 for parent in parents], tokens]
    tree = TokenTree(torch.tensor(tokens), parents, depths, logs)
    params = SamplingParams(temperature=1.0)
    answer = Generation([0], "length", 0.0, 0.0)
    for position in range(4000):
        verdict = verify(rule, tree, logits, params=params, seed=7, position=4 * position, generator=generator)
        answer.drafted.append(Drafted(parents, logs, verdict.path))
        answer.steps.append(StepRecord(len(parents), 3, len(verdict.path), len(verdict.path) + 1, 0, 0, 0))
    calibration = diagnose(answer, TreeShape(kind="static", budget=7, depth=3, top_k=3)).calibration
    assert sum(count > 100 for count in calibration.count) >= 4
    for count, confidence, kept in zip(calibration.count, calibration.sum_confidence, calibration.kept, strict=True):
        spread = math.sqrt(max(confidence * (1 - confidence / max(count, 1)), 1.0))
        assert abs(kept - confidence) < 4 * spread


# --- with the engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    return make_target()


class TableDrafter:
    """Grows trees of every shape from a fixed table of log-probabilities, and remembers what it drew from, weakly."""

    name = "table"

    def __init__(self, vocab):
        self.vocab_size = vocab
        self.table = torch.log_softmax(2 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)), -1)
        self.drawn_from = []

    def begin(self, state, max_length):
        pass

    def propose(self, state, shape, *, temperature, generator):
        self.last = state.tokens[-1]
        tree = grow(self, shape, state=state, temperature=temperature, generator=generator)
        if tree.draft_probs is not None:
            self.drawn_from.append(weakref.ref(tree.draft_probs))
        return tree

    def commit(self, state, num_accepted, features):
        pass

    def root(self):
        return self.table[self.last]

    def level(self, tokens, parent_slots, depth):
        return self.table[tokens]

    def to_target(self, ids):
        return ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_the_steps(target, temperature, seed):
    prompt = make_prompt(5 + seed, seed)
    chosen = settings(28, temperature=temperature, seed=seed)
    answer = decode(target, AdversarialDrafter(plain(target, prompt, chosen), len(prompt), seed), prompt, chosen)
    found = diagnose(answer, chosen.shape)
    accepted = [step.num_accepted for step in answer.steps]
    assert sum(accepted) > 0
    assert found.num_steps == len(accepted)
    assert found.num_kept_steps == sum(count > 0 for count in accepted)
    assert found.tree_tokens == sum(found.kept_by_rank) == sum(found.calibration.kept) == sum(accepted)
    assert [len(step.parents) for step in answer.drafted] == [step.num_nodes for step in answer.steps]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_nothing_large_is_kept_alive(target, shape):
    drafter = TableDrafter(target.vocab_size)
    answer = decode(target, drafter, make_prompt(6), settings(20, temperature=1.0, rule="rejection", shape=shape))
    assert len(answer.drafted) == len(answer.steps) > 1
    for step in answer.drafted:
        assert step.log_probs.untyped_storage().nbytes() == 4 * len(step.parents)
        assert step.drawn == (shape.kind == "sampled")
    assert (len(drafter.drawn_from) > 0) == (shape.kind == "sampled")
    assert all(reference() is None for reference in drafter.drawn_from)


def test_a_chain_from_the_engine_is_never_pruned_and_a_wide_tree_is(target):
    chain, wide = SHAPES[0], TreeShape(kind="dynamic", budget=4, depth=4, top_k=4)
    prompt, drafter = make_prompt(6), TableDrafter(target.vocab_size)
    found = {
        shape.kind: diagnose(decode(target, drafter, prompt, settings(40, shape=shape)), shape)
        for shape in (chain, wide)
    }
    assert found["chain"].num_pruned == 0
    assert found["chain"].greedy_tokens == found["chain"].tree_tokens
    assert 0 < found["dynamic"].num_pruned <= found["dynamic"].num_steps


def test_prompt_lookup_has_no_confidence_and_plain_decoding_no_trees(target):
    prompt = [*make_prompt(6)] * 4
    chosen = settings(40, shape=SHAPES[2])
    found = diagnose(decode(target, NgramDrafter(), prompt, chosen), chosen.shape)
    assert (found.num_pruned, found.calibration) == (None, None)
    assert found.greedy_tokens is not None
    plainly = decode(target, Autoregressive(), prompt, chosen)
    assert {len(step.parents) for step in plainly.drafted} == {0}


def test_records_hold_what_was_counted(make_record):
    found = diagnose(generation(([0, 2], 3), ([], 1)), SHAPE)
    steps = [(5, 2, 2, 3, 1.0, 2.0, 0.5), (5, 2, 0, 1, 1.0, 2.0, 0.5)]
    record = make_record(steps=steps, diagnostics=found)
    assert record.diagnostics == Diagnostics.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValueError, match="diagnostics are of 2 steps and 2 kept tokens, but there are 1 and 2"):
        make_record(steps=steps[:1], diagnostics=found)
