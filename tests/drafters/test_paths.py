"""Draft paths: drawn as they should be, merged without loss, and scored as one forward a path would score them."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from tests.drafters.path_tools import DRAFT_IDS, make_setting
from torch.utils._python_dispatch import TorchDispatchMode

from vsdbench.decoding.interfaces import TreeShape
from vsdbench_drafters.objectives.base import DraftBatch
from vsdbench_drafters.objectives.paths import (
    Paths,
    choose_anchors,
    draft_probs,
    draw,
    join,
    merge,
    oracle,
    sample_paths,
    target_probs,
    trace,
    tree_paths,
)

VD = len(DRAFT_IDS)


@pytest.fixture(scope="module")
def setting():
    return make_setting()


@pytest.fixture(scope="module")
def anchors(setting):
    return choose_anchors(setting.batch, 4, torch.Generator().manual_seed(1))


def proposals(setting, anchors, kind, seed=3):
    generator = torch.Generator().manual_seed(seed)
    drawn = sample_paths(setting.model, setting.branch(anchors), 5, 4, generator)
    leaves = tree_paths(setting.model, setting.branch(anchors), budget=9, top_k=3, depth=4)
    return {"sampled": drawn, "tree": leaves, "mixed": join(drawn, leaves)}[kind]


def test_anchors_are_distinct_rows_of_every_sequence(setting, anchors):
    assert len(set(anchors.tolist())) == len(anchors) == 12
    for span in setting.batch.spans:
        mine = [row for row in anchors.tolist() if span.first_row <= row < span.first_row + span.num_rows]
        assert len(mine) == 4
    everything = choose_anchors(setting.batch, 100, torch.Generator())
    assert everything.tolist() == list(range(setting.batch.num_rows))
    some = choose_anchors(setting.batch, 4, torch.Generator().manual_seed(1), share=0.4)
    spans = [(span.first_row, span.first_row + span.num_rows) for span in setting.batch.spans]
    touched = {index for row in some.tolist() for index, (first, stop) in enumerate(spans) if first <= row < stop}
    assert (len(some), len(touched)) == (4, 1)


class Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for: sizes that depend on what it computes, and single numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += by_mask or name in {"nonzero", "_unique2", "masked_select", "_local_scalar_dense"}
        return func(*args, **(kwargs or {}))


def test_rows_of_all_sequences_are_chosen_by_one_read(setting, anchors, monkeypatch):
    context, listed, tolist = setting.model.start(setting.batch), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: listed.append(tensor) or tolist(tensor))
    with Reads() as reads:
        chosen = context.select(anchors)
    assert reads.count + len(listed) == 1
    assert chosen.rows.owners.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert chosen.rows.shape == (3, 4)
    alone = context.select(anchors[4:8])
    assert alone.rows.owners.tolist() == [1] * 4
    assert torch.equal(alone.hidden_keys[1], chosen.hidden_keys[1])
    assert context.select(anchors[:0]).rows.shape == (3, 0)


@pytest.mark.parametrize("kind", ["sampled", "tree", "mixed"])
def test_a_trie_holds_every_prefix_once(setting, anchors, kind):
    paths = proposals(setting, anchors, kind)
    trie = merge(paths, VD)
    prefixes = [() for _ in range(len(trie))]
    for row in range(len(anchors), len(trie)):
        prefixes[row] = (*prefixes[trie.parents[row]], int(trie.tokens[row]))
    seen = set(zip(trie.anchors.tolist(), prefixes, strict=True))
    assert len(seen) == len(trie)
    for anchor in range(len(anchors)):
        for index in range(paths.tokens.shape[1]):
            length = int(paths.lengths[anchor, index])
            tokens = tuple(paths.tokens[anchor, index, :length].tolist())
            for depth in range(length):
                row = int(trie.rows[anchor, index, depth])
                assert prefixes[row] == tokens[:depth]
                assert int(trie.anchors[row]) == anchor
                assert int(trie.depths[row]) == depth


@pytest.mark.parametrize("kind", ["sampled", "tree", "mixed"])
def test_the_drafters_outputs_are_those_of_one_chain_a_path(setting, anchors, kind):
    paths = proposals(setting, anchors, kind)
    trie = merge(paths, VD)
    hidden = trace(setting.model, setting.branch(anchors), trie)
    for index in range(paths.tokens.shape[1]):
        context = setting.branch(anchors)
        outputs = [setting.model.norm(context.hidden)]
        for depth in range(paths.tokens.shape[-1] - 1):
            outputs.append(
                setting.model.norm(
                    setting.model.advance(context, setting.model.draft_ids[paths.tokens[:, index, depth]])
                )
            )
        for depth, output in enumerate(outputs):
            alive = paths.lengths[:, index] > depth
            torch.testing.assert_close(hidden[trie.rows[alive, index, depth]], output[alive])


@pytest.mark.parametrize("kind", ["sampled", "tree", "mixed"])
def test_the_oracle_sees_what_a_plain_forward_of_each_path_sees(setting, anchors, kind):
    paths = proposals(setting, anchors, kind)
    trie = merge(paths, VD)
    states = oracle(setting.batch, anchors, trie, setting.model.draft_ids, setting.view.target)
    assert len(states) == len(trie) - len(anchors)
    model, batch = setting.target.model, setting.batch
    starts = {row: span.start for span in batch.spans for row in range(span.first_row, span.first_row + span.num_rows)}
    for row in range(len(anchors), len(trie)):
        drafted, node = [], row
        while node >= len(anchors):
            drafted.append(int(setting.model.draft_ids[trie.tokens[node]]))
            node = int(trie.parents[node])
        anchor = int(anchors[trie.anchors[row]])
        root = int(batch.slots[anchor]) + 1
        text = [*batch.tokens[starts[anchor] : root + 1].tolist(), *drafted[::-1]]
        with torch.inference_mode():
            expected = model.get_decoder()(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
        torch.testing.assert_close(states[row - len(anchors)], expected)


def test_target_probabilities_are_of_the_whole_vocabulary(setting):
    states = setting.view.hidden[:70]  # more than one chunk would be needed for a longer batch
    probs, choices = target_probs(states, setting.view.full_head, DRAFT_IDS)
    logits = states @ setting.view.full_head.T
    torch.testing.assert_close(probs, torch.softmax(logits, dim=-1)[:, DRAFT_IDS])
    assert torch.equal(choices, logits.argmax(-1))
    assert (probs.sum(-1) < 1).all()


def test_sampled_paths_have_the_drafters_distribution(setting):
    """Pairs of tokens below one anchor against the product of both steps' probabilities, chi-square."""
    anchors = torch.tensor([3])
    num_paths = 6000
    paths = sample_paths(setting.model, setting.branch(anchors), num_paths, 2, torch.Generator().manual_seed(0))
    trie = merge(paths, VD)
    probs = draft_probs(setting.model, trace(setting.model, setting.branch(anchors), trie))
    first = probs[0]
    observed = torch.bincount(paths.tokens[0, :, 0], minlength=VD).double()
    assert chi_square(observed, first * num_paths) > 1e-3
    best = int(observed.argmax())
    below = paths.tokens[0, paths.tokens[0, :, 0] == best, 1]
    row = int(trie.rows[0, (paths.tokens[0, :, 0] == best).nonzero()[0, 0], 1])
    observed = torch.bincount(below, minlength=VD).double()
    assert chi_square(observed, probs[row] * len(below)) > 1e-3


