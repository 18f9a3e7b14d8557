"""MSD, ViSpec and EAGLE-3 over images: one computation in training, decoding and a plain Llama layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.decoding.tiny import SHAPES, VOCAB, make_prompt, plain, settings
from tests.decoding.tiny import make_target as make_decode_target
from tests.drafters.plain import target_pass
from tests.drafters.test_eagle import random_weights
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from vsdbench.decoding.engine import decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle import EagleModel
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.msd import MsdModel
from vsdbench_drafters.architectures.msd import build as build_msd
from vsdbench_drafters.architectures.one_layer_drafter import Growth
from vsdbench_drafters.architectures.vispec import ViSpecModel
from vsdbench_drafters.architectures.vispec import build as build_vispec
from vsdbench_drafters.objectives.base import DraftBatch, ImageTokens, TargetView, unroll
from vsdbench_drafters.objectives.feature import FeatureRegression
from vsdbench_drafters.objectives.token import ForwardKL
from vsdbench_drafters.training.optim import make_optimisers
from vsdbench_drafters.training.recipe import TrainingConfig

IDS = torch.arange(3, 43)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
IMAGES = ((2, 7), (10, 14))  # of the sequence of 20 tokens, the answer begins at 15
PROMPT_LEN = 15


def vispec(target, num_q=2):
    return ViSpecModel.from_target(target, IDS, seed=0, num_q=num_q)


MAKERS = {
    "eagle3": lambda target: Eagle3Model.from_target(target, IDS, seed=0),
    "msd": lambda target: MsdModel.from_target(target, IDS, seed=0),
    "vispec-1": lambda target: vispec(target, 1),
    "vispec-2": vispec,
    "vispec-4": lambda target: vispec(target, 4),
}


@pytest.fixture(params=MAKERS)
def model(toy_target, request):
    return random_weights(MAKERS[request.param](toy_target))


@pytest.fixture(scope="module")
def sequence(toy_target, toy_sequences):
    """Ids, features, and which tokens are pieces of two images; their embeddings are unlike any word's."""
    ids = toy_sequences[4].ids
    return ids, target_pass(toy_target, [ids])[0].clone(), images_of(len(ids), IMAGES)


def images_of(length, spans, seed=1):
    mask = torch.zeros(length, dtype=torch.bool)
    for first, stop in spans:
        mask[first:stop] = True
    generator = torch.Generator().manual_seed(seed)
    return ImageTokens(mask, torch.randn(int(mask.sum()), 32, generator=generator))


