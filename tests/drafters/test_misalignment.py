"""Misalignment of greedy paths and trees, against the trees and the target's choices taken one anchor at a time."""

from __future__ import annotations

import torch
from tests.drafters.path_tools import make_setting

from vsdbench.decoding.interfaces import TreeShape
from vsdbench_drafters.objectives.misalignment import Misalignment, _count, misalignment
from vsdbench_drafters.objectives.paths import Paths
from vsdbench_drafters.objectives.token import ForwardKL


def one_by_one(setting, *, budget, top_k, depth):
    """The same counts from the decode-time drafter and plain forwards of the target."""
    drafter = setting.model.drafter(torch.float64)
    model, batch, generator = setting.target.model, setting.batch, torch.Generator()
    total = Misalignment()
    for span in batch.spans:
        text = batch.tokens[span.start : span.start + span.length].tolist()
        for row in range(span.num_rows):
            root = span.first_slot + row + 1
            state = setting.target.prefill(text[:root], 64)
            state.tokens.append(text[root])
            drafter.begin(state, 64)

            def walk(tree):
                """Tokens that the target keeps of a tree, and those of its first path."""
                prefix, parent, kept = text[: root + 1], -1, []  # noqa: B023
                while True:
                    with torch.inference_mode():
                        choice = int(model(input_ids=torch.tensor([prefix])).logits[0, -1].argmax())
                    children = [i for i in range(len(tree)) if tree.parents[i] == parent and tree.tokens[i] == choice]
                    if not children:
                        return kept
                    kept.append(choice)
                    prefix, parent = [*prefix, choice], children[0]

            chain = drafter.propose(state, TreeShape(kind="chain", budget=depth, depth=depth, top_k=1),
                                    temperature=0.0, generator=generator)  # fmt: skip
            tree = drafter.propose(state, TreeShape(kind="dynamic", budget=budget, depth=depth, top_k=top_k),
                                   temperature=0.0, generator=generator)  # fmt: skip
            greedy, parent = chain.tokens.tolist(), -1
            for token in greedy:
                found = [i for i in range(len(tree)) if tree.parents[i] == parent and int(tree.tokens[i]) == token]
                parent = found[0] if found else None
                if parent is None:
                    break
            kept = walk(tree)
            total += Misalignment(
                1, int(parent is None), int(bool(kept)), int(bool(kept) and kept == greedy[: len(kept)]),
                len(walk(chain)), len(kept),
            )  # fmt: skip
    return total


def test_counts_are_those_of_decoding():
    setting = make_setting()
    optimiser, objective = torch.optim.AdamW(setting.model.parameters(), lr=1e-2), ForwardKL(ttt_steps=2)
    for _ in range(60):  # until it is right now and then
        objective.loss(setting.batch, setting.model, setting.view).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    found = misalignment(setting.batch, setting.model, setting.view, per_sequence=99, budget=5, top_k=3, depth=3)
    assert found == one_by_one(setting, budget=5, top_k=3, depth=3)
    assert found.num_anchors == setting.batch.num_rows
    assert found.num_pruned > 0
    assert 0 < found.num_kept < found.num_anchors


def test_counts_by_hand():
    tokens = torch.tensor([[[1, 2], [1, 2], [1, 3]], [[1, 2], [1, 0], [4, 5]], [[1, 2], [7, 0], [8, 0]]])
    lengths = torch.tensor([[2, 2, 2], [2, 1, 2], [2, 1, 1]])
    kept = torch.tensor([[2, 2, 1], [1, 1, 0], [0, 0, 1]])
    counts = _count(Paths(tokens, lengths, 0), kept)
    # Pruned: the second anchor's tree has only the first token, the third's has none of it.
    assert counts == Misalignment(3, 2, 3, 2, 3, 4)
    assert counts.shares() == {
        "greedy_pruned_share": 2 / 3, "accepted_is_greedy_share": 2 / 3, "greedy_path_length": 1.0,
        "tree_path_length": 4 / 3,
    }  # fmt: skip
