"""What a suite file may say: its sources, how text is generated, which drafters are measured and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from vsdbench import registry
from vsdbench.config import Config
from vsdbench.decoding.interfaces import ShapeKind, TreeShape, VerifyRule, without_thresholds
from vsdbench.errors import ConfigError, said_of
from vsdbench.suites.sources import Name, Sha256, Source

DrafterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(@[0-9]+)?$")]
Baseline = Literal["autoregressive", "hf-generate"]


class Generation(Config):
    """How answers are generated.

    Attributes:
        max_new_tokens: Tokens a turn, at most.
        system: System message, or None for what the chat template does by itself.
        chat: Whether prompts go through the chat template; otherwise the bare text is continued.
    """

    max_new_tokens: int = Field(ge=1)
    system: str | None = None
    chat: bool = True


class Mode(Config):
    """One way of choosing tokens: temperature 0 with the rule ``greedy``, or above 0 with one of the other rules."""

    name: Literal["greedy", "stochastic"]
    temperature: float = Field(ge=0)
    rule: VerifyRule
    sampling_top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _temperature_fits_the_rule(self) -> Mode:
        if (self.temperature == 0) != (self.rule == "greedy"):
            raise ValueError(
                f"temperature {self.temperature:g} does not go with the rule '{self.rule}': "
                "temperature 0 needs the rule 'greedy', and only that"
            )
        if (self.temperature == 0) != (self.name == "greedy"):
            right = "greedy" if self.temperature == 0 else "stochastic"
            raise ValueError(f"a mode with temperature {self.temperature:g} is named '{right}', not '{self.name}'")
        return self


_AUTO_LIMITS = {"budget": 32, "depth": 6, "top_k": 8}


class TreeConfig(Config):
    """The tree that a drafter proposes in one step: draft tokens, longest path, children a node.

    Attributes:
        kind: ``coupled`` is a dynamic tree whose drafter reads the numbers of the draws to come; ``auto`` the dynamic
            one (coupled for the rule ``coupled``) that is the fastest on this machine, within the other three.
        budget: Draft tokens, at most (7; 32 for ``auto``).
        depth: Longest path (4; 6 for ``auto``).
        top_k: Children a node (4; 8 for ``auto``).
        min_node_prob: Of ``dynamic`` and ``coupled``: a node is sent only if the drafter gives its path as much
            probability (0: as many are sent as the budget holds).
        min_level_prob: Of the same: a level is drafted only below nodes of as much probability together (0: all are).
    """

    kind: Literal[ShapeKind, "auto"] = "dynamic"
    budget: int = Field(default=7, ge=1)
    depth: int = Field(default=4, ge=1)
    top_k: int = Field(default=4, ge=1)
    min_node_prob: float = Field(default=0.0, ge=0, lt=1)
    min_level_prob: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _wide_limits_for_auto(cls, raw: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
        if isinstance(raw, str) and raw != "auto":
            raise ValueError("it should be 'auto', or a mapping such as {kind: dynamic, budget: 7}")
        raw = {"kind": "auto"} if raw == "auto" else raw
        return _AUTO_LIMITS | raw if isinstance(raw, dict) and raw.get("kind") == "auto" else raw

    def shape(self) -> TreeShape:
        """Return it as a shape; for ``auto`` the largest that is considered."""
        kind: ShapeKind = "dynamic" if self.kind == "auto" else self.kind
        return TreeShape(**(self.model_dump() | {"kind": kind}))

    @model_validator(mode="after")
    def _depth_fits_the_budget(self) -> TreeConfig:
        if self.depth > self.budget:
            raise ValueError(f"depth {self.depth} does not fit a budget of {self.budget} draft tokens")
        return self

    @model_validator(mode="after")
    def _only_growing_trees_have_thresholds(self) -> TreeConfig:
        if (self.min_node_prob or self.min_level_prob) and self.kind not in {"dynamic", "coupled"}:
            why = "finds its own" if self.kind == "auto" else "does not grow by probabilities"
            raise ValueError(
                f"a tree of kind '{self.kind}' {why}: min_node_prob and min_level_prob are for 'dynamic' and 'coupled'"
            )
        return self

    @model_serializer(mode="wrap")
    def _no_thresholds_go_without_saying(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave what is 0 out, so that runs from before there were thresholds are still the same runs."""
        return without_thresholds(write(self))


