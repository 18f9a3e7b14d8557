"""Training on prompts with images: answers, features and the target's judgement are those of plain decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models.tiny_vision import SPECIAL, make_target

from vsdbench.config import content_hash
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models.branching import Branches, branch_states, branch_states_behind, counts_tokens
from vsdbench.models.image_prompt import ImagePrompt, followed_by
from vsdbench_drafters.architectures.msd import MsdModel
from vsdbench_drafters.architectures.trainable import load_model
from vsdbench_drafters.training.data import DataConfig, data_key, ensure_data
from vsdbench_drafters.training.feature_files import cached_features
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures, run_target
from vsdbench_drafters.training.prompts import Article, PromptSource
from vsdbench_drafters.training.recipe import load_recipe
from vsdbench_drafters.training.scenes import SceneSource
from vsdbench_drafters.training.train import train

RECIPES = Path(__file__).parents[2] / "drafters" / "recipes"
PLACEHOLDERS = {"llava": "<image>", "qwen2-vl": "<|image_pad|>"}
ARTICLES = [Article(f"Topic{i:03d}", f"It was found in {1000 + i}.") for i in range(60)]
CONFIG = DataConfig(
    source="scenes", num_tokens=60, max_new_tokens=10, slots=3, num_heldout=2, text_share=0.3, loop_repeats=0
)


@pytest.fixture(scope="module")
def targets():
    """Positions behind an image are the tokens' numbers, or (M-RoPE) are not."""
    return {family: make_target(family, dtype=torch.float32) for family in PLACEHOLDERS}


@pytest.fixture(params=PLACEHOLDERS)
def target(request, targets):
    return targets[request.param]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(cache))


def make(target, **changes):
    return ensure_data(
        CONFIG.model_copy(update=changes), replace_fingerprint(target), articles=ARTICLES, excluded=frozenset()
    )


def replace_fingerprint(target):
    target.fingerprint = target.name
    return target


# ---- prompts ----


def test_a_prompt_depends_on_its_index_and_split_alone():
    source, again = (SceneSource(seed=0, split="train") for _ in range(2))
    first, second = source[7].messages[0], again[7].messages[0]
    assert first["content"] == second["content"]
    assert first["images"][0].tobytes() == second["images"][0].tobytes()
    others = [SceneSource(seed=0, split="heldout")[7], SceneSource(seed=1, split="train")[7], source[8]]
    assert len({prompt.messages[0]["images"][0].tobytes() for prompt in (source[7], *others)}) == 4
    assert {source[i].category for i in range(40)} == {"caption", "attribute", "counting", "reading"}


def test_a_share_of_the_prompts_is_text():
    text = PromptSource(ARTICLES, seed=0, split="train")
    source = SceneSource(seed=0, split="train", text=text, text_share=0.3)
    shown = [source.shows_image(i) for i in range(400)]
    assert 0.6 < sum(shown) / 400 < 0.8
    assert all(("images" in source[i].messages[0]) == shown[i] for i in range(20))
    assert source[shown.index(False)] == text[shown.index(False)]


def test_what_text_data_and_recipes_are_known_by_has_not_changed():
    """Drafters that are in somebody's cache stay there: images have added nothing to what texts are hashed by."""

    class Known:
        fingerprint, template_hash, dtype = "f", "t", torch.float32

    recipe = load_recipe(RECIPES / "eagle3-kl-quickstart.yaml")
    assert content_hash(recipe.content()) == "d379f037c1f38b52"
    assert data_key(recipe.data, Known()) == "e21910009bc24904"
    assert data_key(CONFIG, Known()) != data_key(CONFIG.model_copy(update={"text_share": 0.0}), Known())


def test_text_has_no_share_of_images():
    with pytest.raises(ValueError, match=r"text_share is 0.5, but source 'wiki' has text alone"):
        DataConfig(text_share=0.5)


# ---- answers ----


