"""How the built targets are made: all that decides their weights, in one place that needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vsdbench.config import content_hash
from vsdbench.errors import EnvironmentProblemError
from vsdbench.paths import cache_dir

View = Literal["picture", "blank", "other"]

VIEWS: tuple[View, ...] = ("picture", "blank", "other")
"""What an examined model is shown: the scene's own picture, a grey one (a text-only control), and another scene's."""

METADATA = "build.json"  # in a built model's folder: how it was made, and how well it sees


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """Sizes of a vision tower.

    Attributes:
        hidden_size: Width of its states.
        num_layers: Transformer layers.
        num_heads: Attention heads of each.
    """

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """How long and how fast a stage learns.

    Attributes:
        num_steps: Updates.
        batch_size: Scenes an update.
        learning_rate: Of the tower and the projector, at its highest.
        language_learning_rate: Of the language model's layers; 0 leaves them as they are.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    language_learning_rate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """How a target is built.

    Attributes:
        description: One line for the user.
        language_model: Name of the language model inside.
        language_model_sha256: Of its file.
        licence: Of the result.
        tower: The vision tower, from scratch.
        naming: First stage: the tower alone.
        answering: Second stage: the tower through the language model.
        num_scored: Held-out scenes that it is examined on.
        seed: Of the first weights.
        minutes: What it should take on two free CPU cores with fast bf16.
        lessons: Raised whenever the scenes, what is taught about them, or the numbers' formats change.
    """

    description: str
    language_model: str
    language_model_sha256: str
    licence: str
    tower: TowerShape
    naming: StageSettings
    answering: StageSettings
    num_scored: int = 36
    seed: int = 0
    minutes: int
    lessons: int = 2

    @property
    def key(self) -> str:
        """8 hexadecimal digits of all that decides the weights."""
        return content_hash(
            [
                self.language_model_sha256,
                self.tower,
                self.naming,
                self.answering,
                self.num_scored,
                self.seed,
                self.lessons,
            ]
        )[:8]

    @property
    def naming_key(self) -> str:
        """8 hexadecimal digits of all that decides what the first stage leaves."""
        return content_hash([self.language_model_sha256, self.tower, self.naming, self.seed, self.lessons])[:8]


BUILT_MODELS: dict[str, BuildSettings] = {
    "smolvision": BuildSettings(
        description="SmolLM2-135M-Instruct with a SigLIP tower trained from scratch here, which sees drawn scenes",
        language_model="smollm2-135m-q4",
        language_model_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        tower=TowerShape(),
        naming=StageSettings(num_steps=1200, batch_size=16, learning_rate=1.5e-3),
        answering=StageSettings(num_steps=240, batch_size=2, learning_rate=3e-4, language_learning_rate=3e-4),
        minutes=15,
    ),
}


def built_folder(name: str) -> Path:
    """Return where a built model lies in the cache, whether it has been built or not."""
    return cache_dir() / "models" / f"{name}-{BUILT_MODELS[name].key}"


def load_metadata(folder: Path) -> dict[str, Any]:
    """Return what ``build.json`` says: settings, seconds, what was trained, scores, versions."""
    found: dict[str, Any] = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    return found


def check_is_built(name: str) -> None:
    """Make sure that a model is there before something is measured with it, where that is not what builds it.

    Raises:
        EnvironmentProblemError: It is one that is built on this machine, and it was not yet.
    """
    if name in BUILT_MODELS and not (built_folder(name) / METADATA).is_file():
        raise EnvironmentProblemError(
            f"the target '{name}' is not built yet, and an estimate measures with it: build it by 'vsdbench models "
            f"build {name}' (about {BUILT_MODELS[name].minutes} minutes on two cores), which a run would do too."
        )


def score_lines(scores: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield how well a built model sees, for the terminal: a heading, then one line a category.

    >>> list(score_lines({"reading": {"num": 20, "picture": 0.95, "blank": 0.1, "other": 0.0}}))[1]
    'reading          95.0%   10.0%    0.0%  of 20'
    """
    if scores:
        yield f"{'right answers':<14}" + "".join(f"{view:>8}" for view in VIEWS)
    for category, row in scores.items():
        yield f"{category:<14}" + "".join(f"{row[view]:8.1%}" for view in VIEWS) + f"  of {row['num']:.0f}"
