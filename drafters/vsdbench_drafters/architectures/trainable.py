"""The drafters that a recipe can train, by the name in its ``architecture.type``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vsdbench.models.target import Target
    from vsdbench_drafters.objectives.base import DraftModel
    from vsdbench_drafters.training.recipe import ArchitectureConfig

_MODELS = {
    "eagle3": ("vsdbench_drafters.architectures.eagle3", "Eagle3Model"),
    "eagle": ("vsdbench_drafters.architectures.eagle", "EagleModel"),
    "medusa": ("vsdbench_drafters.architectures.medusa", "MedusaModel"),
    "msd": ("vsdbench_drafters.architectures.msd", "MsdModel"),
    "vispec": ("vsdbench_drafters.architectures.vispec", "ViSpecModel"),
}


def fresh_model(config: ArchitectureConfig, target: Target, draft_ids: Tensor, *, seed: int) -> DraftModel:
    """Return an untrained drafter for a target, float32.

    Args:
        config: What a recipe says about it.
        target: The target.
        draft_ids: ``[Vd]`` int64, the target ids of its vocabulary in increasing order.
        seed: Of its random weights.
    """
    options = config.model_dump(exclude={"type", "draft_vocab_size", "copying"})
    model: DraftModel = _model_class(config).from_target(target, draft_ids, seed=seed, **options)
    return model


def load_model(config: ArchitectureConfig, folder: Path, target: Target) -> DraftModel:
    """Return the drafter in a checkpoint folder, float32, to be trained further.

    Raises:
        ConfigError: It is of another architecture, or for another target.
    """
    model: DraftModel = _model_class(config).load(folder, target)
    return model.float()


def _model_class(config: ArchitectureConfig) -> Any:  # noqa: ANN401 - constructors differ in their options
    module, name = _MODELS[config.type]
    return getattr(importlib.import_module(module), name)
