"""Which prompts a configuration of training data means, by the name of their source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from vsdbench_drafters.training.grounded import GroundedSource
from vsdbench_drafters.training.prompts import PromptSource, Split

if TYPE_CHECKING:
    from vsdbench_drafters.training.data import DataConfig
    from vsdbench_drafters.training.prompts import Article, Prompt
    from vsdbench_drafters.training.shards import SequenceList, TrainingData

_SPLITS: tuple[Split, Split] = ("train", "heldout")
_SOURCES: dict[str, type[PromptSource]] = {"wiki": PromptSource, "grounded": GroundedSource}


class Prompts(Protocol):
    """An endless list of prompts."""

    def __getitem__(self, index: int) -> Prompt: ...


def prompt_sources(
    config: DataConfig, articles: Sequence[Article], excluded: frozenset[str]
) -> tuple[Prompts, Prompts]:
    """Return the prompts of both splits, training and held-out.

    Args:
        config: Which.
        articles: What text is about.
        excluded: Hashes of prompts that must not be used. Scenes need none: suites have scenes of their own.
    """
    if not config.shows_images:
        kind = _SOURCES[config.source]
        train, heldout = (kind(articles, seed=config.seed, split=split, excluded=excluded) for split in _SPLITS)
        return train, heldout
    from vsdbench_drafters.training.scenes import SceneSource  # noqa: PLC0415 - imports torch

    found = []
    for split in _SPLITS:
        text = PromptSource(articles, seed=config.seed, split=split, excluded=excluded) if articles else None
        found.append(SceneSource(seed=config.seed, split=split, text=text, text_share=config.text_share))
    return found[0], found[1]


def with_images(data: TrainingData, config: DataConfig, encode: Callable[[Any], Sequence[int]]) -> TrainingData:
    """Return the data, its images back in place if it has some.

    Args:
        data: As it is on disk.
        config: What it is.
        encode: From messages to a prompt (``Target.encode_chat``).
    """
    if not config.shows_images:
        return data
    from vsdbench_drafters.training.scenes import SceneSource, ShownSequences  # noqa: PLC0415 - imports torch

    train, heldout = (
        ShownSequences(
            cast("SequenceList", sequences),
            SceneSource(seed=config.seed, split=split, text_share=config.text_share),
            encode,
        )
        for split, sequences in zip(_SPLITS, (data.sequences, data.heldout), strict=True)
    )
    return replace(data, sequences=train, heldout=heldout)


def prompts_version(config: DataConfig) -> int | list[int]:
    """Return what changes whenever the same index gives another prompt."""
    if not config.shows_images:
        return _SOURCES[config.source].version
    from vsdbench_drafters.training.scenes import SCENES_VERSION  # noqa: PLC0415 - imports torch

    return [SCENES_VERSION, PromptSource.version]
