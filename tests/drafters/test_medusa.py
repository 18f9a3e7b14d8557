"""Medusa: every head is a step, decoding computes what training does, checkpoints have the public names."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.drafters.conftest import make_target
from tests.drafters.plain import cross_entropy, target_pass

from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.medusa import MedusaDrafter, MedusaModel, build
from vsdbench_drafters.objectives.base import DraftBatch, unroll
from vsdbench_drafters.objectives.token import CrossEntropy, ForwardKL
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures
from vsdbench_drafters.training.heldout import HeldOut

IDS = torch.arange(3, 43)
HEADS = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make_model(target, *, num_heads=HEADS, num_layers=2, seed=1):
    """Every weight random, so that no block is the identity and no two heads are alike."""
    model = MedusaModel.from_target(target, IDS, seed=0, num_heads=num_heads, num_layers=num_layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def model(toy_target):
    return make_model(toy_target)


@pytest.fixture
def sequence(toy_target, toy_sequences):
    ids = toy_sequences[4].ids
    return ids, target_pass(toy_target, [ids])[0]


def plain_heads(tensors, feature, num_layers):
    """``[K, Vd]`` logits of the public form: residual blocks, then the head's own matrix."""
    logits = []
    for head in range(HEADS):
        x = feature
        for block in range(num_layers):
            weight, bias = (tensors[f"{head}.{block}.linear.{field}"] for field in ("weight", "bias"))
            x = x + F.silu(weight @ x + bias)
        logits.append(tensors[f"{head}.{num_layers}.weight"] @ x)
    return torch.stack(logits)


@torch.no_grad()
def test_step_i_is_head_i_of_the_slots_own_feature(tmp_path, model, sequence):
    """The saved tensors say by their public names what each is, so they are what the recomputation reads."""
    ids, features = sequence
    model.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    batch = DraftBatch.pack([ids], [6], features)
    steps = list(unroll(model, batch, 8))
    assert [step for step, _ in steps] == [0, 1, 2]
    for step, hidden in steps:
        for row, slot in enumerate(batch.slots.tolist()):
            expected = plain_heads(tensors, features[slot, 96:], 2)[step]
            torch.testing.assert_close(hidden[row] @ model.head(step).T, expected, **CLOSE)
            if slot + 2 + step < len(ids):
                assert int(batch.labels(step)[row]) == ids[slot + 2 + step]


@torch.no_grad()
def test_the_root_comes_from_the_same_hidden_state_as_the_first_head(toy_target, sequence):
    """Fresh heads say what the target's LM head says of the slot's feature: the token before the first drafted one."""
    ids, features = sequence
    fresh = MedusaModel.from_target(toy_target, IDS, seed=0, num_heads=2, num_layers=1)
    batch = DraftBatch.pack([ids], [6], features)
    with toy_target.as_shipped() as causal:
        logits = causal(torch.tensor([ids])).logits[0]
    for step, hidden in unroll(fresh, batch, 2):
        torch.testing.assert_close(hidden @ fresh.head(step).T, logits[batch.slots][:, IDS], rtol=1e-3, atol=1e-4)


def test_contexts_of_selected_rows_go_on_independently(model, sequence):
    ids, features = sequence
    batch = DraftBatch.pack([ids], [6], features)
    context = model.start(batch)
    first = model.advance(context, batch.inputs(0))
    branch = context.select(torch.tensor([4, 1, 1]))
    assert torch.equal(branch.hidden, first[[4, 1, 1]])
    second = model.advance(context, batch.inputs(1))
    torch.testing.assert_close(model.advance(branch, batch.inputs(1)[:3]), second[[4, 1, 1]])


class State:
    def __init__(self, tokens, features):
        self.tokens, self.features = tokens, features


def trained_log_probs(model, ids, features):
    with torch.no_grad():
        steps = unroll(model, DraftBatch.pack([ids], [2], features), HEADS)
        return [torch.log_softmax(hidden @ model.head(step).T, dim=-1) for step, hidden in steps]


