"""A suite's prompt, turn by turn, as token ids for a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench.suites.loaders import Suite
    from vsdbench.suites.prompts import Prompt
    from vsdbench.suites.schema import Generation


def encode_turn(target: Target, prompt: Prompt, generation: Generation, answers: Sequence[str] = ()) -> Sequence[int]:
    """Return the token ids at the turn that follows these answers: an ``ImagePrompt`` where the prompt has images.

    Args:
        target: Whose chat template it goes through.
        prompt: Its images belong to the first turn.
        generation: Chat or bare text, and the system message.
        answers: To the earlier turns.

    Raises:
        ConfigError: The target cannot read the images, or one of them cannot be opened.
    """
    turn = len(answers)
    if not generation.chat:
        return target.encode_text(prompt.turns[turn], [] if turn else [image.open() for image in prompt.images])
    messages: list[dict[str, Any]] = []
    if generation.system is not None:
        messages.append({"role": "system", "content": generation.system})
    for number, text in enumerate(prompt.turns[: turn + 1]):
        messages.append({"role": "user", "content": text})
        if prompt.images and not number:
            messages[-1]["images"] = [image.open() for image in prompt.images]
        if number < turn:
            messages.append({"role": "assistant", "content": answers[number]})
    return target.encode_chat(messages)


def check_images(target: Target, suite: Suite) -> None:
    """See that the target can read a suite's images, by its first prompt that has any.

    Raises:
        ConfigError: It cannot.
    """
    seeing = next((prompt for prompt in suite.prompts if prompt.images), None)
    if seeing is not None:
        encode_turn(target, seeing, suite.config.generation)
