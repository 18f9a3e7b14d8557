"""From messages to a prompt: by the tokenizer and its chat template, or by the processor where a model reads images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jinja2 import TemplateError
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoProcessor, processing_utils
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from vsdbench.errors import ConfigError, EnvironmentProblemError, first_line
from vsdbench.models.image_prompt import ImagePrompt

if TYPE_CHECKING:
    from PIL.Image import Image

Message = Mapping[str, Any]
"""``role`` and ``content``; ``images`` (PIL) beside them stand before the content."""

_DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%A": "Friday", "%H": "12", "%M": "00"}
_SAME_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DAY.items())
    + " }}{%- endmacro %}"
)
"""Before chat templates that write the date: a prompt must not change at midnight. Llama 3.1's own, without a clock."""


class TextEncoder:
    """Makes prompts for a model of text.

    Args:
        tokenizer: Of transformers.
        name: The model's, for messages.
        config: The model's; it knows how many tokens there are.
    """

    def __init__(self, tokenizer: Any, *, name: str, config: Any) -> None:  # noqa: ANN401 - of transformers
        self.tokenizer = tokenizer
        self.name = name
        self._vocab_size = int(config.get_text_config().vocab_size)

    @property
    def template(self) -> str:
        """The chat template, empty where there is none."""
        found = getattr(self.tokenizer, "chat_template", None) or ""
        return found.get("default", "") if isinstance(found, dict) else found

    @property
    def template_hash(self) -> str:
        """16 hex digits of the chat template's sha256."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]

    def chat(self, messages: Sequence[Message]) -> Sequence[int]:
        """Return the prompt of a conversation: by the chat template, or as plain text where there is none.

        Raises:
            ConfigError: There are images and the model cannot read them, or the template refuses the conversation.
        """
        self._refuse(sum(len(message.get("images", ())) for message in messages))
        if not self.template:
            return self.text("\n\n".join(message["content"] for message in messages))
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            encoded = self.tokenizer.apply_chat_template(
                plain, chat_template=self._dated, add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in plain)
            raise ConfigError(
                f"the chat template of '{self.name}' refuses a conversation of {roles} ({first_line(error)}): leave "
                "out what it does not take, such as generation.system, or set generation.chat=false."
            ) from error
        return self._known(encoded["input_ids"])

    def text(self, text: str, images: Sequence[Image] = ()) -> Sequence[int]:
        """Return the prompt of a text outside of any template, with images before it.

        Raises:
            ConfigError: There are images and the model cannot read them.
        """
        self._refuse(len(images))
        return self._known(self.tokenizer(text)["input_ids"])

    @property
    def _dated(self) -> str:
        """The chat template, for which it is always the same day, if it asks."""
        return f"{_SAME_DAY}{self.template}" if "strftime_now" in self.template else self.template

    def _known(self, ids: Iterable[int]) -> list[int]:
        """Return token ids as a list; raise where the model has no such tokens."""
        tokens = [int(token) for token in ids]
        if (largest := max(tokens, default=0)) >= self._vocab_size:
            raise ConfigError(
                f"the tokenizer of '{self.name}' gives token {largest}, but the model has {self._vocab_size} tokens: "
                "its tokenizer and its weights are not of the same model."
            )
        return tokens

    def _refuse(self, num_images: int) -> None:
        if num_images:
            raise ConfigError(
                f"The prompt has {num_images} image{'s' if num_images > 1 else ''} and '{self.name}' reads text alone: "
                "choose a vision-language target, or a suite without images."
            )


class NoVideos(VideoProcessorMixin):  # type: ignore[misc]
    """Stands where a processor insists on a video processor: those need torchvision, and nothing here has videos."""

    num_frames = fps = None

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> Self:
        """Return one, whatever the folder holds."""
        return cls()

    @staticmethod
    def allow() -> None:
        """Let processors take one: they look their parts' classes up by names that go missing with torchvision."""
        if not is_torchvision_available():
            processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin


