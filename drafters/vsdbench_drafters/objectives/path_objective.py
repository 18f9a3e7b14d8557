"""Base of the objectives that learn from the drafter's own paths: propose, score, and the anchor loss beside them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.base import DraftBatch, DraftContext, DraftModel, LossOutput, TargetView, unroll
from vsdbench_drafters.objectives.paths import (
    Paths,
    Scores,
    Trie,
    choose_anchors,
    draft_probs,
    join,
    merge,
    oracle,
    sample_paths,
    target_probs,
    trace,
    tree_paths,
)
from vsdbench_drafters.objectives.token import ForwardKL

Proposals = Literal["sampled", "tree", "mixed"]


class PathObjective(ForwardKL):
    """Base of the objectives that learn from the drafter's own paths, beside or in place of the data's.

    Args:
        ttt_steps: Steps of training-time test of the anchor loss.
        step_weight: Weight of its step i is ``step_weight**i``.
        anchor: ``kl``: the soft cross-entropy of EAGLE-3 on the data; ``off``: none.
        anchors: Anchor positions a sequence.
        share: Of a batch's sequences that get anchors.
        paths: S, proposals an anchor; ``mixed`` draws half as many and takes all leaves of the tree besides.
        depth: L, tokens a path.
        proposals: ``sampled`` from q, ``tree``: the leaves that decoding's dynamic tree would send, or both.
        tree_budget: Nodes of that tree.
        tree_top_k: Children scored a node.
    """

    # All contexts are scored by one LM head.
    architectures: ClassVar[tuple[str, ...] | None] = ("eagle3", "eagle", "msd", "vispec")

    def __init__(
        self,
        *,
        ttt_steps: int = 4,
        step_weight: float = 0.8,
        anchor: Literal["kl", "off"] = "kl",
        anchors: int = 16,
        share: float = 1.0,
        paths: int = 8,
        depth: int = 4,
        proposals: Proposals = "sampled",
        tree_budget: int = 15,
        tree_top_k: int = 4,
    ) -> None:
        super().__init__(ttt_steps=ttt_steps, step_weight=step_weight)
        counts = {"anchors": anchors, "paths": paths, "depth": depth}
        for option, value in (counts | {"tree_budget": tree_budget, "tree_top_k": tree_top_k}).items():
            if value < 1:
                raise ConfigError(f"{self.name}: {option} is {value}; use at least 1.")
        if not 0 < share <= 1:
            raise ConfigError(f"{self.name}: share is {share}; it must be above 0 and at most 1.")
        check_choice(self.name, "anchor", anchor, ("kl", "off"))
        check_choice(self.name, "proposals", proposals, ("sampled", "tree", "mixed"))
        self.anchor, self.proposals = anchor, proposals
        self.num_anchors, self.num_paths, self.depth = anchors, paths, depth
        self._share = share
        self.tree_budget, self.tree_top_k = tree_budget, tree_top_k

    def place(self, batch: DraftBatch, generator: torch.Generator) -> Tensor:
        """Return ``[A]`` the batch's anchors."""
        return choose_anchors(batch, self.num_anchors, generator, share=self._share)

    def walk(
        self, batch: DraftBatch, drafter: DraftModel, view: TargetView, anchors: Tensor
    ) -> tuple[list[Tensor], DraftContext]:
        """Return the anchor loss's terms, none where it is off, and the anchors' context at step 0."""
        context = drafter.start(batch)
        outputs: list[Tensor] = []
        branch: DraftContext | None = None
        for _, hidden in unroll(drafter, batch, len(self.weights), context):
            if branch is None:
                branch = context.select(anchors)
                if self.anchor == "off":
                    break
            outputs.append(hidden)
        assert branch is not None
        return self.step_losses(outputs, batch, drafter, view.probs()) if outputs else [], branch

    def propose(self, drafter: DraftModel, context: DraftContext, generator: torch.Generator) -> Paths:
        """Return proposals of the drafter as it is now."""
        found = []
        if self.proposals != "tree":
            count = self.num_paths if self.proposals == "sampled" else max(1, self.num_paths // 2)
            found.append(sample_paths(drafter, context, count, self.depth, generator))
        if self.proposals != "sampled":
            found.append(tree_paths(drafter, context, budget=self.tree_budget, top_k=self.tree_top_k, depth=self.depth))
        return found[0] if len(found) == 1 else join(*found)

    def score(  # noqa: PLR0917 - what both models need to know
        self,
        batch: DraftBatch,
        drafter: DraftModel,
        view: TargetView,
        anchors: Tensor,
        context: DraftContext,
        paths: Paths,
    ) -> tuple[Trie, Tensor, Scores]:
        """Return the contexts of paths, the drafter's ``[M, H]`` outputs there with their graph, and what both say.

        Args:
            batch: The batch.
            drafter: ψ.
            view: The target's, with a target to ask.
            anchors: ``[A]`` rows of the batch.
            context: The drafter's at these anchors, at step 0.
            paths: What was proposed below them.
        """
        if view.target is None:
            raise ConfigError(f"objective '{self.name}' asks the target about drafted tokens, and has none to ask.")
        on_host = merge(paths, len(drafter.draft_ids))
        trie = on_host.to(anchors.device)
        hidden = trace(drafter, context, trie)
        below = oracle(batch, anchors, on_host, drafter.draft_ids, view.target)
        states = torch.cat([view.hidden[anchors], below.to(view.hidden.dtype)]) if len(below) else view.hidden[anchors]
        probs, choices = target_probs(states, view.full_head, drafter.draft_ids)
        return trie, hidden, Scores(draft_probs(drafter, hidden.detach()), probs, view.target_to_draft[choices])

    def beside_anchor(self, path_term: Tensor, terms: list[Tensor], metrics: dict[str, Tensor]) -> LossOutput:
        """Return the sum of a path term and the anchor loss, whose terms ``walk`` gave, and all that is logged."""
        anchor = sum((weight * term for weight, term in zip(self.weights, terms, strict=False)), start=0.0)
        return LossOutput(
            path_term + anchor, metrics | {f"loss_step_{i}": term.detach() for i, term in enumerate(terms)}
        )


def check_choice(objective: str, option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse an option's value that is not known.

    Raises:
        ConfigError: It is not.
    """
    if value not in known:
        raise ConfigError(f"{objective}: {option} is '{value}'; use {', '.join(known)}.")
