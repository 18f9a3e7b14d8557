"""Reading a prompt with images: by the model's own forward, once, with our cache.

The outer model turns ids and pixels into embeddings, chooses positions and masks, and calls its language model. All of
that is its own business (M-RoPE, images that attend in both directions, features that enter deeper layers): it runs as
it is, and what reaches the language model is watched. What follows the prompt is text, one position a token.

Where what reaches the language model is embeddings alone, at the positions and with the mask that text has, it need
not run: ``embed_images`` stops before it.

Shape legend: R tokens read, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from vsdbench.errors import ConfigError

if TYPE_CHECKING:
    from vsdbench.models.image_prompt import ImagePrompt
    from vsdbench.models.kv_cache import PreallocatedCache
    from vsdbench.models.target import Target

_PROMPT_ALONE = frozenset({"visual_pos_masks", "deepstack_visual_embeds"})
"""What a language model may take at an image's own positions; nothing of it is needed once the prompt is read."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What became of a prompt with images; its keys and values are in the cache.

    Attributes:
        logits: ``[1, V]`` of the token that follows.
        embeddings: ``[R, H]`` what the language model was given.
        position_offset: What is added to the number of a token behind the prompt to get its position.
    """

    logits: Tensor
    embeddings: Tensor
    position_offset: int


@torch.inference_mode()
def read_images(target: Target, prompt: ImagePrompt, cache: PreallocatedCache) -> Reading:
    """Run the whole model over the first R tokens of a prompt and its images, into an empty cache.

    Raises:
        ConfigError: The model cannot take these inputs, or its language model needs the images again later.
    """
    ids = torch.tensor(prompt.tokens[: prompt.num_read], device=target.device)[None]
    inputs = on_device(target, prompt.model_inputs)
    with _watched(target.model.get_decoder()) as seen:
        output = _call(target, target.model, ids, inputs, cache=cache, use_cache=True, logits_to_keep=1)
    embeddings, given = _given(target, seen, inputs)
    return Reading(output.logits[0], embeddings[0], _offset(given.get("position_ids"), prompt.num_read))


@torch.inference_mode()
def embed_images(target: Target, prompt: ImagePrompt) -> Tensor | None:
    """Return ``[R, H]``, what the language model is given for the first R tokens, without running it.

    None where that is not all: positions are not the tokens' numbers, or the mask is not the causal one.

    Raises:
        ConfigError: As ``read_images``.
    """
    ids = torch.tensor(prompt.tokens[: prompt.num_read], device=target.device)[None]
    inputs = on_device(target, prompt.model_inputs)
    with _in_the_place_of(target.model.get_decoder()) as seen:
        _call(target, target.model.base_model, ids, inputs)
    embeddings, given = _given(target, seen, inputs)
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    causal = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))
    counted = positions is None or bool((positions == torch.arange(prompt.num_read, device=target.device)).all())
    return embeddings[0] if causal and counted and not _PROMPT_ALONE & given.keys() else None


def _call(target: Target, model: nn.Module, ids: Tensor, inputs: Mapping[str, Tensor], **how: Any) -> Any:  # noqa: ANN401
    """Run a model over ids ``[1, R]`` and images.

    Raises:
        ConfigError: Placeholders and images do not match.
    """
    try:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **how, **inputs)
    except ValueError as error:
        raise ConfigError(f"'{target.name}' cannot read the prompt's images: {error}") from error


def _given(target: Target, seen: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Return the embeddings ``[1, R, H]`` of what a language model was called with, and the rest of its data.

    Raises:
        ConfigError: It was called with what we do not know, or without embeddings.
    """
    given = {name: value for name, value in seen.items() if _is_data(value) and name not in inputs}
    embeddings = given.pop("inputs_embeds", None)
    unknown = given.keys() - _PROMPT_ALONE - {"position_ids", "attention_mask", "cache"}
    if embeddings is None or unknown:
        what = f"'{min(unknown)}'" if unknown else "no embeddings"
        raise ConfigError(
            f"'{target.name}' gives its language model {what}: only models whose images are embeddings among those of "
            "the text can be targets."
        )
    return embeddings, given


def on_device(target: Target, inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401 - a mapping of tensors
    """Return a model's image inputs on its device, real numbers in its dtype."""
    return {
        name: value.to(target.device, target.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _offset(positions: Tensor | None, count: int) -> int:
    """Return how far the position of the token behind ``count`` ones lies from its number.

    Args:
        positions: None, ``[1, R]``, or ``[3, 1, R]`` for time, height and width; ``[4, 1, R]`` begins with the numbers.
        count: R.
    """
    if positions is None:
        return 0
    axes = positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions
    return int(axes.max()) + 1 - count


def _is_data(value: object) -> bool:
    return isinstance(value, Tensor | list | tuple | dict) and len(value) > 0


@contextmanager
def _watched(decoder: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield what the language model is called with, once it was."""
    seen: dict[str, Any] = {}

    def keep(_decoder: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hook = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _in_the_place_of(decoder: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield what the language model is called with; it returns its embeddings at once."""
    seen: dict[str, Any] = {}

    def forward(inputs_embeds: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:  # noqa: ANN401
        seen.update(kwargs, inputs_embeds=inputs_embeds)
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    decoder.forward = forward
    try:
        yield seen
    finally:
        del decoder.forward
