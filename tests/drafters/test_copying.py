"""A drafter that starts copying repeats what followed the last token before; one that starts as usual does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.drafters.conftest import ToySequence, make_target

from vsdbench_drafters.architectures.copying import start_copying
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.objectives.base import DraftBatch
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures


def random_sequences(number, length, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 64, (number, length), generator=generator).tolist()
    return [ToySequence(ids, 2) for ids in rows]


@pytest.fixture(scope="module")
def target():
    made = make_target(hidden_size=64, num_attention_heads=2)
    with torch.no_grad():
        made.embed_tokens.weight.mul_(20)  # random layers write over a token what trained ones leave readable
    return made


def make(target, *, copying):
    model = Eagle3Model.from_target(target, torch.arange(64), seed=0)
    if copying:
        sequences = random_sequences(60, 40, seed=1)
        head = target.model.get_output_embeddings().weight
        maker = BatchMaker(sequences, OnlineFeatures(target, sequences), head, model, target)
        features, tokens = maker.slots(2000)
        assert len(features) == len(tokens) == 52 * 39  # whole sequences, without their first tokens
        assert maker.num_forwards == 52
        start_copying(model, features, tokens, seed=0)
    return model


def test_slots_of_data_as_it_lies_on_disk(target):
    """Token ids are small and may not be written: nothing warns of that, and tokens are int64."""
    sequences = random_sequences(3, 8, seed=1)
    on_disk = [ToySequence(np.array(sequence.ids, dtype=np.uint16), 2) for sequence in sequences]
    for sequence in on_disk:
        sequence.ids.flags.writeable = False
    head = target.model.get_output_embeddings().weight
    maker = BatchMaker(on_disk, OnlineFeatures(target, on_disk), head, make(target, copying=False), target)
    features, tokens = maker.slots(8)
    assert len(features) == 14
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == sequences[0].ids[1:] + sequences[1].ids[1:]


def copied(model, target):
    """Where the last token stood once before: how often what followed it then is drafted first."""
    hits = total = 0
    for sequence in random_sequences(30, 40, seed=2):
        states = OnlineFeatures(target, [sequence]).read([0]).states
        batch = DraftBatch.pack([sequence.ids], [sequence.prompt_len], states, seed=0)
        context = model.start(batch)
        with torch.inference_mode():
            drafted = (model.norm(model.advance(context, batch.tokens[batch.slots + 1])) @ model.head().T).argmax(-1)
        for row, slot in enumerate(batch.slots.tolist()):
            before = [at for at in range(1, slot + 1) if sequence.ids[at] == sequence.ids[slot + 1]]
            if len(before) == 1:
                total += 1
                hits += int(drafted[row]) == sequence.ids[before[0] + 1]
    return hits / total


def test_a_fresh_drafter_copies_where_it_is_told_to(target):
    assert copied(make(target, copying=False), target) < 0.1
    assert copied(make(target, copying=True), target) > 0.5


def test_it_is_the_same_every_time_and_leaves_the_other_heads_alone(target):
    plain, one, two = make(target, copying=False), make(target, copying=True), make(target, copying=True)
    changed = set()
    for (name, before), first, second in zip(plain.named_parameters(), one.parameters(), two.parameters(), strict=True):
        assert torch.equal(first, second)
        if not torch.equal(before, first):
            changed.add(name.removeprefix("midlayer.self_attn."))
    assert changed == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