def test_answers_are_those_of_plain_decoding(target):
    made = make(target, temperatures=(0.0,))
    assert made.num_response_tokens >= CONFIG.num_tokens
    seen = 0
    for sequence in (*made.sequences, *made.heldout):
        prompt = sequence.shown(sequence.prompt_len)
        seen += isinstance(prompt, ImagePrompt)
        wanted = decode(target, Autoregressive(), prompt, DecodeSettings(max_new_tokens=10))
        assert sequence.ids[sequence.prompt_len :].tolist() == wanted.token_ids
        assert list(sequence.shown()) == sequence.ids.tolist()
    assert 2 < seen < len(made.sequences) + 2
    again = make(target, temperatures=(0.0,))
    assert again.fingerprint == made.fingerprint
    assert again.sequences[:2][1].ids.tolist() == made.sequences[1].ids.tolist()


def test_data_of_another_processor_is_refused(target):
    made = make(target)
    sequence = next(s for s in made.sequences if s.encode is not None)
    other = replace(sequence, encode=lambda: followed_by(sequence.encode(), [5]))
    with pytest.raises(ConfigError, match="chat template or image processor has changed"):
        other.shown()


# ---- features ----


@torch.no_grad()
def test_features_are_the_models_own_hidden_states(target):
    made = make(target)
    placeholder = SPECIAL.index(PLACEHOLDERS[target.name])  # a random model may well say one
    mixed = [s for s in made.sequences if s.encode is not None and placeholder not in s.ids[s.prompt_len :]][:2]
    mixed.append(next(s for s in made.sequences if s.encode is None))
    found = run_target(target, [mixed[0].shown(), mixed[2].shown(), mixed[1].shown()], keys=False)
    assert [one.images is None for one in found] == [False, True, False]
    for one, sequence in zip(found, (mixed[0], mixed[2], mixed[1]), strict=True):
        shown = sequence.shown()
        inputs = shown.inputs_for(len(shown)) if isinstance(shown, ImagePrompt) else {}
        ids = torch.tensor(list(shown))[None]
        output = target.model(input_ids=ids, output_hidden_states=True, **inputs)
        states = output.hidden_states
        wanted = torch.cat([states[layer][0] for layer in target.feature_layers] + [states[-1][0]], dim=-1)
        torch.testing.assert_close(one.states, wanted, rtol=1e-4, atol=1e-4)
        if one.images is not None:
            torch.testing.assert_close(one.images.embeddings, states[0][0][one.images.mask])
            words = target.embed_tokens(ids)[0]
            assert torch.equal(states[0][0][~one.images.mask], words[~one.images.mask])


def test_kept_features_are_those_of_every_batch(target, tmp_path):
    sequences = make(target).sequences
    online = OnlineFeatures(target, sequences, keys=True)
    kept = cached_features(target, sequences, tmp_path, fingerprint="x", keys=True, images=True)
    indices = [3, 0, 1, 2]
    ours, theirs = kept.read(indices), online.read(indices)
    # But for rounding: batches of other sizes may be multiplied by other kernels.
    torch.testing.assert_close(ours.states, theirs.states)
    assert torch.equal(ours.images.mask, theirs.images.mask)
    assert torch.equal(ours.images.embeddings, theirs.images.embeddings)
    for a, b in zip(ours.keys, theirs.keys, strict=True):
        torch.testing.assert_close(a, b)
    text = [i for i, sequence in enumerate(sequences) if sequence.encode is None]
    assert kept.read(text[:1]).images is None


# ---- the oracle ----


def drafted(length):
    """Branches at two places of a sequence, one of them with a fork."""
    tokens = torch.tensor([40, 41, 42, 43])
    roots = torch.tensor([length - 4, length - 4, length - 4, length - 1])
    lineage = torch.tensor([[0, -1], [0, 1], [0, 2], [3, -1]])
    return Branches(tokens, roots, lineage)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "smolvlm"])