class DrafterEntry(Config):
    """A drafter to measure.

    Attributes:
        name: What the tables call it; ``NAME@SEED`` where several training seeds of one drafter are measured.
        type: Entry-point name of its architecture.
        recipe: The recipe that trains it, for drafters with weights.
        checkpoint: Trained weights to use instead of the recipe's.
        options: Keyword arguments for the architecture.
        tree: What it proposes in one step.
        images: ``shuffled`` is a negative control: the drafter's prompt shows another prompt's pictures, the target's
            its own (``vsdbench.bench.exchange`` says exactly what is exchanged). Name it beside its twin, an entry that
            differs in name alone and has its ``own``, and the fall of tau between the two is told.
    """

    name: DrafterName
    type: str
    recipe: str | None = None
    checkpoint: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    tree: TreeConfig = TreeConfig()
    images: Literal["own", "shuffled"] = "own"

    @model_validator(mode="after")
    def _control_has_its_twins_tree(self) -> DrafterEntry:
        if self.images == "shuffled" and self.tree.kind == "auto":
            raise ValueError(
                "an automatic tree is chosen by measuring, so 'images: shuffled' would get another one than the "
                "drafter it is a control of; give both a tree of one kind, budget, depth and top_k"
            )
        return self

    @model_serializer(mode="wrap")
    def _own_images_go_without_saying(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the default out, so that runs from before there were controls are still the same runs."""
        written: dict[str, Any] = write(self)
        if self.images == "own":
            del written["images"]
        return written


def control_of(entry: DrafterEntry, drafters: Sequence[DrafterEntry]) -> str | None:
    """Return the name of the drafter that an entry is the control of: its twin that sees its own pictures."""
    if entry.images == "own":
        return None
    twin = entry.model_copy(update={"images": "own"})
    return next((other.name for other in drafters if other == twin.model_copy(update={"name": other.name})), None)


class PeerEntry(Config):
    """Another implementation of a decode loop, measured on the same weights beside the drafters.

    Attributes:
        name: What the tables call it.
        type: Entry-point name (group ``vsdbench.peers``).
        options: Its options.
    """

    name: Name
    type: str
    options: dict[str, Any] = Field(default_factory=dict)


class SuiteConfig(Config):
    """A suite: prompts, generation, modes, drafters and baselines, under a name and a version.

    Attributes:
        name: The suite's name.
        version: Raised whenever results would no longer be comparable.
        description: One sentence.
        licence: Licence of the prompts together.
        target: Name, path or hub id of the target model.
        sources: Where the prompts come from, in order.
        generation: How answers are generated.
        modes: Greedy and stochastic decoding, or one of them.
        repeats: How often every prompt is decoded by every method.
        baselines: What speed is compared with.
        once: Baselines that decode every prompt once, whatever ``repeats`` is: slow ones; they have no A/A then.
        batch_sizes: Also decode so many answers at a time, against plain decoding of as many; [1]: one at a time alone.
        drafters: What is measured.
        peers: Decode loops of others that are measured beside them.
        compile: Whether steps run compiled (``torch.compile``), the target's, plain decoding's too, and drafters';
            compiling itself is not timed.
        seed: Of the slices, the interleaving and the sampling.
        expected_prompts_sha256: Hash of the prompts as loaded in full; checked when nothing was overridden that
            changes them.
    """

    name: Name
    version: int = Field(ge=1)
    description: str
    licence: str
    target: str = "smollm2-135m-q4"
    sources: list[Source] = Field(min_length=1)
    generation: Generation
    modes: list[Mode] = Field(min_length=1)
    repeats: int = Field(default=2, ge=1)
    baselines: list[Baseline] = Field(default=["autoregressive", "hf-generate"], min_length=1)
    once: list[Baseline] = Field(default_factory=list)
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default=[1], min_length=1)
    drafters: list[DrafterEntry] = Field(min_length=1)
    peers: list[PeerEntry] = Field(default_factory=list)
    compile: bool = False
    seed: int = Field(default=0, ge=0)
    expected_prompts_sha256: Sha256 | None = None

    @model_serializer(mode="wrap")
    def _every_repeat_goes_without_saying(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the default out, so that runs from before are still the same runs."""
        written: dict[str, Any] = write(self)
        if not self.once:
            del written["once"]
        return written

    def repeats_of(self, method: str) -> int:
        """Return how often a method decodes every prompt."""
        return 1 if method in self.once else self.repeats

    @property
    def compiled_rows(self) -> list[int]:
        """Numbers of rows of a step to compile for: plain decoding's one, those of the trees, some for ``auto``."""
        sizes = {1, *(1 + entry.tree.budget for entry in self.drafters)}
        if any(entry.tree.kind == "auto" for entry in self.drafters):
            sizes |= {size for size in (4, 8, 16) if size < max(sizes)}
        return sorted(sizes) if self.compile else []

    @model_validator(mode="after")
    def _plain_decoding_is_a_baseline(self) -> SuiteConfig:
        if "autoregressive" not in self.baselines:
            raise ValueError(
                f"baselines is {list(self.baselines)}: 'autoregressive' must be among them, since every answer is "
                "compared with its"
            )
        return self

    @model_validator(mode="after")
    def _once_names_baselines(self) -> SuiteConfig:
        other = next((name for name in self.once if name not in self.baselines), None)
        if other is not None:
            raise ValueError(
                f"once is {list(self.once)}, but '{other}' is not among the baselines {self.baselines}: add it there, "
                "or leave it out of once"
            )
        return self

    @model_validator(mode="after")
    def _batch_sizes_increase(self) -> SuiteConfig:
        if self.batch_sizes != sorted(set(self.batch_sizes)):
            raise ValueError(f"batch_sizes is {self.batch_sizes}: name each size once, in increasing order")
        return self

    @model_validator(mode="after")
    def _compiled_one_at_a_time(self) -> SuiteConfig:
        if self.compile and self.batch_sizes != [1]:
            raise ValueError(
                f"batch_sizes is {self.batch_sizes}, but only single answers are compiled: leave compile out"
            )
        return self

    @model_validator(mode="after")
    def _coupled_trees_have_their_rule(self) -> SuiteConfig:
        coupled = next((drafter.name for drafter in self.drafters if drafter.tree.kind == "coupled"), None)
        other = next((mode for mode in self.modes if mode.rule not in {"greedy", "coupled"}), None)
        if coupled and other:
            raise ValueError(
                f"drafter '{coupled}' has a tree of kind 'coupled', which reads the numbers of the rule 'coupled', but "
                f"mode '{other.name}' has the rule '{other.rule}'; use the kind 'dynamic', or the rule 'coupled'"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> SuiteConfig:
        lists: dict[str, list[str]] = {
            "sources": [source.name for source in self.sources],
            "modes": [mode.name for mode in self.modes],
            "baselines": list(self.baselines),
            "drafters, peers and baselines": [
                *self.baselines,
                *(drafter.name for drafter in self.drafters),
                *(peer.name for peer in self.peers),
            ],
        }
        for what, entries in lists.items():
            twice = next((name for name in entries if entries.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"the name '{twice}' is used twice among the {what}, where names must be unique")
        return self


def check_plugins(config: SuiteConfig, where: str) -> None:
    """See that what a suite names is there, before anything is loaded or trained: drafters, their recipes, peers.

    Args:
        config: The suite.
        where: What a sentence starts with: the suite's file.

    Raises:
        ConfigError: Something is not there, or a recipe is wrong.
    """
    for entry in config.drafters:
        with said_of(where):
            checkpoint_of(entry)
        with said_of(f"{where}: drafter '{entry.name}'"):
            registry.load("vsdbench.drafters", entry.type)
            if entry.recipe is not None:
                registry.load("vsdbench.trainers", "load")(entry.recipe)
    for peer in config.peers:
        with said_of(f"{where}: peer '{peer.name}'"):
            registry.load("vsdbench.peers", peer.type)


def checkpoint_of(entry: DrafterEntry) -> Path | None:
    """Return where the checkpoint lies that a drafter names, or None where it names none.

    Raises:
        ConfigError: There is nothing.
    """
    path = Path(entry.checkpoint).expanduser() if entry.checkpoint else None
    if path is not None and not path.exists():
        raise ConfigError(f"drafter '{entry.name}': checkpoint '{path}' does not exist.")
    return path


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a suite file, for editors and for ``vsdbench schema``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SuiteConfig.model_json_schema()}
