"""Methods: what a suite compares. Baselines and drafters become the same thing here: a prompt in, an answer out.

Drafters are found by entry point, and a drafter whose weights come from a recipe that was not trained yet is trained
first; nothing in the harness knows a drafter by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vsdbench import registry
from vsdbench.decoding.baseline import hf_generate
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import Drafter, Generation, TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models.source import fingerprint

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.models.target import Target
    from vsdbench.suites.schema import DrafterEntry, SuiteConfig

REFERENCE = "autoregressive"
"""The same-engine baseline: what every other method's output is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way of decoding.

    Attributes:
        name: As the tables call it.
        kind: Whether it is measured or measured against.
        run: Decodes a prompt.
        shape: Tree shape; None for baselines.
        objective: What the drafter was trained for, if it was.
        drafter_fingerprint: Hash of the drafter's weights, if it has any.
        training: What its training cost and where it lies, for the manifest.
    """

    name: str
    kind: Literal["baseline", "drafter"]
    run: Callable[[Sequence[int], DecodeSettings], Generation]
    shape: TreeShape | None = None
    objective: str | None = None
    drafter_fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def build_methods(suite: SuiteConfig, target: Target, *, console: Console | None = None) -> list[Method]:
    """Return the suite's methods, baselines first, training what is missing.

    Raises:
        ConfigError: The same-engine baseline is missing, or a drafter is unknown or misconfigured.
    """
    if REFERENCE not in suite.baselines:
        raise ConfigError(f"baselines is {list(suite.baselines)}: '{REFERENCE}' must be among them, as the reference.")
    # An unknown drafter is found before the first of them is trained.
    builders = [registry.load("vsdbench.drafters", entry.type) for entry in suite.drafters]
    methods = [_baseline(name, target) for name in suite.baselines]
    for entry, builder in zip(suite.drafters, builders, strict=True):
        methods.append(_drafter(entry, builder, target, console))
    return methods


def _baseline(name: str, target: Target) -> Method:
    if name == REFERENCE:
        return engine_method(name, "baseline", target, Autoregressive())
    return Method(name=name, kind="baseline", run=lambda prompt, settings: hf_generate(target, prompt, settings))


def engine_method(
    name: str,
    kind: Literal["baseline", "drafter"],
    target: Target,
    drafter: Drafter,
    **details: Any,  # noqa: ANN401 - fields of Method
) -> Method:
    """Return the method that decodes with ``drafter`` in our engine; ``details`` are further fields of ``Method``."""
    return Method(
        name=name, kind=kind, run=lambda prompt, settings: decode(target, drafter, prompt, settings), **details
    )


def _drafter(entry: DrafterEntry, builder: Callable[..., Drafter], target: Target, console: Console | None) -> Method:
    checkpoint = Path(entry.checkpoint).expanduser() if entry.checkpoint else None
    if checkpoint is not None and not checkpoint.exists():
        raise ConfigError(f"drafter '{entry.name}': checkpoint '{checkpoint}' does not exist.")
    objective: str | None = None
    training: dict[str, Any] = {}
    if checkpoint is None and entry.recipe is not None:
        train = registry.load("vsdbench.trainers", "default")
        trained = train(entry.recipe, target=target, console=console)
        checkpoint, objective = trained.path, trained.objective
        training = {
            "recipe": entry.recipe,
            "seconds": trained.seconds,
            "tokens": trained.tokens,
            "cached": trained.cached,
            "checkpoint": str(trained.path.name),
        }
    drafter = builder(target, checkpoint=checkpoint, options=dict(entry.options))
    return engine_method(
        entry.name,
        "drafter",
        target,
        drafter,
        shape=TreeShape(**entry.tree.model_dump()),
        objective=objective,
        drafter_fingerprint=_fingerprint(drafter, checkpoint),
        training=training,
    )


def _fingerprint(drafter: Drafter, checkpoint: Path | None) -> str | None:
    """Return the hash of a drafter's weights; one that drafts with a whole model of its own has that model's hash."""
    if checkpoint is not None:
        return fingerprint(checkpoint)
    found: str | None = getattr(getattr(drafter, "model", None), "fingerprint", None)
    return found
