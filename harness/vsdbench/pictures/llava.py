"""A vision-language model put together from a language model's folder and a new vision tower: stock classes only.

The result is a ``LlavaForConditionalGeneration`` with a SigLIP tower and a processor that needs no torchvision. The
language model keeps its vocabulary: the picture's placeholder is a token that it has but never used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import logging

from vsdbench.errors import ConfigError
from vsdbench.pictures.patches import PATCH
from vsdbench.pictures.scenes import SIZE
from vsdbench.pictures.settings import TowerShape

IMAGE_TOKEN = "<image>"
SPARE_TOKEN = "<empty_output>"

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""
"""The language model's own turns, each picture before the words of its turn; without its default system turn."""


def assemble(language_model: Path, shape: TowerShape) -> LlavaForConditionalGeneration:
    """Return a model in fp32: the folder's language model as it is, a tower and a projector with random weights.

    Args:
        language_model: Folder of a decoder-only model and its tokenizer.
        shape: Of the tower; the random weights come from torch's global generator.

    Raises:
        ConfigError: The language model has no spare token to stand for pictures.
    """
    logging.disable_progress_bar()
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32, local_files_only=True)
    tower = SiglipVisionConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language.config,
        image_token_index=_spare_token(language_model),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = language.generation_config
    return model.float()


def make_processor(language_model: Path, scratch: Path) -> LlavaProcessor:
    """Return the processor: the folder's tokenizer with its spare token renamed, pictures resized by Pillow.

    Args:
        language_model: Folder with the tokenizer.
        scratch: An empty folder, for the renamed tokenizer's files.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (language_model / name).read_text(encoding="utf-8")
        (scratch / name).write_text(text.replace(json.dumps(SPARE_TOKEN), json.dumps(IMAGE_TOKEN)), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(scratch, local_files_only=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    images = SiglipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def image_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return ``[B, 81, H]``: what the language model reads in the place of B pictures ``[B, 3, 144, 144]``."""
    features: Any = model.get_image_features(
        pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).pooler_output
    return torch.stack(list(features))


def _spare_token(folder: Path) -> int:
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    found = [token["id"] for token in vocabulary if token["content"] == SPARE_TOKEN]
    if not found:
        raise ConfigError(
            f"the language model in '{folder}' has no token {SPARE_TOKEN} that could stand for a picture."
        )
    return int(found[0])
