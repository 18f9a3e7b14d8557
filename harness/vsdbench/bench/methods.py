"""Methods: what a suite compares. Baselines and drafters become the same thing here: a prompt in, an answer out.

Drafters are found by entry point, and a drafter whose weights come from a recipe that was not trained yet is trained
first; nothing in the harness knows a drafter by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from vsdbench import registry
from vsdbench.bars import counting_bars
from vsdbench.bench.auto_tree import choose_trees, num_decodes
from vsdbench.bench.exchange import Misled
from vsdbench.decoding.baseline import hf_generate
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import Drafter, Generation, TreeShape
from vsdbench.decoding.sampling import SamplingParams
from vsdbench.errors import ConfigError
from vsdbench.models.compiled import Graphs, why_not
from vsdbench.models.source import fingerprint
from vsdbench.suites.schema import checkpoint_of, control_of

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench.suites.schema import DrafterEntry, Mode, SuiteConfig

REFERENCE = "autoregressive"
"""The same-engine baseline: what every other method's output is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way of decoding.

    Attributes:
        name: As the tables call it.
        kind: Whether it is measured or measured against.
        run: Decodes a prompt.
        shape: Tree shape; None for baselines, and where every mode has its own.
        trees: Shapes that were chosen by measurement, by mode: ``tree`` and what was predicted of it.
        objective: What the drafter was trained for, if it was.
        drafter_fingerprint: Hash of the drafter's weights, if it has any.
        training: What its training cost and where it lies, for the manifest.
        drafter: What drafts, in methods of our engine.
        control_of: The drafter that it is the control of, where it is ``Misled`` and that one is in the suite.
        graphs: What the drafter's steps were compiled into, if that was asked for; ``not_compiled``: why they were not.
    """

    name: str
    kind: Literal["baseline", "drafter"]
    run: Callable[[Sequence[int], DecodeSettings], Generation]
    shape: TreeShape | None = None
    trees: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    objective: str | None = None
    drafter_fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    drafter: Drafter | None = None
    control_of: str | None = None
    graphs: Graphs | None = None
    not_compiled: str | None = None

    def shape_in(self, mode: str) -> TreeShape | None:
        """Return the tree shape of a mode."""
        return TreeShape(**self.trees[mode]["tree"]) if mode in self.trees else self.shape


def settings_of(suite: SuiteConfig, mode: Mode, *, seed: int, shape: TreeShape | None = None) -> DecodeSettings:
    """Return how answers of a suite are decoded in a mode, plainly where no shape is given."""
    return DecodeSettings(
        max_new_tokens=suite.generation.max_new_tokens,
        shape=shape or TreeShape(budget=0),
        rule=mode.rule,
        sampling=SamplingParams(temperature=mode.temperature, top_k=mode.sampling_top_k, top_p=mode.top_p),
        seed=seed,
    )


def build_methods(
    suite: SuiteConfig,
    target: Target,
    *,
    console: Console | None = None,
    calibration: Sequence[Sequence[int]] = (),
    chosen: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> list[Method]:
    """Return the suite's methods: baselines, drafters, peers; training what is missing.

    Args:
        suite: What is compared.
        target: The target.
        console: Where notes and progress go.
        calibration: Token ids of prompts that are not in the suite, on which ``auto`` trees are chosen.
        chosen: Trees chosen before, by method and mode, for a run that goes on.

    Raises:
        ConfigError: A drafter or peer is unknown or misconfigured.
    """
    # An unknown drafter is found before the first of them is trained.
    builders = [registry.load("vsdbench.drafters", entry.type) for entry in suite.drafters]
    peers = [
        Method(name=peer.name, kind="drafter", run=registry.load("vsdbench.peers", peer.type)(target, peer.options))
        for peer in suite.peers
    ]
    methods = [_baseline(name, target) for name in suite.baselines]
    for entry, builder in zip(suite.drafters, builders, strict=True):
        method = replace(_drafter(entry, builder, target, console), control_of=control_of(entry, suite.drafters))
        if suite.compile:
            method = _compiled(method, entry.tree.shape(), target, console)
        if entry.tree.kind == "auto":
            known = (chosen or {}).get(entry.name, {})
            measured_on = (target, calibration)
            method = _with_chosen_trees(method, suite, entry, measured_on=measured_on, known=known, console=console)
        methods.append(method)
    return [*methods, *peers]


def _with_chosen_trees(
    method: Method,
    suite: SuiteConfig,
    entry: DrafterEntry,
    *,
    measured_on: tuple[Target, Sequence[Sequence[int]]],
    known: Mapping[str, Mapping[str, Any]],
    console: Console | None,
) -> Method:
    """Return the method with a shape for every mode: the one ``known`` from before, or one chosen now."""
    target, prompts = measured_on
    assert method.drafter is not None
    modes: dict[str, DecodeSettings] = {
        mode.name: settings_of(suite, mode, seed=suite.seed) for mode in suite.modes if mode.name not in known
    }
    trees = dict(known)
    if modes:
        limit = entry.tree.shape()
        count = num_decodes(limit, len(prompts), len(modes))
        with counting_bars(console or Console(quiet=True)) as bars:
            task = bars.add_task(f"choosing the tree of {entry.name}", total=count)
            told = functools.partial(bars.advance, task)
            choices = choose_trees(target, method.drafter, prompts, modes=modes, limit=limit, tick=told)
            bars.update(task, completed=count)
        for name, choice in choices.items():
            trees[name] = choice.describe()
            if console is not None:
                console.print(f"{entry.name}, {name}: {choice.sentence()}", highlight=False)
    return replace(method, shape=None, trees=trees)


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
        name=name,
        kind=kind,
        run=lambda prompt, settings: decode(target, drafter, prompt, settings),
        drafter=drafter,
        **details,
    )


def forks(drafter: Drafter, count: int) -> list[Drafter]:
    """Return ``count`` drafters with the same weights and states of their own; the first is ``drafter`` itself.

    Raises:
        ConfigError: It has no method ``fork``.
    """
    check_fork(drafter, count)
    return [drafter, *(drafter.fork() for _ in range(count - 1))]  # type: ignore[attr-defined]


def check_fork(drafter: Drafter, count: int) -> None:
    """See that a drafter can draft for so many sequences at a time.

    Raises:
        ConfigError: It has no method ``fork``.
    """
    if count > 1 and getattr(drafter, "fork", None) is None:
        raise ConfigError(
            f"drafter '{drafter.name}' drafts for one sequence at a time (it has no fork()): use batch size 1."
        )


def _drafter(entry: DrafterEntry, builder: Callable[..., Drafter], target: Target, console: Console | None) -> Method:
    checkpoint = checkpoint_of(entry)
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
            "target_forwards": trained.target_forwards,
            "cached": trained.cached,
            "checkpoint": str(trained.path.name),
        }
    drafter = builder(target, checkpoint=checkpoint, options=dict(entry.options))
    return engine_method(
        entry.name,
        "drafter",
        target,
        drafter if entry.images == "own" else Misled(target, drafter),
        shape=entry.tree.shape(),
        objective=objective,
        drafter_fingerprint=_fingerprint(drafter, checkpoint),
        training=training,
    )


def _compiled(method: Method, shape: TreeShape, target: Target, console: Console | None) -> Method:
    """Return the method with its drafter's steps compiled for trees of a shape, or with why they are not."""
    drafter = method.drafter.drafter if isinstance(method.drafter, Misled) else method.drafter
    compile_steps: Callable[[Graphs, TreeShape], str | None] | None = getattr(drafter, "compile_steps", None)
    graphs = Graphs(static=target.device.type == "cuda")
    if compile_steps is None:
        reason: str | None = "it has none of a form that can be compiled"
    else:
        reason = why_not(target.device) or compile_steps(graphs, shape)
    if console is not None and reason:
        console.print(f"[yellow]note:[/] {method.name}'s steps run as they are, not compiled: {reason}")
    elif console is not None:
        console.print(f"compiled {method.name}'s steps in {graphs.seconds:.0f} s")
    return replace(method, graphs=graphs, not_compiled=reason)


def _fingerprint(drafter: Drafter, checkpoint: Path | None) -> str | None:
    """Return the hash of a drafter's weights; one that drafts with a whole model of its own has that model's hash."""
    if checkpoint is not None:
        return fingerprint(checkpoint)
    found: str | None = getattr(getattr(drafter, "model", None), "fingerprint", None)
    return found
