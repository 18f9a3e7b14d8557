"""EAGLE-1/2: training computes what a plain Llama layer does, decoding what training does, checkpoints mean it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.drafters.conftest import make_target
from tests.drafters.plain import forward_kl, target_pass
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle import EagleConfig, EagleModel, build
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.one_layer_drafter import Growth
from vsdbench_drafters.objectives.base import DraftBatch, unroll
from vsdbench_drafters.objectives.feature import FeatureRegression, smooth_l1
from vsdbench_drafters.objectives.token import CrossEntropy, ForwardKL
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures

TENSORS = {
    "fc.weight", "fc.bias", "d2t", "t2d", "layers.0.post_attention_layernorm.weight",
    "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight",
    "layers.0.self_attn.o_proj.weight", "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
}  # fmt: skip
IDS = torch.arange(3, 43)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def random_weights(model, seed=1):
    """Every weight random, so that nothing in the forward is masked by a zero or an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset, scale = (1.0, 0.3) if "layernorm" in name else (0.0, 0.2)
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def model(toy_target):
    return random_weights(EagleModel.from_target(toy_target, IDS, seed=0))


class State:
    def __init__(self, tokens, features):
        self.tokens, self.features = tokens, features


@pytest.fixture
def sequence(toy_target, toy_sequences):
    ids = toy_sequences[4].ids
    return ids, target_pass(toy_target, [ids])[0]


def trained(model, ids, features, num_steps):
    """Outputs of the training-time test at every slot."""
    with torch.no_grad():
        return [hidden for _, hidden in unroll(model, DraftBatch.pack([ids], [2], features), num_steps)]


def log_probs(model, hidden):
    return torch.log_softmax(hidden @ model.head().T, dim=-1)