def chi_square(observed, expected):
    """The p-value, cells with fewer than five expected counts put together."""
    large = expected >= 5
    cells = [observed[large], observed[~large].sum()[None]], [expected[large], expected[~large].sum()[None]]
    observed, expected = (torch.cat(parts) for parts in cells)
    keep = expected > 1e-9
    return stats.chisquare(
        observed[keep].numpy(), (expected[keep] * observed[keep].sum() / expected[keep].sum()).numpy()
    )[1]


@pytest.mark.parametrize(("budget", "top_k", "depth"), [(7, 3, 3), (15, 4, 4), (4, 4, 1), (30, 5, 4)])
def test_tree_paths_are_the_leaves_of_the_tree_that_decoding_sends(setting, budget, top_k, depth):
    """The same text, decoded to the same root: the decode-time drafter's dynamic tree has these leaves."""
    text = setting.batch.tokens[:14].tolist()
    row = 4
    root = int(setting.batch.slots[row]) + 1
    state = setting.target.prefill(text[:root], 64)
    state.tokens.append(text[root])
    drafter = setting.model.drafter(torch.float64)
    drafter.begin(state, 64)
    shape = TreeShape(kind="dynamic", budget=budget, depth=depth, top_k=top_k)
    tree = drafter.propose(state, shape, temperature=0.0, generator=torch.Generator())
    inner, sent = set(tree.parents), set()
    for node in range(len(tree)):
        if node not in inner:
            path, at = [], node
            while at >= 0:
                path.append(int(tree.tokens[at]))
                at = tree.parents[at]
            sent.add(tuple(path[::-1]))
    paths = tree_paths(setting.model, setting.branch(torch.tensor([row])), budget=budget, top_k=top_k, depth=depth)
    found = {tuple(DRAFT_IDS[paths.tokens[0, i, : paths.lengths[0, i]]].tolist()) for i in range(paths.tokens.shape[1])}
    assert found == sent