def reads_images(config: Any) -> bool:  # noqa: ANN401 - a transformers config
    """Whether a model of this config takes images beside text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config.get_text_config() is not config


def load_processor(path: Path, config: Any, *, name: str, trust_remote_code: bool) -> Any:  # noqa: ANN401 - as above
    """Return the processor of a model folder.

    Raises:
        ConfigError: The folder has none.
        EnvironmentProblemError: It needs a package that is not installed.
    """
    if not is_torchvision_available():
        NoVideos.allow()
        AutoVideoProcessor.register(type(config), NoVideos, exist_ok=True)
    try:
        return AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except ImportError as error:
        raise EnvironmentProblemError(f"the processor of '{name}' cannot run here: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"'{name}' reads images, but its processor cannot be loaded ({first_line(error)}): "
            "the folder must hold the processor's files too (preprocessor_config.json, processor_config.json)."
        ) from error


class ImageEncoder(TextEncoder):
    """Makes prompts for a model that reads images.

    Args:
        processor: Of transformers.
        name: The model's, for messages.
        config: The model's; it knows the placeholder that stands once for every position that an image takes.

    Raises:
        ConfigError: The config names no placeholder.
    """

    def __init__(self, processor: Any, *, name: str, config: Any) -> None:  # noqa: ANN401 - of transformers
        found = getattr(config, "image_token_id", None)
        if found is None:
            raise ConfigError(f"'{name}' marks no tokens as those of an image (its config has no image_token_id).")
        super().__init__(processor.tokenizer, name=name, config=config)
        self.processor = processor
        self._image_token_id = int(found)

    @property
    def template(self) -> str:
        """The chat template, the processor's before the tokenizer's; empty where there is none."""
        found = getattr(self.processor, "chat_template", None) or super().template
        return found["default"] if isinstance(found, dict) else found

    def chat(self, messages: Sequence[Message]) -> Sequence[int]:
        """Return the prompt of a conversation; the images of a message stand before its text.

        Raises:
            ConfigError: The processor or its template cannot take these images.
        """
        images = [image for message in messages for image in message.get("images", ())]
        if not self.template:
            return self.text("\n\n".join(message["content"] for message in messages), images)
        conversation = [{"role": message["role"], "content": _parts(message)} for message in messages]
        return self._prompt(
            len(images),
            lambda: self.processor.apply_chat_template(
                conversation,
                chat_template=self._dated,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ),
        )

    def text(self, text: str, images: Sequence[Image] = ()) -> Sequence[int]:
        """Return the prompt of a plain text with images before it.

        Raises:
            ConfigError: The processor cannot take these images.
        """
        if not images:
            return super().text(text)
        placeholders = "".join(f"{self.processor.image_token}\n" for _ in images)
        return self._prompt(
            len(images),
            lambda: self.processor(text=placeholders + text, images=list(images), return_tensors="pt"),
        )

    def _prompt(self, num_images: int, encode: Callable[[], Mapping[str, Any]]) -> Sequence[int]:
        try:
            inputs = dict(encode())
        except (ValueError, TypeError, IndexError, StopIteration, TemplateError) as error:
            raise ConfigError(
                f"the processor of '{self.name}' cannot read a prompt with {num_images} images: {first_line(error)}"
            ) from error
        ids = torch.as_tensor(inputs.pop("input_ids")).view(-1)
        if not num_images:
            return [int(token) for token in ids]
        mask = ids == self._image_token_id
        if not mask.any():
            raise ConfigError(f"the chat template of '{self.name}' leaves images out: it has no place for them.")
        inputs.pop("attention_mask", None)  # one prompt has no padding
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        return ImagePrompt(tuple(ids.tolist()), tensors, mask, num_read=len(ids))


def make_encoder(tokenizer: Any, processor: Any, *, name: str, config: Any) -> TextEncoder:  # noqa: ANN401 - as above
    """Return the encoder of a model: for images if there is a processor."""
    if processor is None:
        return TextEncoder(tokenizer, name=name, config=config)
    return ImageEncoder(processor, name=name, config=config)


def _parts(message: Message) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": image} for image in message.get("images", ())]
    return [*images, {"type": "text", "text": message["content"]}]
