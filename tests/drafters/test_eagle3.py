"""EAGLE-3: decoding computes what training showed, and checkpoints mean what they say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.drafters.plain import target_pass

from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3 import Eagle3Config, Eagle3Model, build
from vsdbench_drafters.architectures.one_layer_drafter import Growth
from vsdbench_drafters.objectives.base import DraftBatch, unroll

TENSORS = {
    "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
    "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight", "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight", "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
}  # fmt: skip


@pytest.fixture
def model(toy_target):
    """A drafter with every weight random, so that nothing in the forward is masked by a zero or an identity."""
    model = Eagle3Model.from_target(toy_target, torch.arange(3, 43), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() == 2 else 0.3
            offset = 0.0 if parameter.dim() == 2 else 1.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model


class State:
    def __init__(self, tokens, features):
        self.tokens, self.features = tokens, features

    def last_tokens(self, count):
        return torch.tensor(self.tokens[-count:])


@pytest.fixture
def sequence(toy_target, toy_sequences):
    ids = toy_sequences[4].ids
    return ids, target_pass(toy_target, [ids])[0][:, :96]


def trained_log_probs(model, ids, prompt_len, features, num_steps):
    batch = DraftBatch.pack([ids], [prompt_len], features)
    with torch.no_grad():
        return [torch.log_softmax(model.lm_head(hidden), dim=-1) for _, hidden in unroll(model, batch, num_steps)]


def begun(model, ids, features, num_slots):
    """A drafter whose last committed slot is ``num_slots - 1``, ready to grow."""
    drafter = model.drafter(torch.float32)
    drafter.begin(State(ids[: num_slots + 1], features[:num_slots]), 64)
    drafter.propose(None, TreeShape(kind="chain", budget=1, depth=1, top_k=1), temperature=0, generator=None)
    return drafter


def test_tensor_names_are_those_of_public_checkpoints(model):
    assert set(model.state_dict()) == TENSORS
    assert model.midlayer.self_attn.q_proj.weight.shape == (32, 64)


@torch.inference_mode()
@pytest.mark.parametrize("slot", [4, 9])
def test_drafting_computes_what_training_time_test_does(model, sequence, slot):
    ids, features = sequence
    expected = trained_log_probs(model, ids, 2, features, 4)
    drafter = begun(model, ids, features, slot + 1)
    growth = Growth(drafter)
    torch.testing.assert_close(growth.root(), expected[0][slot], rtol=1e-4, atol=1e-5)
    for depth in (1, 2, 3):
        token = torch.tensor([ids[slot + 1 + depth]])
        scored = growth.level(token, torch.tensor([depth - 2]), depth)
        torch.testing.assert_close(scored[0], expected[depth][slot], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_branches_of_a_tree_do_not_see_each_other(model, sequence):
    ids, features = sequence
    tokens = torch.tensor([7, 11, 30])
    drafter = begun(model, ids, features, 6)
    growth = Growth(drafter)
    level1 = growth.level(tokens, torch.tensor([-1, -1, -1]), 1)
    level2 = growth.level(torch.tensor([9, 9]), torch.tensor([2, 0]), 2)
    for line, token in enumerate(tokens.tolist()):
        alone = Growth(drafter)
        torch.testing.assert_close(
            alone.level(torch.tensor([token]), torch.tensor([-1]), 1)[0], level1[line], rtol=1e-4, atol=1e-5
        )
        if token in {30, 7}:
            own = alone.level(torch.tensor([9]), torch.tensor([0]), 2)[0]
            torch.testing.assert_close(own, level2[0 if token == 30 else 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(level2[0], level2[1], atol=1e-3)


@torch.inference_mode()
def test_committing_step_by_step_is_beginning_anew(model, sequence):
    ids, features = sequence
    drafter = begun(model, ids, features, 5)
    growth = Growth(drafter)
    growth.level(torch.tensor([40, 41]), torch.tensor([-1, -1]), 1)  # rejected nodes leave no trace
    drafter.commit(State(ids[:9], None), 2, features[5:8])
    drafter.commit(State(ids[:10], None), 0, features[8:9])
    shape = TreeShape(kind="chain", budget=1, depth=1, top_k=1)
    drafter.propose(None, shape, temperature=0, generator=None)
    fresh = begun(model, ids, features, 9)
    assert drafter.num_committed == fresh.num_committed == 9
    torch.testing.assert_close(Growth(drafter).root(), Growth(fresh).root(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["chain", "static", "dynamic"])
def test_greedy_decoding_is_lossless_and_ids_are_the_targets(toy_target, model, kind):
    settings = DecodeSettings(max_new_tokens=24, shape=TreeShape(kind=kind, budget=6, depth=3, top_k=3))
    plain = decode(toy_target, Autoregressive(), [5, 9, 33, 12], settings)
    drafted = decode(toy_target, model.drafter(torch.float32), [5, 9, 33, 12], settings)
    assert drafted.token_ids == plain.token_ids


def test_a_prompt_of_one_token(toy_target, model):
    settings = DecodeSettings(max_new_tokens=8, shape=TreeShape())
    drafted = decode(toy_target, model.drafter(torch.float32), [5], settings)
    assert drafted.token_ids == decode(toy_target, Autoregressive(), [5], settings).token_ids


def test_a_row_sees_its_own_input_token_and_nothing_later(model, sequence):
    ids, features = sequence
    slot = 6
    base = trained_log_probs(model, ids, 2, features, 1)[0][slot]
    later = [*ids[: slot + 2], *(3 for _ in ids[slot + 2 :])]
    changed_features = features.clone()
    changed_features[slot + 1 :] = 0
    assert torch.equal(trained_log_probs(model, later, 2, changed_features, 1)[0][slot], base)
    own = list(ids)
    own[slot + 1] += 1
    assert not torch.allclose(trained_log_probs(model, own, 2, features, 1)[0][slot], base, atol=1e-3)


def test_packing_does_not_mix_sequences(model, toy_target, toy_sequences):
    chosen = toy_sequences[:3]
    states = [state[:, :96] for state in target_pass(toy_target, [s.ids for s in chosen])]
    packed = DraftBatch.pack([s.ids for s in chosen], [s.prompt_len for s in chosen], torch.cat(states))
    with torch.no_grad():
        together = [hidden for _, hidden in unroll(model, packed, 3)]
        for span, one, state in zip(packed.spans, chosen, states, strict=True):
            alone = DraftBatch.pack([one.ids], [one.prompt_len], state)
            rows = slice(span.first_row, span.first_row + span.num_rows)
            for (_, hidden), all_hidden in zip(unroll(model, alone, 3), together, strict=True):
                torch.testing.assert_close(all_hidden[rows], hidden, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_are_the_same(tmp_path, model, toy_target):
    model.save(tmp_path)
    loaded = Eagle3Model.load(tmp_path, toy_target)
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert build(toy_target, checkpoint=tmp_path, options={}).name == "eagle3"
    assert loaded.draft_ids.tolist() == list(range(3, 43))


def test_a_pickled_foreign_checkpoint_without_rope_theta(tmp_path, model, toy_target):
    tensors = {f"model.{name}": t for name, t in model.state_dict().items() if name != "t2d"}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    keep = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"}
    raw = {key: value for key, value in model.config.to_json().items() if key in keep}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"draft_vocab_size": 40, "rope_scaling": None}))
    loaded = Eagle3Model.load(tmp_path, toy_target)
    assert loaded.config.rope_theta == 10000.0
    assert loaded.config.head_dim == 8
    assert torch.equal(loaded.t2d, model.t2d)


def test_our_own_rope_theta_is_the_targets(toy_target):
    assert Eagle3Config.for_target(toy_target, 40).rope_theta == toy_target.config.rope_parameters["rope_theta"]


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
        (_damage(lambda t, c: t["d2t"].zero_()), "all zero"),
        (_damage(lambda t, c: t.pop("d2t")), "no 'd2t' map"),
        (_damage(lambda t, c: t["d2t"].add_(1000)), "does not map"),
        (_damage(lambda t, c: t["d2t"].__setitem__(1, t["d2t"][0] - 1)), "two draft ids"),
        (_damage(lambda t, c: t.update({"fc.weight": torch.zeros(32, 48)})), "another target"),
        (_damage(lambda t, c: t.pop("fc.weight")), "not EAGLE-3"),
        (_damage(lambda t, c: t.pop("midlayer.mlp.up_proj.weight")), "lacks the tensor 'midlayer.mlp.up_proj.weight'"),
        (_damage(lambda t, c: c.update(intermediate_size=50)), "does not match its own config.json"),
        (_damage(lambda t, c: c.update(rope_scaling={"rope_type": "llama3"})), "rope type 'llama3'"),
        (lambda folder: (folder / "config.json").unlink(), "no EAGLE-3 checkpoint"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "cannot be read"),
    ],
)
def test_a_checkpoint_that_does_not_fit_ends_in_one_sentence(tmp_path, model, toy_target, damage, message):
    model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Eagle3Model.load(tmp_path, toy_target)


def test_build_says_what_is_wrong(toy_target):
    with pytest.raises(ConfigError, match="needs a checkpoint"):
        build(toy_target, checkpoint=None, options={})
    with pytest.raises(ConfigError, match="no option 'speed'"):
        build(toy_target, checkpoint=None, options={"speed": 1})