class State:
    def __init__(self, tokens, features, images=None):
        self.tokens, self.features = tokens, features
        length = len(features)
        self.image_mask = self.embeddings = None
        if images is not None:
            self.image_mask = images.mask[:length]
            self.embeddings = torch.full((length, features.shape[1] // 4), 9.0)  # words are looked up, not read here
            self.embeddings[self.image_mask] = images.embeddings[: int(self.image_mask.sum())]

    def last_tokens(self, count):
        return torch.tensor(self.tokens[-count:])


def trained(model, sequence, num_steps, prompt_len=PROMPT_LEN):
    """Normed outputs of the training-time test by slot."""
    ids, features, images = sequence
    batch = DraftBatch.pack([ids], [prompt_len], features, images=images)
    with torch.no_grad():
        outputs = [hidden for _, hidden in unroll(model, batch, num_steps)]
    return {slot: [hidden[row] for hidden in outputs] for row, slot in enumerate(batch.slots.tolist())}


def log_probs(model, hidden):
    return torch.log_softmax(hidden @ model.head().T, dim=-1)


# ---- what is computed ----


def plain_inputs(model, target, sequence, slot):
    """What enters EAGLE's layer up to a slot, its positions, and ``recall`` as a function of a feature: by hand."""
    ids, features, images = sequence
    words, seen = target.embed_tokens.weight, iter(images.embeddings)
    inputs, positions = [], []
    picture, run = torch.zeros(32), []
    for place in range(slot + 1):
        feature = features[place, 96:]
        if images.mask[place + 1]:
            run.append(next(seen))
            last = not images.mask[place + 2]
            if isinstance(model, MsdModel):
                inputs.append(run[-1])
                positions.append(place)
            elif last:
                adaptor, pieces = model.imadpt, torch.stack(run)
                keys, values = adaptor.k_proj(pieces).view(-1, 4, 8), adaptor.v_proj(pieces).view(-1, 4, 8)
                shares = torch.softmax(torch.einsum("qhd,nhd->hqn", adaptor.q, keys) / 8**0.5, dim=-1)
                summary = adaptor.o_proj(torch.einsum("hqn,nhd->qhd", shares, values).flatten(1))
                picture = summary[-1]
                inputs.extend(summary[:-1])
                positions.extend(range(place - len(summary) + 2, place + 1))
            if last:
                run = []
        else:
            inputs.append(fuse(model, words[ids[place + 1]], feature, picture))
            positions.append(place)
    return inputs, positions, picture


def fuse(model, embedding, feature, picture):
    if isinstance(model, ViSpecModel):
        feature = model.img_fc(torch.cat([feature, picture]))
    return model.fc(torch.cat([embedding, feature]))


@pytest.mark.parametrize("name", ["msd", "vispec-1", "vispec-2", "vispec-4"])
@torch.no_grad()
def test_training_is_a_llama_layer_over_what_the_papers_say_enters_it(toy_target, sequence, name):
    model = random_weights(MAKERS[name](toy_target))
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        attn_implementation="eager",
    )  # fmt: skip
    config.rope_parameters = toy_target.config.rope_parameters
    layer = LlamaDecoderLayer(config, 0).eval()
    layer.input_layernorm = torch.nn.Identity()
    layer.load_state_dict(model.layers[0].state_dict())
    ids = sequence[0]
    slot = 15
    inputs, positions, picture = plain_inputs(model, toy_target, sequence, slot)
    found = trained(model, sequence, 3)[slot]
    for step in range(3):
        x, count = torch.stack(inputs)[None], len(inputs)
        places = torch.tensor(positions)[None]
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        out = layer(
            x, attention_mask=mask, position_ids=places, position_embeddings=LlamaRotaryEmbedding(config)(x, places)
        )
        output = (out[0] if isinstance(out, tuple) else out).reshape(count, -1)[-1]
        torch.testing.assert_close(found[step], output, **CLOSE)
        inputs.append(fuse(model, toy_target.embed_tokens.weight[ids[slot + 2 + step]], output, picture))
        positions.append(positions[-1] + 1)


def begun(model, sequence, num_slots):
    ids, features, images = sequence
    drafter = model.drafter(torch.float32)
    drafter.begin(State(ids[: num_slots + 1], features[:num_slots], images), 64)
    drafter.propose(None, TreeShape(kind="chain", budget=1, depth=1, top_k=1), temperature=0, generator=None)
    return drafter


@torch.inference_mode()
@pytest.mark.parametrize("slot", [13, 16])  # the first that can be drafted from, and one behind further text
def test_drafting_computes_what_training_does(model, sequence, slot):
    ids = sequence[0]
    expected = trained(model, sequence, 3)[slot]
    growth = Growth(begun(model, sequence, slot + 1))
    torch.testing.assert_close(growth.root(), log_probs(model, expected[0]), **CLOSE)
    for depth in (1, 2):
        scored = growth.level(torch.tensor([ids[slot + 1 + depth]]), torch.tensor([depth - 2]), depth)
        torch.testing.assert_close(scored[0], log_probs(model, expected[depth]), **CLOSE)


@torch.inference_mode()
def test_slots_committed_after_the_prompt_continue_it(model, sequence):
    """What was decoded behind the prompt stands where training has it, and still knows the image."""
    ids, features, images = sequence
    drafter = begun(model, sequence, 14)
    state = State(ids[:18], features[:18], images)
    drafter.commit(state, 2, features[14:17])
    drafter.propose(None, TreeShape(kind="chain", budget=1, depth=1, top_k=1), temperature=0, generator=None)
    torch.testing.assert_close(Growth(drafter).root(), log_probs(model, trained(model, sequence, 1)[16][0]), **CLOSE)


@torch.inference_mode()
def test_a_drafter_forgets_the_image_of_the_prompt_before(model, sequence):
    ids, features, _ = sequence
    text = State(ids[:15], features[:14])
    shape = TreeShape(kind="chain", budget=2, depth=2, top_k=1)
    used, fresh = begun(model, sequence, 14), model.drafter(torch.float32)
    trees = []
    for drafter in (used, fresh):
        drafter.begin(text, 64)
        trees.append(drafter.propose(None, shape, temperature=0, generator=None))
    assert torch.equal(trees[0].tokens, trees[1].tokens)
    assert torch.equal(trees[0].log_probs, trees[1].log_probs)


@pytest.mark.parametrize(("num_q", "rows"), [(1, 20 - 11 - 1), (2, 20 - 11 + 1), (4, 20 - 11 + 5)])
@torch.inference_mode()
def test_an_image_takes_as_many_rows_as_vectors_stand_for_it(toy_target, sequence, num_q, rows):
    drafter = begun(random_weights(vispec(toy_target, num_q)), sequence, 17)
    assert drafter.num_slots == 17
    assert drafter.num_committed == 17 - 9 + 2 * (num_q - 1) == rows


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_what_is_packed_together_is_what_stands_alone(toy_target, toy_sequences, name):
    """A text between two prompts with images, one of which begins and one of which ends with an image."""
    model = random_weights(MAKERS[name](toy_target))
    chosen = [toy_sequences[i] for i in (4, 2, 0)]
    spans = [IMAGES, (), ((0, 4), (6, 11))]
    images = [images_of(len(s.ids), at, seed) for seed, (s, at) in enumerate(zip(chosen, spans, strict=True))]
    features = target_pass(toy_target, [s.ids for s in chosen])
    together = ImageTokens(torch.cat([i.mask for i in images]), torch.cat([i.embeddings for i in images]))
    prompt_lens = [15, 6, 11]
    batch = DraftBatch.pack([s.ids for s in chosen], prompt_lens, torch.cat(features), images=together)
    assert batch.num_rows == 5 + 9 + 0  # the last prompt ends with an image: no slot there is followed by a word
    expected = []
    for sequence, prompt_len, own, seen in zip(chosen, prompt_lens, features, images, strict=True):
        alone = DraftBatch.pack([sequence.ids], [prompt_len], own, images=seen if len(seen.embeddings) else None)
        if alone.num_rows:
            expected.append([hidden for _, hidden in unroll(model, alone, 2)])
    for step, hidden in unroll(model, batch, 2):
        torch.testing.assert_close(hidden, torch.cat([outputs[step] for outputs in expected]), **CLOSE)


@torch.no_grad()
def test_the_image_matters(model, sequence):
    ids, features, images = sequence
    other = ImageTokens(images.mask, images.embeddings.flip(0) + 1)
    ours, theirs = (trained(model, (ids, features, seen), 1)[14][0] for seen in (images, other))
    assert not torch.allclose(ours, theirs, atol=1e-2)


@torch.no_grad()
def test_without_images_msd_is_eagle_bit_by_bit(toy_target, sequence):
    ids, features, _ = sequence
    eagle, msd = (random_weights(kind.from_target(toy_target, IDS, seed=0)) for kind in (EagleModel, MsdModel))
    ours, theirs = (trained(model, (ids, features, None), 3)[14] for model in (msd, eagle))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- learning ----


def prepared(model, target, sequence):
    ids, features, images = sequence
    batch = DraftBatch.pack([ids], [PROMPT_LEN], features, images=images)
    head = target.model.get_output_embeddings().weight
    return batch, TargetView(features[batch.slots + 1, 96:], head[IDS], model.target_to_draft, head)


@pytest.mark.parametrize("name", MAKERS)
def test_every_weight_learns_from_a_sequence_with_images(toy_target, sequence, name):
    model = random_weights(MAKERS[name](toy_target))
    batch, view = prepared(model, toy_target, sequence)
    objectives = [ForwardKL(ttt_steps=2)]
    if model.predicts_features:
        objectives.append(FeatureRegression(ttt_steps=2))
    for objective in objectives:
        model.zero_grad()
        objective.loss(batch, model, view).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    make_optimisers(model, TrainingConfig()).step(1.0)
    assert all(not torch.equal(before[key], parameter) for key, parameter in model.named_parameters())


# ---- checkpoints ----


@pytest.mark.parametrize(("name", "build"), [("msd", build_msd), ("vispec-4", build_vispec)])
def test_saved_and_loaded_are_the_same(tmp_path, toy_target, name, build):
    model = random_weights(MAKERS[name](toy_target))
    model.save(tmp_path)
    loaded = type(model).load(tmp_path, toy_target)
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert build(toy_target, checkpoint=tmp_path, options={}).name == name.partition("-")[0]


def test_tensor_names_are_those_of_public_checkpoints(toy_target):
    eagle = set(EagleModel.from_target(toy_target, IDS, seed=0).state_dict())
    assert set(MsdModel.from_target(toy_target, IDS, seed=0).state_dict()) == eagle
    own = {"imadpt.q", "imadpt.k_proj.weight", "imadpt.v_proj.weight", "imadpt.o_proj.weight"}
    model = vispec(toy_target, 3)
    assert set(model.state_dict()) == eagle | own | {"img_fc.weight", "img_fc.bias"}
    assert model.imadpt.q.shape == (3, 4, 8)
    assert torch.equal(model.img_fc.weight, torch.eye(32, 64))


def test_a_checkpoint_of_eagle_goes_on_as_msd_and_is_no_vispec(tmp_path, toy_target):
    eagle = random_weights(EagleModel.from_target(toy_target, IDS, seed=0))
    eagle.save(tmp_path)
    loaded = MsdModel.load(tmp_path, toy_target)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in eagle.state_dict().items())
    with pytest.raises(ConfigError, match=r"lacks the tensor 'imadpt\.q', which ViSpec needs"):
        ViSpecModel.load(tmp_path, toy_target)