def plain_chain(model, target, ids, features, slot, num_steps):
    """Predicted features by transformers' own Llama layer without its input norm, over the whole chain at once."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        attn_implementation="eager",
    )  # fmt: skip
    config.rope_parameters = target.config.rope_parameters
    layer = LlamaDecoderLayer(config, 0).eval()
    layer.input_layernorm = torch.nn.Identity()
    layer.load_state_dict(model.layers[0].state_dict())
    known = list(features[: slot + 1, 96:])
    outputs = []
    for step in range(num_steps):
        count = slot + 1 + step
        embedded = target.embed_tokens.weight[torch.tensor(ids[1 : count + 1])]
        x = model.fc(torch.cat([embedded, torch.stack(known)], dim=-1))[None]
        positions = torch.arange(count)[None]
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        rope = LlamaRotaryEmbedding(config)(x, positions)
        out = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        outputs.append((out[0] if isinstance(out, tuple) else out).reshape(count, -1)[-1])
        known.append(outputs[-1])
    return outputs


@pytest.mark.parametrize("slot", [0, 3, 9])
@torch.no_grad()
def test_training_time_test_is_a_llama_layer_run_step_by_step(toy_target, model, sequence, slot):
    ids, features = sequence
    assert model.config.rms_norm_eps == 1e-6
    expected = plain_chain(model, toy_target, ids, features, slot, 4)
    for found, wanted in zip(trained(model, ids, features, 4), expected, strict=True):
        torch.testing.assert_close(found[slot], wanted, **CLOSE)


def begun(model, ids, features, num_slots):
    """A drafter whose last committed slot is ``num_slots - 1``, ready to grow."""
    drafter = model.drafter(torch.float32)
    drafter.begin(State(ids[: num_slots + 1], features[:num_slots]), 64)
    drafter.propose(None, TreeShape(kind="chain", budget=1, depth=1, top_k=1), temperature=0, generator=None)
    return drafter


@torch.inference_mode()
@pytest.mark.parametrize("slot", [4, 9])
def test_drafting_a_chain_computes_what_training_time_test_does(model, sequence, slot):
    ids, features = sequence
    expected = [log_probs(model, hidden)[slot] for hidden in trained(model, ids, features, 4)]
    growth = Growth(begun(model, ids, features, slot + 1))
    torch.testing.assert_close(growth.root(), expected[0], **CLOSE)
    for depth in (1, 2, 3):
        scored = growth.level(torch.tensor([ids[slot + 1 + depth]]), torch.tensor([depth - 2]), depth)
        torch.testing.assert_close(scored[0], expected[depth], **CLOSE)


@torch.inference_mode()
def test_branches_of_a_tree_are_chains_of_their_own(model, sequence):
    ids, features = sequence
    slot = 5
    growth = Growth(begun(model, ids, features, slot + 1))
    tokens, below = [7, 11, 30], [(2, 9), (0, 9), (0, 12)]
    level1 = growth.level(torch.tensor(tokens), torch.tensor([-1, -1, -1]), 1)
    level2 = growth.level(torch.tensor([token for _, token in below]), torch.tensor([parent for parent, _ in below]), 2)
    for line, (parent, token) in enumerate(below):
        path = [*ids[: slot + 2], tokens[parent], token, 3, 3]
        states = torch.cat([features[: slot + 1], torch.zeros(len(path) - slot - 1, features.shape[1])])
        chain = [log_probs(model, hidden)[slot] for hidden in trained(model, path, states, 3)]
        torch.testing.assert_close(level1[parent], chain[1], **CLOSE)
        torch.testing.assert_close(level2[line], chain[2], **CLOSE)
    assert not torch.allclose(level2[0], level2[1], atol=1e-3)


# ---- objectives ----


@pytest.fixture
def prepared(toy_target, toy_sequences, model):
    head = toy_target.model.get_output_embeddings().weight
    maker = BatchMaker(toy_sequences, OnlineFeatures(toy_target, toy_sequences), head, model)
    return model, *maker.make([4, 1, 0], seed=3)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_feature_loss_is_its_two_terms_row_by_row(prepared, num_steps):
    model, batch, view = prepared
    output = FeatureRegression(ttt_steps=num_steps, step_weight=0.5, noise=0).loss(batch, model, view)
    weights = [0.5**step for step in range(num_steps)]
    total = torch.zeros(())
    for step, hidden in unroll(model, batch, num_steps):
        regression, soft = [], []
        for row in batch.mask(step).nonzero()[:, 0].tolist():
            # The slot's token t + 2 + step is the next one's t + 1 of row + step: its feature is compared.
            wanted = batch.features[batch.slots[row] + 1 + step, 96:]
            difference = (hidden[row] - wanted).abs()
            regression.append(torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean())
            probs = torch.softmax(wanted @ model.head().T, dim=-1)[None]
            soft.append(forward_kl((hidden[row] @ model.head().T)[None], probs, torch.ones(1, dtype=torch.bool))[0])
        total = total + weights[step] / sum(weights) * (torch.stack(regression).mean() + 0.1 * torch.stack(soft).mean())
    torch.testing.assert_close(output.loss, total)


def test_features_are_disturbed_within_bounds_where_they_are_read_only(prepared):
    model, batch, view = prepared
    plain = FeatureRegression(noise=0).loss(batch, model, view).loss
    before = batch.features.clone()
    first, again = (FeatureRegression(noise=0.1).loss(batch, model, view).loss for _ in range(2))
    assert first == again != plain
    assert torch.equal(batch.features, before)
    seen = []

    class Watching(EagleModel):
        def start(self, batch):
            seen.append(batch.features - before)
            return super().start(batch)

    model.__class__ = Watching
    FeatureRegression(noise=0.1).loss(batch, model, view)
    assert seen[0][:, :96].abs().max() == 0
    assert 0.09 < seen[0][:, 96:].abs().max() <= 0.1 + 1e-6
    assert abs(float(seen[0][:, 96:].mean())) < 0.01


@pytest.mark.parametrize(
    "objective", [FeatureRegression(ttt_steps=2), ForwardKL(ttt_steps=2), CrossEntropy(ttt_steps=2)]
)
def test_every_weight_learns_and_the_head_is_frozen(prepared, objective):
    model, batch, view = prepared
    head = model.frozen_head.clone()
    objective.loss(batch, model, view).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert torch.equal(model.frozen_head, head)
    assert not model.frozen_head.requires_grad


def test_feature_regression_is_refused_where_nothing_predicts_features(prepared, toy_target):
    _, batch, view = prepared
    with pytest.raises(ConfigError, match="Eagle3Model does not: train architecture 'eagle'"):
        FeatureRegression().loss(batch, Eagle3Model.from_target(toy_target, IDS, seed=0), view)
    with pytest.raises(ConfigError, match="noise is -1"):
        FeatureRegression(noise=-1)


def test_smooth_l1_keeps_double_precision():
    assert smooth_l1(torch.zeros(1, 2).double(), torch.ones(1, 2)).dtype == torch.float64


# ---- checkpoints ----


def test_tensor_names_are_those_of_public_checkpoints(model):
    assert set(model.state_dict()) == TENSORS
    assert model.fc.weight.shape == (32, 64)
    assert model.layer.self_attn.q_proj.weight.shape == (32, 32)


def test_a_fresh_drafter_starts_from_the_feature_and_the_targets_head(toy_target):
    fresh = EagleModel.from_target(toy_target, IDS, seed=0)
    head = toy_target.model.get_output_embeddings().weight
    assert torch.equal(fresh.head(), head[IDS])
    again, other = (EagleModel.from_target(toy_target, IDS, seed=seed) for seed in (0, 1))
    same = [torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(fresh.layer.self_attn.q_proj.weight, other.layer.self_attn.q_proj.weight)


def test_saved_and_loaded_are_the_same(tmp_path, model, toy_target):
    model.save(tmp_path)
    loaded = EagleModel.load(tmp_path, toy_target)
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded.head(), model.head())
    assert build(toy_target, checkpoint=tmp_path, options={}).name == "eagle"


@pytest.mark.parametrize("biases", ["fc", "none", "qkv"])
@torch.no_grad()
def test_a_foreign_checkpoint_with_embeddings_and_no_vocabulary(tmp_path, toy_target, toy_sequences, biases):
    """As the public ones are: pickled, the whole vocabulary, embeddings of its own, with or without biases."""
    config = EagleConfig.for_target(toy_target, 64).model_copy(
        update={"bias": biases != "none", "qkv_bias": biases == "qkv"}
    )
    embeddings = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    head = toy_target.model.get_output_embeddings().weight
    original = random_weights(EagleModel(config, embeddings, torch.arange(64), head))
    tensors = {name: t for name, t in original.state_dict().items() if name not in {"d2t", "t2d"}}
    torch.save({**tensors, "embed_tokens.weight": embeddings}, tmp_path / "pytorch_model.bin")
    raw = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw |= {"vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": config.rope_theta, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = EagleModel.load(tmp_path, toy_target)
    assert (loaded.config.bias, loaded.config.qkv_bias) == (biases != "none", biases == "qkv")
    assert loaded.draft_ids.tolist() == list(range(64))
    ids = toy_sequences[4].ids
    features = target_pass(toy_target, [ids])[0]
    expected = [hidden[6] for hidden in trained(original, ids, features, 3)]
    found = [hidden[6] for hidden in trained(loaded, ids, features, 3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.inference_mode():
        growth = Growth(begun(loaded, ids, features, 7))
        torch.testing.assert_close(growth.root(), log_probs(loaded, expected[0]), **CLOSE)
        scored = growth.level(torch.tensor([ids[8]]), torch.tensor([-1]), 1)
        torch.testing.assert_close(scored[0], log_probs(loaded, expected[1]), **CLOSE)


def _damage(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage(lambda t, c: c.update(vocab_size=100)), "vocabulary of 100 tokens"),
        (_damage(lambda t, c: t.pop("d2t")), "no 'd2t' map"),
        (_damage(lambda t, c: t.update({"fc.weight": torch.zeros(48, 96)})), "another target"),
        (_damage(lambda t, c: t.pop("fc.weight")), "no tensor 'fc.weight', so it is not EAGLE-1 or EAGLE-2"),
        (_damage(lambda t, c: t.pop("layers.0.mlp.up_proj.weight")), "not EAGLE-1 or EAGLE-2"),
        (_damage(lambda t, c: t.pop("layers.0.self_attn.o_proj.weight")), r"lacks the tensor 'layers.0.self_attn.o_pr"),
        (_damage(lambda t, c: t.update({"layers.1.mlp.up_proj.weight": torch.zeros(2)})), "has 2 layers"),
        (_damage(lambda t, c: c.update(intermediate_size=50)), r"does not match its own config\.json"),
        (_damage(lambda t, c: c.update(rope_scaling={"type": "linear", "factor": 2})), "rope type 'linear'"),
        (lambda folder: (folder / "config.json").unlink(), "no EAGLE checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_ends_in_one_sentence(tmp_path, model, toy_target, damage, message):
    model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        EagleModel.load(tmp_path, toy_target)


def test_checkpoints_of_other_drafters_and_targets_are_refused(tmp_path, model, toy_target):
    Eagle3Model.from_target(toy_target, IDS, seed=0).save(tmp_path / "eagle3")
    with pytest.raises(ConfigError, match="not EAGLE-1 or EAGLE-2"):
        EagleModel.load(tmp_path / "eagle3", toy_target)
    model.save(tmp_path / "eagle")
    with pytest.raises(ConfigError, match="another target"):
        Eagle3Model.load(tmp_path / "eagle", toy_target)
    with pytest.raises(ConfigError, match="another target"):
        EagleModel.load(tmp_path / "eagle", make_target(hidden_size=48))


def test_build_says_what_is_wrong(toy_target):
    with pytest.raises(ConfigError, match="drafter 'eagle' needs a checkpoint"):
        build(toy_target, checkpoint=None, options={})
    with pytest.raises(ConfigError, match="drafter 'eagle' has no option 'speed'"):
        build(toy_target, checkpoint=None, options={"speed": 1})
