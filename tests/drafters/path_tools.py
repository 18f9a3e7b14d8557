"""A tiny target and a drafter with paths below the anchors of one batch, for the tests of path objectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.decoding.tiny import make_prompt, make_target
from tests.drafters.test_eagle3_decoding import DRAFT_IDS, make_drafter_model

from vsdbench.models.target import Target
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.objectives.base import DraftBatch, DraftContext, TargetView
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures


@dataclass(frozen=True)
class Sequence:
    ids: list[int]
    prompt_len: int


@dataclass
class Setting:
    target: Target
    model: Eagle3Model
    batch: DraftBatch
    view: TargetView

    def branch(self, anchors) -> DraftContext:
        context = self.model.start(self.batch)
        self.model.advance(context, self.batch.inputs(0))
        return context.select(anchors)


def make_setting(lengths=((14, 5), (20, 8), (9, 3)), *, seed=0, batch_seed=7, dtype=torch.float64) -> Setting:
    target = make_target(dtype=dtype)
    model = make_drafter_model(target, seed)
    sequences = [Sequence(make_prompt(length, index), prompt) for index, (length, prompt) in enumerate(lengths)]
    head = target.model.get_output_embeddings().weight
    maker = BatchMaker(sequences, OnlineFeatures(target, sequences), head, model, target)
    batch, view = maker.make(range(len(sequences)), seed=batch_seed)
    return Setting(target, model, batch, view)


__all__ = ["DRAFT_IDS", "Setting", "make_setting"]