@torch.inference_mode()
def test_drafting_computes_what_training_does(model, sequence):
    ids, features = sequence
    expected = trained_log_probs(model, ids, features)
    drafter = MedusaDrafter(model, dtype=torch.float32)
    drafter.begin(State(ids[:7], features[:6]), 64)  # the root is token 6, predicted from slot 5
    torch.testing.assert_close(drafter.root(), expected[0][5], **CLOSE)
    level = drafter.level(torch.tensor([9, 30]), torch.tensor([-1, -1]), 1)
    torch.testing.assert_close(level, expected[1][5].expand(2, -1), **CLOSE)
    drafter.commit(State(ids[:10], None), 2, features[6:9])
    torch.testing.assert_close(drafter.root(), expected[0][8], **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["chain", "static", "dynamic"])
def test_trees_hold_the_likeliest_tokens_of_every_head(model, sequence, kind):
    ids, features = sequence
    expected = trained_log_probs(model, ids, features)
    drafter = MedusaDrafter(model, dtype=torch.float32)
    drafter.begin(State(ids[:7], features[:6]), 64)
    tree = drafter.propose(None, TreeShape(kind=kind, budget=7, depth=9, top_k=2), temperature=0, generator=None)
    assert len(tree) == (HEADS if kind == "chain" else 7)
    assert max(tree.depths) == HEADS == drafter.max_depth, "no deeper than there are heads, whatever is asked"
    best = [scores[5].topk(2) for scores in expected]
    for token, depth, log_prob in zip(tree.tokens.tolist(), tree.depths, tree.log_probs.tolist(), strict=True):
        rank = (best[depth - 1].indices + 3).tolist().index(token)
        assert log_prob == pytest.approx(float(best[depth - 1].values[rank]), rel=1e-4)
    assert (best[0].indices[0] + 3) == tree.tokens[0]


def test_no_tree_is_asked_for(model, sequence):
    ids, features = sequence
    drafter = MedusaDrafter(model, dtype=torch.float32)
    drafter.begin(State(ids[:7], features[:6]), 64)
    assert len(drafter.propose(None, TreeShape(budget=0), temperature=0, generator=None)) == 0


# ---- objectives ----


@pytest.fixture
def maker(toy_target, toy_sequences, model):
    head = toy_target.model.get_output_embeddings().weight
    return BatchMaker(toy_sequences, OnlineFeatures(toy_target, toy_sequences), head, model)


def test_cross_entropy_trains_each_head_on_its_own_token(model, maker):
    batch, view = maker.make([4, 1, 0])
    output = CrossEntropy(ttt_steps=HEADS, step_weight=0.8).loss(batch, model, view)
    expected = []
    for step, hidden in unroll(model, batch, HEADS):
        labels = view.target_to_draft[batch.labels(step)]
        expected.append(cross_entropy(hidden @ model.head(step).T, labels, batch.mask(step)))
    total = (expected[0] + 0.8 * expected[1] + 0.64 * expected[2]) / 2.44
    torch.testing.assert_close(output.loss, total)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gradients_flow_where_blocks_are_still_zero(toy_target, maker):
    fresh = MedusaModel.from_target(toy_target, IDS, seed=0, num_heads=HEADS, num_layers=1)
    ForwardKL(ttt_steps=HEADS).loss(*_with(maker, fresh)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fresh.parameters())


def _with(maker, model):
    batch, view = maker.make([4, 1])
    return batch, model, view


def test_more_steps_than_heads_are_refused_by_losses_and_left_out_of_held_out_numbers(model, maker):
    with pytest.raises(ConfigError, match="ttt_steps is 4, but this drafter has 3 steps"):
        ForwardKL(ttt_steps=4).loss(*_with(maker, model))
    numbers = HeldOut(maker, [[0, 1]]).evaluate(model, autocast=False)
    assert 1 <= numbers["tau_chain"] <= 1 + HEADS


# ---- checkpoints ----


