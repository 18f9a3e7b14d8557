"""A draft model: its scores are its own plain forward's, and it never changes an answer or a distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import chisquare
from tests.decoding.tiny import SHAPES, VOCAB, make_model, make_prompt, make_target, plain, settings
from tests.models.tiny_vision import make_image
from tests.models.tiny_vision import make_target as make_vision_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vsdbench.decoding.engine import decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models.target import Target
from vsdbench_drafters.architectures.draft_model import DraftModelDrafter, build

PROMPT = make_prompt(11, seed=5)
KINDS = [pytest.param(shape, id=shape.kind) for shape in SHAPES]


def make_drafter(which, target):
    """Another tiny model, or the target itself cut after three of its four layers."""
    model = make_target("qwen3", num_hidden_layers=2, seed=9) if which == "other" else make_target(target.name)
    if which == "cut":
        model.keep_layers(3)
    return DraftModelDrafter(model, target.vocab_size)


@pytest.mark.parametrize("which", ["other", "cut", "same"])
@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lossless(which, shape, temperature):
    target = make_target()
    drafter = make_drafter(which, target)
    for seed in range(3):
        prompt = make_prompt(9 + seed, seed)
        chosen = settings(24, temperature=temperature, seed=seed, shape=shape)
        generation = decode(target, drafter, prompt, chosen)
        assert generation.token_ids == plain(target, prompt, chosen)
        if which == "same" and temperature == 0 and shape.kind == "chain":  # a perfect drafter, no tie in sight
            assert {step.num_emitted for step in generation.steps[:-1]} == {shape.depth + 1}


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
@pytest.mark.parametrize("shape", KINDS)
def test_scores_are_those_of_a_plain_forward_in_every_step(family, shape):
    """Each node's log-probability is recomputed by a whole forward of the draft model over its path."""
    target, drafter = make_target(), DraftModelDrafter(make_target(family, seed=4), VOCAB)
    model = make_model(family, seed=4).eval()
    checked = []

    class Watched(DraftModelDrafter):
        def propose(self, state, shape, *, temperature, generator):
            tree = super().propose(state, shape, temperature=temperature, generator=generator)
            for node in range(len(tree)):
                path, above = [], tree.parents[node]
                while above >= 0:
                    path.insert(0, int(tree.tokens[above]))
                    above = tree.parents[above]
                logits = model(torch.tensor([[*state.tokens, *path]])).logits[0, -1].float()
                expected = torch.log_softmax(logits, dim=-1)[tree.tokens[node]]
                assert float(tree.log_probs[node]) == pytest.approx(float(expected), abs=1e-4)
                checked.append(node)
            return tree

    watched = Watched(drafter.model, VOCAB)
    decode(target, watched, PROMPT, settings(8, shape=shape))
    assert len(checked) > 10


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
@pytest.mark.parametrize("kind", ["static", "sampled"])
def test_two_tokens_have_the_targets_exact_distribution(rule, kind):
    vocab, total, prompt = 12, 1000, [3, 1, 4]
    # Flat enough for every pair of tokens to be expected, and unlike the drafter.
    target = make_target(vocab_size=vocab, num_hidden_layers=1, spread=0.18)
    draft = make_target(vocab_size=vocab, num_hidden_layers=1, spread=0.18, seed=5)
    drafter = DraftModelDrafter(draft, vocab)
    shape = TreeShape(kind=kind, budget=3, depth=2, top_k=2)
    counts = torch.zeros(vocab, vocab)
    for seed in range(total):
        chosen = settings(3, temperature=1.0, rule=rule, seed=seed, shape=shape)
        tokens = decode(target, drafter, prompt, chosen).token_ids
        counts[tokens[1], tokens[2]] += 1
    model = make_model(vocab_size=vocab, num_hidden_layers=1, spread=0.18).eval()

    def next_probs(prefixes):
        with torch.no_grad():
            return torch.softmax(model(torch.tensor(prefixes)).logits[:, -1], dim=-1)

    first = next_probs([prompt])[0]
    second = next_probs([[*prompt, a] for a in range(vocab)])
    third = next_probs([[*prompt, a, b] for a, b in itertools.product(range(vocab), repeat=2)])
    expected = torch.einsum("a,ab,abc->bc", first, second, third.view(vocab, vocab, vocab)).flatten() * total
    assert float(expected.sum()) == pytest.approx(total)
    observed, rare = counts.flatten().double(), expected < 5
    pooled_observed = [*observed[~rare].tolist(), float(observed[rare].sum())]
    pooled_expected = [*expected[~rare].tolist(), float(expected[rare].sum())]
    if pooled_expected[-1] < 5:
        pooled_observed[-2:] = [sum(pooled_observed[-2:])]
        pooled_expected[-2:] = [sum(pooled_expected[-2:])]
    assert len(pooled_expected) > 15
    assert chisquare(pooled_observed, pooled_expected).pvalue > 1e-3