def test_num_q_is_what_the_tensors_say(tmp_path, toy_target):
    vispec(toy_target, 5).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_q": 5,', ""))
    assert ViSpecModel.load(tmp_path, toy_target).config.num_q == 5


def test_an_image_smaller_than_its_summary_is_refused(toy_target, sequence):
    ids, features, _ = sequence
    small = images_of(len(ids), ((3, 5),))
    model = vispec(toy_target, 4)
    with pytest.raises(ConfigError, match=r"2 visual tokens, too few to be compressed to 3: lower architecture\.num_q"):
        trained(model, (ids, features, small), 1)
    with pytest.raises(ConfigError, match="2 visual tokens"):
        begun(model, (ids, features, small), 14)


# ---- decoding ----


class Showing:
    """Tells a drafter that some tokens of a text prompt are pieces of an image; the engine knows nothing of it."""

    def __init__(self, drafter):
        self.drafter, self.name = drafter, drafter.name
        self.propose, self.commit = drafter.propose, drafter.commit

    def begin(self, state, max_length):
        length = len(state.features)
        state.image_mask = torch.zeros(length, dtype=torch.bool)
        state.image_mask[2:9] = True
        generator = torch.Generator().manual_seed(length)
        state.embeddings = torch.randn(length, 32, generator=generator, dtype=state.features.dtype)
        self.drafter.begin(state, max_length)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["msd", "vispec-2"])