def test_tensor_names_are_those_of_public_checkpoints(tmp_path, toy_target):
    MedusaModel.from_target(toy_target, IDS, seed=0, num_heads=2, num_layers=1).save(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    head = {"0.linear.weight": (32, 32), "0.linear.bias": (32,), "1.weight": (40, 32)}
    vocabulary = {"d2t": (40,), "t2d": (64,)}
    assert shapes == {f"{i}.{name}": shape for i in range(2) for name, shape in head.items()} | vocabulary
    assert json.loads((tmp_path / "config.json").read_text())["medusa_num_heads"] == 2


def test_saved_and_loaded_are_the_same(tmp_path, model, toy_target):
    model.save(tmp_path)
    loaded = MedusaModel.load(tmp_path, toy_target)
    assert (loaded.max_steps, loaded.num_layers) == (HEADS, 2)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert build(toy_target, checkpoint=tmp_path, options={}).name == "medusa"


@pytest.mark.parametrize("form", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "pytorch_model.bin"])
def test_a_foreign_checkpoint_with_a_whole_vocabulary_and_no_config(tmp_path, toy_target, form):
    generator = torch.Generator().manual_seed(2)
    shapes = {"0.linear.weight": (32, 32), "0.linear.bias": (32,), "1.weight": (64, 32)}
    tensors = {f"{i}.{n}": torch.randn(s, generator=generator) for i in range(HEADS) for n, s in shapes.items()}
    if form.endswith(".safetensors"):
        save_file(tensors, tmp_path / form)
    else:
        prefix = "medusa_head." if form == "pytorch_model.bin" else ""
        torch.save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / form)
    loaded = MedusaModel.load(tmp_path, toy_target)
    assert loaded.draft_ids.tolist() == list(range(64))
    feature = torch.randn(32, generator=generator)
    drafter = MedusaDrafter(loaded, dtype=torch.float32)
    drafter.begin(State([1, 2], torch.cat([torch.zeros(96), feature])[None]), 8)
    expected = torch.log_softmax(plain_heads(tensors, feature, 1), dim=-1)
    with torch.inference_mode():
        torch.testing.assert_close(drafter.root(), expected[0], **CLOSE)
        torch.testing.assert_close(drafter.level(torch.tensor([5]), torch.tensor([1]), 2)[0], expected[2], **CLOSE)


def _damage(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage(lambda t: t.pop("1.0.linear.bias")), r"lacks the tensor '1\.0\.linear\.bias', which Medusa needs"),
        (_damage(lambda t: t.update({"1.2.weight": torch.zeros(41, 32)})), "does not match its own first head"),
        (_damage(lambda t: t.pop("d2t")), "no 'd2t' map"),
        (_damage(lambda t: t.update({"t2d": torch.zeros(65, dtype=torch.bool)})), "another vocabulary than the 64"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"nor medusa_lm_head\.pt"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "cannot be read"),
    ],
)
def test_a_checkpoint_that_does_not_fit_ends_in_one_sentence(tmp_path, model, toy_target, damage, message):
    model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        MedusaModel.load(tmp_path, toy_target)


def test_checkpoints_of_other_drafters_and_targets_are_refused(tmp_path, model, toy_target):
    Eagle3Model.from_target(toy_target, IDS, seed=0).save(tmp_path / "eagle3")
    with pytest.raises(ConfigError, match="so it is not Medusa"):
        MedusaModel.load(tmp_path / "eagle3", toy_target)
    model.save(tmp_path / "medusa")
    with pytest.raises(ConfigError, match="so it is not EAGLE-3"):
        Eagle3Model.load(tmp_path / "medusa", toy_target)
    with pytest.raises(ConfigError, match="hidden states 32 wide, those of target 'toy' are 48"):
        MedusaModel.load(tmp_path / "medusa", make_target(hidden_size=48))


def test_build_says_what_is_wrong(toy_target):
    with pytest.raises(ConfigError, match="drafter 'medusa' needs a checkpoint"):
        build(toy_target, checkpoint=None, options={})
    with pytest.raises(ConfigError, match="drafter 'medusa' has no option 'speed'"):
        build(toy_target, checkpoint=None, options={"speed": 1})
