"""All four rules as the engine asks for them: by sampling, token for token, at the edges, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.decoding.enumeration import Topology, paths_of
from tests.decoding.tiny import verify

from vsdbench.decoding.interfaces import TokenTree
from vsdbench.decoding.sampling import SamplingParams, coupled_token, target_probs, target_scores
from vsdbench.errors import ConfigError

# --- the real thing, by sampling ------------------------------------------------------------------------------------


class Markov:
    """A target and a drafter over 50 tokens, each a table from the last token to logits."""

    def __init__(self, seed: int, vocab: int = 50) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = 1.5 * torch.randn(vocab, vocab, generator=generator)
        self.draft = (0.7 * self.logits + 0.7 * torch.randn(vocab, vocab, generator=generator)).softmax(-1)

    def tree(self, root: int, parents: Topology, generator: torch.Generator | None) -> TokenTree:
        """Children drawn without replacement, in the order of drawing, or the top-ranked ones without a generator."""
        tokens, last = [0] * len(parents), [root] * (len(parents) + 1)
        draft = torch.zeros(len(parents) + 1, self.draft.shape[1])
        for row in sorted({parent + 1 for parent in parents}):
            nodes = [node for node, parent in enumerate(parents) if parent + 1 == row]
            draft[row] = self.draft[last[row]]
            if generator is None:
                ranked = draft[row].topk(len(nodes)).indices
            else:
                ranked = draft[row].multinomial(len(nodes), generator=generator)
            for node, token in zip(nodes, ranked.tolist(), strict=True):
                tokens[node], last[node + 1] = token, token
        depths = [len(path) for path in paths_of(parents, tuple(tokens))[1:]]
        drawn = None if generator is None else draft
        return TokenTree(torch.tensor(tokens, dtype=torch.int64), parents, depths, torch.zeros(len(parents)), drawn)

    def over(self, root: int, tree: TokenTree) -> torch.Tensor:
        return self.logits[torch.cat([torch.tensor([root]), tree.tokens])]


def chi_square(tokens: list[int], probs: np.ndarray) -> float:
    """p-value of ``tokens`` against ``probs``, cells of fewer than 5 expected pooled."""
    counts, expected = np.bincount(tokens, minlength=len(probs)), len(tokens) * probs
    assert counts[expected == 0].sum() == 0
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] < 1e-9:
        counts, expected = counts[:-1], expected[:-1]
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def sampled_tokens(rule: str, params: SamplingParams, *, drawn: bool, told: bool = True) -> tuple[list[int], list[int]]:
    """First and second tokens of many decodes; ``told=False`` hides the temperature from the verification."""
    world, generator = Markov(0), torch.Generator().manual_seed(1)
    first, second = [], []
    for seed in range(1500):
        tree = world.tree(3, (-1, -1, 0, 0, 1), generator if drawn else None)
        used = params if told else SamplingParams(temperature=1.0)
        out, start = [], 3
        while len(out) < 2:
            verdict = verify(
                rule, tree, world.over(start, tree), params=used, seed=seed, position=len(out), generator=generator
            )
            out += [*tree.tokens[verdict.path].tolist(), verdict.next_token]
            start, tree = out[-1], world.tree(out[-1], (), None)
        first.append(out[0])
        second.append(out[1])
    return first, second


def expected_marginals(params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    table = target_probs(Markov(0).logits.double(), params).numpy()
    return table[3], table[3] @ table


CHI_SQUARE_CASES = [
    ("coupled", SamplingParams(temperature=1.0), True),
    ("coupled", SamplingParams(temperature=1.3, top_p=0.9), False),
    ("rejection", SamplingParams(temperature=0.5), True),
    ("rejection", SamplingParams(temperature=1.3, top_p=0.9), True),
    ("rejection", SamplingParams(temperature=1.0), False),
    ("traversal", SamplingParams(temperature=0.5), True),
    ("traversal", SamplingParams(temperature=1.0), True),
    ("traversal", SamplingParams(temperature=1.3, top_p=0.9), True),
    ("traversal", SamplingParams(temperature=1.3), False),
]


@pytest.mark.parametrize(("rule", "params", "drawn"), CHI_SQUARE_CASES, ids=str)
def test_sampled_tokens_follow_the_target(rule, params, drawn):
    for tokens, probs in zip(sampled_tokens(rule, params, drawn=drawn), expected_marginals(params), strict=True):
        assert chi_square(tokens, probs) > 1e-3


@pytest.mark.parametrize("rule", ["coupled", "rejection", "traversal"])
def test_control_the_chi_square_notices_a_forgotten_temperature(rule):
    params = SamplingParams(temperature=0.7)
    tokens, _ = sampled_tokens(rule, params, drawn=True, told=False)
    assert chi_square(tokens, expected_marginals(params)[0]) < 1e-3


# --- greedy and coupled: token for token ----------------------------------------------------------------------------


def decode(world: Markov, rule: str, params: SamplingParams, parents: Topology, seed: int, length: int) -> list[int]:
    tokens, generator = [7], torch.Generator().manual_seed(seed)
    while len(tokens) < length:
        tree = world.tree(tokens[-1], parents, generator if seed % 2 else None)
        logits = world.over(tokens[-1], tree)
        verdict = verify(rule, tree, logits, params=params, seed=seed, position=len(tokens), generator=generator)
        tokens += [*tree.tokens[verdict.path].tolist(), verdict.next_token]
    return tokens[:length]


@pytest.mark.parametrize("parents", [(-1, 0, 1), (-1, -1, -1, 0, 0, 1, 3), (-1, -1, -1, -1, -1)], ids=str)
@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("greedy", SamplingParams()),
        ("coupled", SamplingParams(temperature=0.8)),
        ("coupled", SamplingParams(temperature=1.2, top_k=30, top_p=0.95)),
    ],
    ids=str,
)
def test_a_tree_never_changes_a_token(rule, params, parents):
    world = Markov(2)
    for seed in range(12):
        plain = decode(world, rule, params, (), seed, 30)
        assert decode(world, rule, params, parents, seed, 30) == plain


def test_plain_coupled_decoding_is_the_keyed_draw_at_its_position():
    world, params = Markov(2), SamplingParams(temperature=0.8)
    tokens = decode(world, "coupled", params, (), 5, 20)
    for position in range(1, 20):
        assert tokens[position] == coupled_token(target_scores(world.logits[tokens[position - 1]], params), 5, position)
    assert tokens != decode(world, "coupled", params, (), 6, 20)


def test_rejection_does_change_tokens():
    # So the equality above is a property of the coupling, not of a world too easy to tell decodings apart.
    world, params = Markov(2), SamplingParams(temperature=0.8)
    assert decode(world, "rejection", params, (), 5, 20) != decode(world, "rejection", params, (-1, 0), 5, 20)


# --- whole and empty paths ------------------------------------------------------------------------------------------


def run(rule: str, tree: TokenTree, logits: torch.Tensor, params: SamplingParams, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return verify(rule, tree, logits, params=params, seed=seed, position=1, generator=generator)


def params_of(rule: str) -> SamplingParams:
    return SamplingParams() if rule == "greedy" else SamplingParams(temperature=0.9)


ALL_RULES = ["greedy", "coupled", "rejection", "traversal"]


def chain(tokens: list[int]) -> TokenTree:
    size = len(tokens)
    return TokenTree(torch.tensor(tokens, dtype=torch.int64), range(-1, size - 1), range(1, size + 1), torch.ones(size))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_targets_own_choices_are_accepted_whole(rule):
    world, params = Markov(4), params_of(rule)
    for seed in range(5):
        if rule == "coupled":
            future = decode(world, rule, params, (), seed, 6)
            logits = world.logits[[7, *future[1:5]]]
            expected = future[5]
        else:
            future = decode(world, "greedy", SamplingParams(), (), 0, 6)
            logits = world.logits[[7, *future[1:5]]].clone()
            if rule != "greedy":  # a target that is certain
                logits.scatter_add_(1, torch.tensor(future[1:6])[:, None], torch.full((5, 1), 1e4))
            expected = future[5]
        verdict = run(rule, chain(future[1:5]), logits, params, seed)
        assert (verdict.path, verdict.next_token) == ([0, 1, 2, 3], expected)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_an_empty_tree_is_one_plain_step(rule):
    world, params = Markov(4), params_of(rule)
    verdict = run(rule, chain([]), world.logits[[7]], params)
    assert verdict.path == []
    if rule == "greedy":
        assert verdict.next_token == int(world.logits[7].argmax())
    if rule == "coupled":
        assert verdict.next_token == coupled_token(target_scores(world.logits[7], params), 0, 1)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("drawn", [True, False])
def test_a_tree_the_target_excludes_is_refused_whole(rule, drawn):
    world = Markov(4)
    wrong = [3, 4, 5]
    tree = TokenTree(torch.tensor(wrong), [-1, -1, 0], [1, 1, 2], torch.zeros(3), torch.ones(4, 50) if drawn else None)
    logits = world.logits[[7, *wrong]].clone()
    logits[:, wrong] = -torch.inf
    for seed in range(20):
        verdict = run(rule, tree, logits, params_of(rule), seed)
        assert verdict.path == []
        assert verdict.next_token not in wrong


# --- properties and errors ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(["coupled", "rejection", "traversal"]),
    drawn=st.booleans(),
    parents=st.lists(st.integers(0, 10**6), max_size=9),
    seed=st.integers(-(2**40), 2**70),
    temperature=st.floats(0.05, 5),
    top_p=st.none() | st.floats(0.01, 1),
    top_k=st.none() | st.integers(1, 60),
)
def test_the_path_is_a_chain_from_the_root_and_the_next_token_is_possible(
    rule, drawn, parents, seed, temperature, top_p, top_k
):
    parents = tuple(value % (node + 1) - 1 for node, value in enumerate(parents))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    world, generator = Markov(8), torch.Generator().manual_seed(seed % 2**63)
    tree = world.tree(0, parents, generator if drawn else None)
    logits = world.over(0, tree)
    before = logits.clone()
    verdict = verify(rule, tree, logits, params=params, seed=seed, position=3, generator=generator)
    assert [parents[node] for node in verdict.path] == [-1, *verdict.path][: len(verdict.path)]
    row = verdict.path[-1] + 1 if verdict.path else 0
    assert target_probs(logits[row], params)[verdict.next_token] > 0
    for node in verdict.path:
        assert target_probs(logits[parents[node] + 1], params)[tree.tokens[node]] > 0
    assert torch.equal(before, logits)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_generator_gives_one_number_a_row_or_none(rule):
    world, used, fresh = Markov(4), torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    tree = world.tree(7, (-1, -1, 0), None)
    verify(rule, tree, world.over(7, tree), params=params_of(rule), seed=0, position=0, generator=used)
    if rule in {"rejection", "traversal"}:
        torch.rand(4, generator=fresh, dtype=torch.float64)
    assert torch.equal(used.get_state(), fresh.get_state())


def test_half_precision_logits_are_used_as_float32():
    world, params = Markov(4), SamplingParams(temperature=0.9)
    for rule, seed in itertools.product(["coupled", "rejection", "traversal"], range(10)):
        tree = world.tree(7, (-1, -1, 0), torch.Generator().manual_seed(seed))
        half = world.over(7, tree).bfloat16()
        assert run(rule, tree, half, params, seed) == run(rule, tree, half.float(), params, seed)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_rule_at_the_wrong_temperature_is_refused(rule):
    wrong = SamplingParams(temperature=1.0) if rule == "greedy" else SamplingParams()
    with pytest.raises(ConfigError, match=f"'{rule}' is not lossless at temperature {wrong.temperature}"):
        run(rule, chain([]), torch.zeros(1, 5), wrong)


def test_wrong_input_is_refused_with_its_value():
    with pytest.raises(ConfigError, match=r"'coupling' does not exist. Did you mean 'coupled'\?"):
        run("coupling", chain([]), torch.zeros(1, 5), SamplingParams())
    with pytest.raises(ValueError, match="3 rows for a tree of 1 nodes"):
        run("greedy", chain([2]), torch.zeros(3, 5), SamplingParams())
    for rule in ["greedy", "coupled", "rejection", "traversal"]:
        with pytest.raises(ConfigError, match="nan: the target's logits are not numbers"):
            run(rule, chain([2]), torch.full((2, 5), torch.nan), SamplingParams(temperature=float(rule != "greedy")))
