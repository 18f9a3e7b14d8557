"""Example answers of a run: the few prompts and pictures that its reader is shown, and the text of every token.

Records have hashes of prompts and ids of tokens, which is all that numbers need. To draw an answer one needs words, so
a finished run keeps those of a few prompts in ``examples.json``; ``bench.examples`` says which. Pictures lie beside it
as small PNG files. A run from before this file was written has none, and nothing but the drawing is missing from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from vsdbench.errors import ConfigError
from vsdbench.store.files import storage_errors, write_atomic
from vsdbench.store.records import Model, first_problem

EXAMPLES, PICTURES = "examples.json", "examples"
"""The file, and the folder of its pictures."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExamplePrompt(Model):
    """A prompt as it is shown.

    Attributes:
        prompt_id: As in the records.
        category: As in the suite.
        text: Its first turn, the middle left out where it is long.
        num_images: Pictures that the target saw.
        images: Files of those that are kept, relative to the run: all of them, or none.
    """

    prompt_id: str
    category: str
    text: str
    num_images: Annotated[int, Field(ge=0)] = 0
    images: tuple[Annotated[str, Field(pattern=rf"^{PICTURES}/[0-9a-f]+\.png$")], ...] = ()


class Examples(Model):
    """What ``examples.json`` holds.

    Attributes:
        drafters: Whose answers are shown unless others are asked for; the prompts were chosen by the first one's tau.
        mode: The mode whose answers are shown, those of the first turn and repeat.
        temperature: Of it.
        prompts: In the suite's order.
        pieces: By ``output_sha256`` the text that each token of an answer adds, "" where a character needs more tokens.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    drafters: Annotated[tuple[str, ...], Field(min_length=1)]
    mode: Literal["greedy", "stochastic"]
    temperature: float
    prompts: tuple[ExamplePrompt, ...]
    pieces: dict[Sha256, tuple[str, ...]]


def save_examples(folder: Path, examples: Examples, pictures: dict[str, bytes]) -> None:
    """Write the examples of a run, in place of those it may have.

    Args:
        folder: Of the run.
        examples: What is written.
        pictures: PNG files by their names in ``examples``.

    Raises:
        EnvironmentProblemError: The disk is full or the folder may not be written.
    """
    with storage_errors(folder):
        for name, data in pictures.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomic(folder / name, data)
    write_atomic(folder / EXAMPLES, (examples.model_dump_json(indent=1) + "\n").encode())


def load_examples(folder: Path) -> Examples | None:
    """Return the examples of a run, or None where it has none.

    Raises:
        ConfigError: The file is not one of these.
    """
    path = folder / EXAMPLES
    if not path.is_file():
        return None
    try:
        return Examples.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not a file of examples of schema 1: {first_problem(error, 'file')}; restore it from a copy or "
            "delete it, nothing else needs it."
        ) from error