@torch.inference_mode()
def test_the_target_judges_drafts_as_if_they_were_its_text(family):
    target = make_target(family)
    image = SceneSource(seed=0, split="train")[0].messages
    prompt = followed_by(target.encode_chat(image), [30, 31, 32, 33, 34])
    branches = drafted(len(prompt))
    found = branch_states_behind(target, prompt, branches)
    head = followed_by(target.encode_chat(image), [30, 31])  # up to the first root
    paths = [(head, [40]), (head, [40, 41]), (head, [40, 42]), (prompt, [43])]
    for row, (start, path) in enumerate(paths):
        shown = followed_by(start, path)
        wanted = target.prefill(shown, len(shown)).features[-1, -target.hidden_size :]
        torch.testing.assert_close(found[row], wanted)
    if counts_tokens(target):
        keys = run_target(target, [prompt], keys=True)[0].keys[0]
        torch.testing.assert_close(branch_states(target, torch.tensor(list(prompt)), branches, keys), found)


def test_objectives_ask_about_sequences_with_images(target):
    sequences = make(target).sequences
    model = MsdModel.from_target(target, torch.arange(20, 120), seed=0)
    head = target.model.get_output_embeddings().weight
    at = [next(i for i, s in enumerate(sequences) if (s.encode is None) == text) for text in (True, False)]
    found = []
    for keys in {False, counts_tokens(target)}:
        maker = BatchMaker(sequences, OnlineFeatures(target, sequences, keys=keys), head, model, target)
        batch, view = maker.make(at)
        spans = [(span.start, batch.tokens[span.start : span.start + span.length]) for span in batch.spans]
        found.append(torch.cat([view.target.branch_states(s, ids, drafted(len(ids))) for s, ids in spans]))
        assert maker.num_forwards == 4
    torch.testing.assert_close(found[0], found[-1], rtol=1e-4, atol=1e-4)


# ---- training ----

RECIPE = """
name: tiny
target: toy
architecture: {ARCHITECTURE}
objective: {OBJECTIVE}
data: {source: scenes, num_tokens: 60, num_heldout: 2, max_new_tokens: 10, slots: 3, temperatures: [0.0]}
training: {batch_tokens: 30, autocast: false, features: FEATURES}
evaluation: {prompts: 1, max_new_tokens: 6, times: 1, tree: {budget: 3, depth: 2, top_k: 2}}
"""
VSD = "type: vsd, ttt_steps: 2, options: {anchors: 2, paths: 2, depth: 2}"
SIZE = "draft_vocab_size: 100"


@pytest.mark.parametrize(
    ("family", "architecture", "objective", "features"),
    [
        ("llava", SIZE, "type: kl, ttt_steps: 2", "cached"),
        ("qwen2-vl", SIZE, VSD, "cached"),
        ("llava", f"type: msd, {SIZE}", VSD, "online"),
        ("qwen2-vl", f"type: vispec, num_q: 3, {SIZE}", VSD, "online"),
        ("llava", f"type: vispec, {SIZE}", "type: feature", "cached"),
    ],
)
def test_a_recipe_trains_on_images_a_drafter_that_decodes_losslessly(
    tmp_path, targets, family, architecture, objective, features
):
    target = targets[family]
    path = tmp_path / "tiny.yaml"
    text = RECIPE.replace("ARCHITECTURE", architecture).replace("OBJECTIVE", objective).replace("FEATURES", features)
    path.write_text(text)
    trained = train(path, target=replace_fingerprint(target))
    assert trained.tokens >= 60
    assert trained.heldout["tau"] >= 1
    recipe = load_recipe(path)
    drafter = load_model(recipe.architecture, trained.path, target).drafter(torch.float32)
    prompt = target.encode_chat(SceneSource(seed=0, split="heldout")[5].messages)
    shape = TreeShape(kind="dynamic", budget=6, depth=2, top_k=3)
    found = decode(target, drafter, prompt, DecodeSettings(max_new_tokens=12, shape=shape))
    wanted = decode(target, Autoregressive(), prompt, DecodeSettings(max_new_tokens=12))
    assert found.token_ids == wanted.token_ids