def test_decoding_is_lossless(name, temperature):
    target = make_decode_target("llama")
    ids = torch.arange(2, VOCAB - 4)
    kind = {"msd": MsdModel, "vispec-2": ViSpecModel}[name]
    model = random_weights(kind.from_target(target, ids, seed=0)).to(target.dtype)
    model.frozen_head.copy_(target.model.get_output_embeddings().weight[ids])
    for seed, shape in enumerate(SHAPES):
        chosen = settings(16, temperature=temperature, seed=seed, shape=shape)
        prompt = make_prompt(14, seed)
        found = decode(target, Showing(model.drafter(target.dtype)), prompt, chosen)
        assert found.token_ids == plain(target, prompt, chosen)


def test_attention_to_an_image_is_what_torch_says(toy_target):
    """The adaptor's own product against one written out."""
    adaptor = random_weights(vispec(toy_target, 3)).imadpt
    pieces = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    keys, values = adaptor.k_proj(pieces).view(6, 4, 8), adaptor.v_proj(pieces).view(6, 4, 8)
    heads = [F.softmax(adaptor.q[:, head] @ keys[:, head].T / 8**0.5, dim=-1) @ values[:, head] for head in range(4)]
    torch.testing.assert_close(adaptor(pieces), adaptor.o_proj(torch.cat(heads, dim=-1)))