def test_a_wider_draft_vocabulary_is_cut_to_the_targets():
    target = make_target()
    drafter = DraftModelDrafter(make_target(vocab_size=VOCAB + 16, seed=2), VOCAB)
    for shape in SHAPES:
        chosen = settings(16, temperature=1.0, shape=shape)
        assert decode(target, drafter, PROMPT, chosen).token_ids == plain(target, PROMPT, chosen)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_it_is_shown_the_images_if_it_reads_any(family):
    target, itself = (make_vision_target(family, dtype=torch.float32) for _ in range(2))
    prompt = target.encode_chat([{"role": "user", "content": "What?", "images": [make_image(1), make_image(2)]}])
    shape = TreeShape(kind="chain", budget=3, depth=3, top_k=1)
    chosen = settings(17, shape=shape)
    reference = plain(target, prompt, chosen)
    generation = decode(target, DraftModelDrafter(itself, target.vocab_size), prompt, chosen)
    assert generation.token_ids == reference
    assert [step.num_accepted for step in generation.steps] == [3] * 4  # it agrees with itself to the last token
    blind = decode(target, DraftModelDrafter(itself, target.vocab_size), list(prompt), chosen)
    assert blind.token_ids != reference
    text = make_target(vocab_size=target.vocab_size)
    assert decode(target, DraftModelDrafter(text, target.vocab_size), prompt, chosen).token_ids == reference


def test_sequences_do_not_depend_on_earlier_ones():
    target = make_target()
    used, fresh = make_drafter("other", target), make_drafter("other", target)
    chosen = settings(16, shape=SHAPES[2])
    decode(target, used, make_prompt(30, seed=8), settings(40, shape=SHAPES[2]))
    first, second = (decode(target, drafter, PROMPT, chosen) for drafter in (used, fresh))
    assert [step.num_accepted for step in first.steps] == [step.num_accepted for step in second.steps]


class _Vocabulary:
    eos_token_id = None
    chat_template = None

    def __init__(self, size):
        self._size = size

    def get_vocab(self):
        return {str(token): token for token in range(self._size)}


@pytest.fixture
def loadable(monkeypatch):
    """Let ``build`` find a tiny model under any name; its vocabulary is the size that the name says, if it does."""
    from types import SimpleNamespace

    from vsdbench.models.target import Target

    def load(path, *, name, **_):
        target = make_target()
        target.tokenizer = _Vocabulary(int(name) if name.isdigit() else VOCAB)
        return target

    monkeypatch.setattr(
        "vsdbench.models.draft_model.fetch_model", lambda name: SimpleNamespace(path=name, fingerprint="0")
    )
    monkeypatch.setattr(Target, "load", staticmethod(load))
    target = make_target()
    target.tokenizer = _Vocabulary(VOCAB)
    return target


def test_build(loadable, tmp_path):
    drafter = build(loadable, checkpoint=None, options={"model": "any", "num_layers": 2})
    assert drafter.model.num_layers == 2
    assert build(loadable, checkpoint=tmp_path, options={}).model.num_layers == 4
    with pytest.raises(ConfigError, match="draft_model has no option 'layers'"):
        build(loadable, checkpoint=None, options={"model": "any", "layers": 2})
    with pytest.raises(ConfigError, match="needs the option 'model'"):
        build(loadable, checkpoint=None, options={})
    with pytest.raises(ConfigError, match="'7' has another vocabulary than 'llama'"):
        build(loadable, checkpoint=None, options={"model": "7"})


@pytest.mark.parametrize(
    ("value", "message"), [(0, "is 0"), (5, "is 5"), ("two", "is 'two'"), (1.5, r"is 1\.5"), (True, "is True")]
)
def test_an_impossible_number_of_layers_is_refused(loadable, value, message):
    with pytest.raises(ConfigError, match=f"num_layers {message}"):
        build(loadable, checkpoint=None, options={"model": "any", "num_layers": value})


def test_a_model_folder_is_loaded_and_cut(tmp_path, monkeypatch):
    """Nothing replaced: a folder on disk with its tokenizer, whole and after one layer."""
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    make_model(seed=3).save_pretrained(tmp_path / "draft")
    tokenizer.save_pretrained(tmp_path / "draft")
    target = Target(make_model(), tokenizer, name="toy", fingerprint="0" * 16)
    whole = build(target, checkpoint=None, options={"model": str(tmp_path / "draft")})
    cut = build(target, checkpoint=tmp_path / "draft", options={"num_layers": 1})
    assert (whole.model.num_layers, cut.model.num_layers) == (4, 1)
    assert whole.model.dtype == target.dtype
    for drafter in (whole, cut):
        assert decode(target, drafter, PROMPT, settings(12)).token_ids == plain(target, PROMPT, settings(12))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("shape", KINDS)
def test_greedy_decoding_is_lossless_on_a_gpu(shape):
    target = make_target(device="cuda", dtype=torch.float32)
    drafter = DraftModelDrafter(make_target(device="cuda", dtype=torch.float32, seed=3), VOCAB)
    for seed in range(3):
        prompt, chosen = make_prompt(9, seed), settings(24, shape=shape)
        assert decode(target, drafter, prompt, chosen).token_ids == plain(target, prompt, chosen)