def test_draw_inverts_the_running_sum():
    probs = torch.tensor([[0.0, 0.25, 0.75, 0.0], [0.5, 0.0, 0.0, 0.5]])
    rows = torch.tensor([[0, 0, 0, 1, 1]])
    uniform = torch.tensor([[0.0, 0.2499, 0.25, 0.4999, 1 - 2**-53]], dtype=torch.float64)
    assert draw(probs, rows, uniform).tolist() == [[1, 1, 2, 0, 3]]
    # A quarter of the mass lies outside what can be drawn.
    total = torch.tensor([4 / 3, 1.0])
    uniform = torch.tensor([[0.0, 0.7, 0.8, 0.2, 0.9]], dtype=torch.float64)
    assert draw(probs, rows, uniform, total).tolist() == [[1, 2, -1, 0, 3]]


@pytest.mark.parametrize("with_total", [False, True])
def test_draws_of_unequal_numbers_of_rows_are_those_of_one_row_at_a_time(with_total):
    """More rows than one block of running sums has; some are drawn from often, some never."""
    generator = torch.Generator().manual_seed(2)
    probs = torch.rand(9, 40_000, generator=generator).square() * (torch.rand(9, 40_000, generator=generator) < 0.1)
    rows = torch.tensor([[4, 4, 0, 8], [2, 4, 8, 8], [7, 4, 0, 1]])
    uniform = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    uniform[0, 0] = 1.0  # as rounding may put it: on the sum itself
    total = probs.double().sum(-1) * 1.2 if with_total else None
    found = draw(probs, rows, uniform, total)
    for row, number, token in zip(rows.flatten(), uniform.flatten(), found.flatten().tolist(), strict=True):
        sums = probs[row].double().cumsum(-1)
        at = int((sums <= number * (sums[-1] if total is None else total[row])).sum())
        last = int(probs[row].nonzero()[-1])
        assert token == (at if at <= last else -1 if with_total else last)
    assert draw(probs, rows[:0], uniform[:0], total).shape == (0, 4)


def test_an_empty_level_ends_the_trie():
    paths = Paths(torch.tensor([[[4, 0, 0]]]), torch.tensor([[1]]), 0)
    trie = merge(paths, VD)
    assert len(trie) == 1
    setting = make_setting()
    hidden = trace(setting.model, setting.branch(torch.tensor([0])), trie)
    assert hidden.shape == (1, setting.model.config.hidden_size)
    assert oracle(setting.batch, torch.tensor([0]), trie, DRAFT_IDS, setting.view.target).numel() == 0


def test_batches_carry_their_seed(setting):
    assert setting.batch.seed == 7
    assert DraftBatch.pack([[1, 2, 3, 4]], [1], torch.zeros(4, 6)).seed == 0
