"""Tiny random targets of real vision-language classes, with processors built from nothing, for tests."""

from __future__ import annotations

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.smolvlm import processing_smolvlm

from vsdbench.models.encoding import NoVideos
from vsdbench.models.target import Target

SPECIAL = (
    "<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<image>", "<video>",
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>", "<row_1_col_2>",
    "<row_2_col_1>", "<row_2_col_2>", "<img>", "</img>", "<IMG_CONTEXT>", "<start_of_image>", "<end_of_image>",
)  # fmt: skip
VOCAB = 256 + len(SPECIAL)
TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}PLACEHOLDER{% else %}{{ part.text }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
M_ROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}
QWEN_TOKENS = {
    "image_token_id": SPECIAL.index("<|image_pad|>"),
    "video_token_id": SPECIAL.index("<|video_pad|>"),
    "vision_start_token_id": SPECIAL.index("<|vision_start|>"),
    "vision_end_token_id": SPECIAL.index("<|vision_end|>"),
}
QWEN_VISION = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "depth": 2, "num_heads": 2}
CLIP = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **VISION}
CLIP_SIZES = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
IDEFICS = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def make_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes are tokens, behind the special ones."""
    vocab = {token: number for number, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    named |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=named | {"video_token": "<video>"},
    )


def _llava():
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=CLIP,
        image_token_index=SPECIAL.index("<image>"),
    )
    images = hf.CLIPImageProcessorPil(**CLIP_SIZES)
    return config, lambda tokens: hf.LlavaProcessor(
        images, tokens, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava_next():
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = hf.LlavaNextConfig(
        text_config={"model_type": "mistral", **TEXT},
        vision_config=CLIP,
        image_token_index=SPECIAL.index("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    images = hf.LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **CLIP_SIZES)
    return config, lambda tokens: hf.LlavaNextProcessor(
        images, tokens, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _qwen_images():
    return hf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 64, "longest_edge": 32 * 32}
    )


def _qwen2_vl():
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": M_ROPE},
        vision_config={"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **QWEN_VISION},
        **QWEN_TOKENS,
    )
    return config, lambda tokens: hf.Qwen2VLProcessor(_qwen_images(), tokens, NoVideos())


def _qwen2_5_vl():
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": M_ROPE},
        vision_config={
            "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
            "fullatt_block_indexes": [1], **QWEN_VISION,
        },
        **QWEN_TOKENS,
    )  # fmt: skip
    return config, lambda tokens: hf.Qwen2_5_VLProcessor(_qwen_images(), tokens, NoVideos())


def _qwen3_vl():
    config = hf.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": M_ROPE},
        vision_config={
            "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1], **QWEN_VISION,
        },
        **QWEN_TOKENS,
    )  # fmt: skip
    return config, lambda tokens: hf.Qwen3VLProcessor(_qwen_images(), tokens, NoVideos())


def _idefics3():
    config = hf.Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"image_size": 16, "patch_size": 4, **VISION},
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=2,
    )
    images = hf.Idefics3ImageProcessorPil(**IDEFICS)
    return config, lambda tokens: hf.Idefics3Processor(images, tokens, image_seq_len=4)


def _smolvlm():
    config = hf.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"image_size": 16, "patch_size": 4, **VISION},
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=2,
    )
    images = hf.SmolVLMImageProcessorPil(**IDEFICS)

    def make(tokens):
        processing_smolvlm.num2words = processing_smolvlm.num2words or str  # it counts frames of videos alone
        return hf.SmolVLMProcessor(images, tokens, NoVideos(), image_seq_len=4)

    return config, make


def _internvl():
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={"image_size": [16, 16], "patch_size": [4, 4], **VISION},
        image_token_id=SPECIAL.index("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = hf.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4)
    return config, lambda tokens: hf.InternVLProcessor(images, tokens, NoVideos(), image_seq_length=4)


def _gemma3():
    config = hf.Gemma3Config(
        text_config={**TEXT, "sliding_window": 9, "query_pre_attn_scalar": 8},
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, **VISION},
        mm_tokens_per_image=4,
        image_token_index=SPECIAL.index("<image>"),
        boi_token_index=SPECIAL.index("<start_of_image>"),
        eoi_token_index=SPECIAL.index("<end_of_image>"),
    )
    images = hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})

    def make(tokens):
        tokens.image_token, tokens.image_token_id = "<image>", SPECIAL.index("<image>")
        return hf.Gemma3Processor(images, tokens, image_seq_length=4)

    return config, make


BUILDERS = {
    "llava": (_llava, "<image>"),
    "llava-next": (_llava_next, "<image>"),
    "qwen2-vl": (_qwen2_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen2.5-vl": (_qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3-vl": (_qwen3_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "idefics3": (_idefics3, "<image>"),
    "smolvlm": (_smolvlm, "<image>"),
    "internvl": (_internvl, "<IMG_CONTEXT>"),
    "gemma3": (_gemma3, "<start_of_image>"),
}
"""Name -> configuration with processor, and what the chat template writes for an image."""


def make_parts(family, *, seed=0, dtype=torch.float64):
    """A random model whose answers depend on the images, and its processor."""
    build, placeholder = BUILDERS[family]
    NoVideos.allow()
    config, make_processor = build()
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = hf.GenerationConfig()
    processor = make_processor(make_tokenizer())
    processor.chat_template = TEMPLATE.replace("PLACEHOLDER", placeholder)
    return model.to(dtype), processor


def make_target(family="llava", **changes) -> Target:
    model, processor = make_parts(family, **changes)
    return Target(model, processor.tokenizer, name=family, fingerprint="0" * 16, processor=processor)


def make_image(seed=0, size=(24, 20)) -> Image.Image:
    """Noise in colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")
